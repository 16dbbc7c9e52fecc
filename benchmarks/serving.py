"""Many requests at once: throughput by mode, and what a decoding stream feels of others' blends.

    python benchmarks/serving.py --shape llama-8b --chunk-tokens 1024

Throughput: clients that each send a request after the other; every request draws six of a pool of
chunks in random order and asks a new question. Modes take turns, each at every number of clients:
``full`` (a plain prefill), ``off`` (vLLM's prefix cache), ``blend``. At equal p95 TTFT, the highest
throughput of each mode that keeps it is compared.

Stall: one stream decodes; its steps are timed alone, and again while others arrive and blend.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shapes import Words, opened, parser, versions

MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "off": {"mode": "off"},
    "blend": {},
}


def options(about: str | None) -> argparse.ArgumentParser:
    """Of benchmarks that draw requests from a pool of chunks."""
    found = parser(about)
    found.add_argument("--chunks", type=int, default=6, help="of a request")
    found.add_argument("--pool", type=int, default=24)
    found.add_argument("--chunk-tokens", type=int, default=512)
    found.add_argument("--output-tokens", type=int, default=16)
    found.add_argument("--ratio", type=float, default=0.15)
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=48, help="for each mode and client number")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with loaded(args) as load:
        asyncio.run(run(load, args))


class Load:
    """Requests over one pool of chunks; ``blended`` counts those that were."""

    def __init__(self, blend: Any, words: Words, pool: Sequence[tuple[int, ...]]) -> None:
        self.blend, self.words, self.pool = blend, words, pool
        self.head, self.blended = words(48), 0

    def prompt(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """These chunks of the pool in this order, and a new question."""
        return self.head + tuple(t for n in chosen for t in self.pool[n]) + self.words(32)

    def some(self, count: int) -> tuple[int, ...]:
        """A prompt of so many chunks, any of the pool."""
        return self.prompt(self.words.draw.sample(range(len(self.pool)), count))

    async def request(
        self, prompt: tuple[int, ...], output_tokens: int, **call: Any
    ) -> list[float]:
        """Seconds from the call to each token."""
        start, at = time.perf_counter(), []
        stream = self.blend.astream(
            prompt, max_tokens=output_tokens, temperature=0.0, ignore_eos=True, **call
        )
        async for _ in stream:
            at.append(time.perf_counter() - start)
        self.blended += stream.result.report.blended
        return at


@contextlib.contextmanager
def loaded(args: argparse.Namespace) -> Iterator[Load]:
    """An engine with a pool of chunks in its store."""
    with opened(args, args.chunks * args.chunk_tokens, recompute_ratio=args.ratio) as (
        blend,
        words,
    ):
        load = Load(blend, words, [words(args.chunk_tokens) for _ in range(args.pool)])
        blend.ingest(load.pool, progress=False)
        yield load


def about(load: Load, args: argparse.Namespace) -> str:
    return (
        f"{versions(load.blend)}, {args.shape}, {args.chunks} of {args.pool} "
        f"x {args.chunk_tokens} tokens, {args.output_tokens} output tokens, "
        f"ratio {args.ratio}, {time.strftime('%Y-%m-%d')}"
    )


async def run(load: Load, args: argparse.Namespace) -> None:
    print(about(load, args))
    for call in MODES.values():  # warm up
        await asyncio.gather(*(load.request(load.some(args.chunks), 4, **call) for _ in range(4)))
    found = {"stall": await stall(load, args), "throughput": await throughput(load, args)}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


async def throughput(load: Load, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print(f"{'mode':8}{'clients':>8}{'requests/s':>12}{'TTFT p50 ms':>13}{'p95 ms':>9}")
    for clients in args.clients:
        for name, call in MODES.items():
            ttft: list[float] = []
            left = iter(range(args.requests))

            async def client(left: Any = left, call: Any = call, ttft: list[float] = ttft) -> None:
                for _ in left:
                    prompt = load.some(args.chunks)
                    ttft.append((await load.request(prompt, args.output_tokens, **call))[0])

            start = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            speed = args.requests / (time.perf_counter() - start)
            p50, p95 = statistics.median(ttft), percentile95(ttft)
            rows.append({"mode": name, "clients": clients, "rps": speed, "p50": p50, "p95": p95})
            print(f"{name:8}{clients:8}{speed:12.2f}{1e3 * p50:13.1f}{1e3 * p95:9.1f}", flush=True)
    at_equal_p95(rows)
    return rows


def percentile95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def at_equal_p95(rows: Sequence[dict[str, Any]]) -> None:
    """The highest throughput of each mode that keeps each p95 TTFT a full prefill was seen with."""
    print("at equal p95 TTFT:")
    for target in sorted({r["p95"] for r in rows if r["mode"] == "full"}):
        best = {
            name: max(
                (r["rps"] for r in rows if r["mode"] == name and r["p95"] <= target), default=0
            )
            for name in MODES
        }
        ratios = [
            f"{best['blend'] / best[m]:.2f} x {m} ({best[m]:.2f})"
            for m in ("full", "off")
            if best[m]
        ]
        print(f"  p95 <= {1e3 * target:.0f} ms: blend {best['blend']:.2f}/s, {', '.join(ratios)}")


async def stall(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    """Gaps between the tokens of one stream: alone, beside blends, beside plain prefills."""
    found: dict[str, Any] = {}
    for name, call in {"alone": None, "blend": {}, "full": {"mode": "full"}}.items():
        stream = asyncio.create_task(load.request(load.some(args.chunks), 240, mode="off"))
        if call is not None:
            await asyncio.sleep(0.4)  # it decodes
            for _ in range(6):
                await load.request(load.some(args.chunks), 1, **call)
        gaps = steps(await stream)
        found[name] = {
            "median": statistics.median(gaps),
            "p95": percentile95(gaps),
            "longest": sorted(gaps)[-5:],
        }
    normal = found["alone"]["median"]
    for name, row in found.items():
        longest = ", ".join(f"{1e3 * g:.1f}" for g in row["longest"])
        print(
            f"a stream's step beside {name:6} median {1e3 * row['median']:.1f} ms, longest "
            f"{longest} ms ({row['longest'][-1] / normal:.1f} times the normal step)",
            flush=True,
        )
    return found


def steps(at: Sequence[float]) -> list[float]:
    """Seconds between tokens that came at these times."""
    return [b - a for a, b in itertools.pairwise(at)]


if __name__ == "__main__":
    main()
