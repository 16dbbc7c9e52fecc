"""How long does it take to find the cached chunks in a prompt?

Builds a ``ChunkIndex`` over synthetic chunks and queries it with prompts made of retrieved chunks,
each a few boundary tokens short, with glue between them. Next to it the rival that needs no index:
``bytes.find`` of every chunk's token ids in the prompt's, without the boundary tokens, so that it
can succeed at all. The rival is timed on a sample of the chunks and scaled to all of them.

    python benchmarks/locate.py --chunks 100000 --prompt-tokens 32000
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cacheblend_rag.locate import ChunkIndex

VOCABULARY = 128_000
SEED = 0
LOST_TOKENS = 2  # at each end of a retrieved chunk, merged by the tokenizer with its surroundings
GLUE_TOKENS = 3
RIVAL_SAMPLE = 1000  # chunks
SINGLE_ADDS = 1000

Ids = NDArray[np.int32]


class Workload(NamedTuple):
    chunks: Ids  # (chunks, tokens)
    prompts: list[list[int]]
    num_pieces: int  # retrieved chunks in each prompt


def make_workload(num_chunks: int, chunk_tokens: int, prompt_tokens: int, prompts: int) -> Workload:
    rng = np.random.default_rng(SEED)
    chunks = rng.integers(0, VOCABULARY, (num_chunks, chunk_tokens), dtype=np.int32)
    # As from a splitter: each chunk repeats the end of the one before. Every tenth begins with the
    # same boilerplate instead.
    overlap = chunk_tokens // 10
    chunks[1:, :overlap] = chunks[:-1, -overlap:]
    chunks[::10, :overlap] = chunks[0, :overlap]
    num_pieces = prompt_tokens // (chunk_tokens - 2 * LOST_TOKENS + GLUE_TOKENS)
    return Workload(
        chunks,
        [make_prompt(rng, chunks, num_pieces, prompt_tokens) for _ in range(prompts)],
        num_pieces,
    )


def make_prompt(
    rng: np.random.Generator, chunks: Ids, num_pieces: int, prompt_tokens: int
) -> list[int]:
    retrieved = rng.choice(len(chunks), num_pieces, replace=num_pieces > len(chunks))
    parts = []
    for row in retrieved:
        parts += [
            chunks[row, LOST_TOKENS:-LOST_TOKENS],
            rng.integers(0, VOCABULARY, GLUE_TOKENS, dtype=np.int32),
        ]
    question = rng.integers(0, VOCABULARY, prompt_tokens, dtype=np.int32)
    ids: list[int] = np.concatenate([*parts, question])[:prompt_tokens].tolist()
    return ids


def seconds(run: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure_build(index: ChunkIndex, chunks: Ids) -> dict[str, float]:
    named = [(f"{row:064x}", ids.tolist()) for row, ids in enumerate(chunks)]
    before = resident_bytes()
    build_s = seconds(index.add_many, named)
    return {
        "build_s": build_s,
        "index_mb": index.nbytes / 1e6,
        "index_without_ids_mb": (index.nbytes - chunks.nbytes) / 1e6,
        "resident_growth_mb": (resident_bytes() - before) / 1e6,
    }


def measure_single_adds(index: ChunkIndex, chunk_tokens: int) -> dict[str, float]:
    rng = np.random.default_rng(SEED + 1)
    extra = rng.integers(0, VOCABULARY, (SINGLE_ADDS, chunk_tokens), dtype=np.int32).tolist()
    keys = [f"extra{row}" for row in range(SINGLE_ADDS)]
    add_s = [seconds(index.add, key, ids) for key, ids in zip(keys, extra, strict=True)]
    discard_s = [seconds(index.discard, key) for key in keys]
    return {
        "add_mean_us": sum(add_s) / SINGLE_ADDS * 1e6,
        "add_max_ms": max(add_s) * 1e3,
        "discard_mean_us": sum(discard_s) / SINGLE_ADDS * 1e6,
    }


def measure_locate(index: ChunkIndex, workload: Workload) -> dict[str, float]:
    index.locate(workload.prompts[0])
    timings = [seconds(index.locate, prompt) * 1e3 for prompt in workload.prompts]
    matches = [index.locate(prompt) for prompt in workload.prompts]
    covered = sum(match.end - match.start for found in matches for match in found)
    piece_tokens = workload.chunks.shape[1] - 2 * LOST_TOKENS
    return {
        "locate_median_ms": median(timings),
        "locate_p95_ms": float(np.percentile(timings, 95)),
        "matches_per_prompt": sum(map(len, matches)) / len(matches),
        "coverage": covered / (len(matches) * workload.num_pieces * piece_tokens),
    }


def measure_rival(workload: Workload) -> dict[str, float]:
    rng = np.random.default_rng(SEED + 2)
    num_chunks = len(workload.chunks)
    sample = rng.choice(num_chunks, min(RIVAL_SAMPLE, num_chunks), replace=False)
    needles = [workload.chunks[row, LOST_TOKENS:-LOST_TOKENS].tobytes() for row in sample]
    haystacks = [np.array(prompt, np.int32).tobytes() for prompt in workload.prompts[:3]]

    def find_all(haystack: bytes) -> None:
        for needle in needles:
            haystack.find(needle)

    sample_s = [seconds(find_all, haystack) for haystack in haystacks]
    return {
        "rival_sampled_chunks": len(sample),
        "rival_median_ms_scaled": median(sample_s) * 1e3 * num_chunks / len(sample),
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--chunk-tokens", type=int, default=400)
    parser.add_argument("--prompt-tokens", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=50, help="prompts, all different")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    workload = make_workload(args.chunks, args.chunk_tokens, args.prompt_tokens, args.repeats)
    index = ChunkIndex()
    report: dict[str, object] = {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": cpu_model(),
        "seed": SEED,
        "chunks": args.chunks,
        "chunk_tokens": args.chunk_tokens,
        "prompt_tokens": args.prompt_tokens,
        "chunks_per_prompt": workload.num_pieces,
        "repeats": args.repeats,
        **measure_build(index, workload.chunks),
        **measure_locate(index, workload),
        **measure_single_adds(index, args.chunk_tokens),
        **measure_rival(workload),
    }
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()
