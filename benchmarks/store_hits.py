"""Does the hit rate hold up? New queries over a corpus larger than the cache, one after another.

Every query asks for 14 chunks of 128 to 1,023 tokens, drawn by Zipf's law from a corpus; no query
comes twice. A chunk that is missing is computed and put, as in use. Compared with what perfect
knowledge of the popularities reaches: the chunks of the highest cost saved per byte, held from the
start ("offline optimum": the same value function as GDSF, with true rates instead of counts).

    python benchmarks/store_hits.py --store memory --plot benchmarks/results/store_hits.png
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cacheblend_rag.store import ChunkKV, DiskStore, KVStore, MemoryStore
from cacheblend_rag.store.evict import POLICIES, recompute_cost

PER_QUERY = 14
_MANY = 20_000  # draws to estimate how often each chunk is asked for


class Workload(NamedTuple):
    """A corpus and the queries to it."""

    tokens: np.ndarray  # of each chunk
    popularity: np.ndarray  # of each chunk, summing to one
    queries: list[np.ndarray]  # chunk numbers, distinct within a query
    rng: np.random.Generator


def make_workload(num_chunks: int, exponent: float, num_queries: int, seed: int) -> Workload:
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, num_chunks + 1) ** exponent
    popularity /= popularity.sum()
    rng.shuffle(popularity)
    tokens = rng.integers(128, 1024, num_chunks)
    return Workload(tokens, popularity, draw(popularity, num_queries, rng), rng)


def draw(popularity: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.choice(len(popularity), PER_QUERY, False, popularity) for _ in range(count)]


def nbytes_of(tokens: np.ndarray) -> np.ndarray:
    return tokens * 2 * 32 * 2  # one layer, K and V, one head of 32, bfloat16


def capacity_of(work: Workload, share: float) -> int:
    return int(nbytes_of(work.tokens).sum() * share)


def optimum(work: Workload, capacity: int, queries: Sequence[np.ndarray]) -> float:
    """Hit rate of the fixed set that perfect knowledge would hold."""
    rates = np.bincount(
        np.concatenate(draw(work.popularity, _MANY // PER_QUERY, work.rng)),
        minlength=len(work.tokens),
    )
    rates = rates + work.popularity * _MANY  # the draws settle ties, the law what was not drawn
    costs = np.array([recompute_cost(int(n)) for n in work.tokens])
    held, used = set(), 0
    for n in np.argsort(-rates * costs / nbytes_of(work.tokens)):
        size = int(nbytes_of(work.tokens)[n])
        if used + size <= capacity:
            held.add(int(n))
            used += size
    return float(np.mean([[int(n) in held for n in query] for query in queries]))


def hits(store: KVStore, work: Workload) -> Iterator[float]:
    """Hit rate of each query in turn."""
    zero = torch.zeros(1, dtype=torch.bfloat16)
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(len(work.tokens))]
    for query in work.queries:
        found = 0
        for n in query:
            if store.get(keys[n]) is not None:
                found += 1
                continue
            length = int(work.tokens[n])
            kv_L2NHD = zero.expand(1, 2, length, 1, 32)  # takes no memory, but counts
            store.put(keys[n], ChunkKV(tuple(range(length)), 0, kv_L2NHD))
        yield found / PER_QUERY


def plot(path: Path, curves: dict[str, list[float]], best: float, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        smooth = np.convolve(curve, np.ones(50) / 50, "valid")
        axes.plot(np.arange(len(smooth)) + 50, smooth, register=name)
    axes.axhline(best, color="black", linestyle=":", register="offline optimum")
    axes.set(xlabel="new queries", ylabel="hit rate (mean of 50 queries)", ylim=(0, 1), title=title)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", choices=["memory", "disk"], default="memory")
    parser.add_argument("--chunks", type=int, default=4000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--zipf", type=float, default=[0.7, 0.8, 0.9, 1.0, 1.1], nargs="+")
    parser.add_argument("--share", type=float, default=0.2, help="of the corpus that fits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="of the exponent nearest to 1")
    args = parser.parse_args()
    print(f"{args.store}, {args.chunks} chunks, {args.share:.0%} fit, {args.queries} queries")
    print(
        "zipf   optimum   " + "   ".join(f"{name:>11}" for name in POLICIES) + "   (last hundred)"
    )
    chosen = min(args.zipf, key=lambda exponent: abs(exponent - 1))
    for exponent in args.zipf:
        work = make_workload(args.chunks, exponent, args.queries, args.seed)
        capacity = capacity_of(work, args.share)
        best = optimum(work, capacity, work.queries[-100:])
        curves = {}
        for name, policy in POLICIES.items():
            with tempfile.TemporaryDirectory() as folder:
                store: KVStore = MemoryStore(capacity, policy=policy)
                if args.store == "disk":
                    store = DiskStore(
                        Path(folder), namespace="bench", capacity_bytes=capacity, policy=policy
                    )
                with store:
                    curves[name] = list(hits(store, work))
        last = "   ".join(f"{np.mean(curve[-100:]):11.3f}" for curve in curves.values())
        print(f"{exponent:4.2f}   {best:7.3f}   {last}", flush=True)
        if args.plot and exponent == chosen:
            title = f"Zipf {exponent:g}, {args.chunks} chunks, {args.share:.0%} of them fit"
            plot(args.plot, curves, best, title)


if __name__ == "__main__":
    main()
