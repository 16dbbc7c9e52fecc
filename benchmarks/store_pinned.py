"""How fast does KV come from the memory tier to a GPU, compared with a plain page-locked copy?

Copies chunks as the engine does: layer by layer, keys and values of each, without waiting; its
rival copies one page-locked buffer of the same size at once.

    python benchmarks/store_pinned.py --chunks 16 --tokens 512
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable

import torch

from cacheblend_rag.store import ChunkKV, MemoryStore

LAYERS, HEADS, SIZE = 32, 8, 128  # an 8B model: 128 KiB a token in bfloat16


def seconds(work: Callable[[], None], rounds: int) -> float:
    """Median, after two rounds to warm up."""
    taken = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.cuda.init()
    shape = (LAYERS, 2, args.tokens, HEADS, SIZE)
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(args.chunks)]
    store = MemoryStore(1 << 40)
    for n, key in enumerate(keys):
        kv_L2NHD = torch.full(shape, n, dtype=torch.bfloat16)  # pageable, as ingestion makes them
        store.put(key, ChunkKV(tuple(range(args.tokens)), 0, kv_L2NHD))
    loose = [torch.full(shape, n, dtype=torch.bfloat16) for n in range(args.chunks)]
    target = torch.empty(
        (LAYERS, 2, args.chunks * args.tokens, HEADS, SIZE), dtype=torch.bfloat16, device="cuda"
    )
    plain = torch.empty(target.numel(), dtype=torch.bfloat16, pin_memory=True)
    nbytes = target.numel() * 2

    def by_layer(chunks: list[torch.Tensor]) -> None:
        for layer in range(LAYERS):
            for n, kv_L2NHD in enumerate(chunks):
                there = target[layer, :, n * args.tokens : (n + 1) * args.tokens]
                there.copy_(kv_L2NHD[layer], non_blocking=True)

    def copy_plain() -> None:
        target.view(-1).copy_(plain, non_blocking=True)

    def from_store() -> None:
        found = store.get_many(keys)
        by_layer([chunk.kv_L2NHD for chunk in found if chunk is not None])

    rivals: dict[str, Callable[[], None]] = {
        "page-locked, one copy": copy_plain,
        "memory tier, by layer": from_store,
        "pageable, by layer": lambda: by_layer(loose),
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {nbytes / 1e6:.0f} MB")
    rates = {name: nbytes / seconds(work, args.rounds) / 1e9 for name, work in rivals.items()}
    best = rates["page-locked, one copy"]
    for name, rate in rates.items():
        print(f"{name:24} {rate:6.1f} GB/s  {rate / best:.0%}")
    from_store()
    assert target[3, 1, args.tokens, 0, 0] == 1.0


if __name__ == "__main__":
    main()
