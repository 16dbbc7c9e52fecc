"""How much memory a CPU engine takes for prompt lengths that it has not seen before.

    python benchmarks/memory.py products --lengths 200
    python benchmarks/memory.py plain [--lengths 30] [--model DIR]
    python benchmarks/memory.py blend [--lengths 30]
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=256 python benchmarks/memory.py products --give-back

`plain` is vLLM without our connector, `blend` is CacheBlend, which blends each prompt. Both are
asked the same prompts, one at a time, in this process: of lengths that are new, and of the same
lengths again with other words. What an engine keeps for a length, it takes in the first of the two
only. What it leaks by request, it takes in both. `products` is no engine: only the operation that
vLLM multiplies matrices by on such a CPU, with as many rows as the prompts have tokens.

Linux with glibc only. `in use` is what programs hold of the heap, `kept` what the C library keeps
of what they gave back, `code` are pages that were written to be executed. `--give-back` has free
memory given back to the system before each row, as `engine/heap.py` does once a minute.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cacheblend_rag.models import resolve_model

PASSAGES, PASSAGE_TOKENS, FIRST_TOKENS = 8, 96, 20
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 16, "block_size": 32,
    "num_gpu_blocks_override": 384,
}  # fmt: skip
Ask = Callable[[Sequence[int]], object]


class Memory(NamedTuple):
    """MiB of this process."""

    resident: float
    in_use: float
    kept: float
    code: float


class _Mallinfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``: bytes in mapped blocks, in use and free are the ones told."""

    _fields_ = [(f"field_{n}", ctypes.c_size_t) for n in range(10)]


def memory() -> Memory:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    heap = mallinfo()
    code = resident = 0
    is_code = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ (\d+)", line):
            is_code = "x" in head[1] and head[2] == "0"
        elif line.startswith("Rss:"):
            kib = int(line.split()[1])
            resident, code = resident + kib, code + kib * is_code
    mib = 1 << 20
    mapped, in_use, free = heap.field_4 / mib, heap.field_7 / mib, heap.field_8 / mib
    return Memory(resident / 1024, in_use + mapped, free, code / 1024)


def prompts(lengths: Sequence[int], passages: Sequence[Sequence[int]], seed: str) -> list[Any]:
    """A passage or two, and a question of so many tokens."""
    draw = random.Random(seed)
    found = []
    for length in lengths:
        chosen = draw.sample(list(passages), 1 + length % 2)
        words = [draw.randrange(1000, 40000) for _ in range(length)]
        found.append([*(token for passage in chosen for token in passage), *words])
    return found


def products(model: Path, passages: Sequence[Sequence[int]]) -> Ask:
    """The four matrix products of a layer of SmolLM2-135M, by vLLM's own operation."""
    import torch
    import vllm._C  # noqa: F401  (it registers the operation)
    from vllm._custom_ops import create_onednn_mm, onednn_mm

    shapes = [(576, 960), (576, 576), (576, 3072), (1536, 576)]
    handlers = [(size, create_onednn_mm(torch.randn(size, width), 32)) for size, width in shapes]

    def ask(ids: Sequence[int]) -> None:
        for size, handler in handlers:
            onednn_mm(handler, torch.randn(len(ids), size), None)

    return ask


def plain(model: Path, passages: Sequence[Sequence[int]]) -> Ask:
    """vLLM alone."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), enable_prefix_caching=False, **OPTIONS)
    one = SamplingParams(max_tokens=1, temperature=0)
    return lambda ids: llm.generate({"prompt_token_ids": list(ids)}, one, use_tqdm=False)


def blend(model: Path, passages: Sequence[Sequence[int]]) -> Ask:
    """Ours: a blend each, with stored passages."""
    from cacheblend_rag import BlendConfig, CacheBlend

    config = BlendConfig(blend_if="always", ingest_prefix="bos")
    engine = CacheBlend(str(model), config=config, engine="batch", **OPTIONS)
    engine.ingest([list(passage) for passage in passages], progress=False)

    def ask(ids: Sequence[int]) -> None:
        report = engine.generate(list(ids), max_tokens=1, temperature=0.0).report
        assert report.blended, report.reason

    return ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("products", "plain", "blend"))
    parser.add_argument("--lengths", type=int, default=30)
    parser.add_argument("--model")
    parser.add_argument("--give-back", action="store_true")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all of it in this process
    draw = random.Random("passages")
    passages = [
        [draw.randrange(1000, 40000) for _ in range(PASSAGE_TOKENS)] for _ in range(PASSAGES)
    ]
    start = {"products": products, "plain": plain, "blend": blend}[args.what]
    ask = start(Path(resolve_model(args.model)), passages)
    for ids in prompts([900, 901], passages, "warm-up"):
        ask(ids)
    print(f"{args.what}, {args.lengths} lengths; MiB")
    print("prompts".ljust(20), *(name.rjust(9) for name in (*Memory._fields, "seconds")))
    print("none".ljust(20), *(f"{part:9.0f}" for part in memory()), flush=True)
    for begin in (FIRST_TOKENS, FIRST_TOKENS + args.lengths):
        lengths = list(range(begin, begin + args.lengths))
        for name in ("new lengths", "the same again"):
            began = time.perf_counter()
            for ids in prompts(lengths, passages, f"{name} {begin}"):
                ask(ids)
            took = time.perf_counter() - began
            if args.give_back:
                ctypes.CDLL(None).malloc_trim(0)
            numbers = (*memory(), took)
            print(name.ljust(20), *(f"{part:9.0f}" for part in numbers), flush=True)


if __name__ == "__main__":
    main()
