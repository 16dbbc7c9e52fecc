"""How fast does KV come from the memory tier to a GPU, compared with a plain page-locked copy?

Takes chunks out of the store and copies them as the engine does, some layers of each at a time and
without waiting; its rivals copy one page-locked buffer of the same size at once, and the same
chunks from ordinary memory. They take turns, round by round. Without a GPU it is a dry run.

    python benchmarks/store_pinned.py --chunks 16 --tokens 512
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from cacheblend_rag import __version__
from cacheblend_rag.store import ChunkKV, MemoryStore

LAYERS, HEADS, SIZE = 32, 8, 128  # an 8B model: 128 KiB a token in bfloat16
GROUP_BYTES = 96 << 20  # of layers that the engine copies together
WARM_UP = 3
PLAIN, TIER, LOOSE = "page-locked, one copy", "memory tier, as the engine", "ordinary memory"


def rounds_of(
    rivals: dict[str, Callable[[], None]], rounds: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each round of each rival, which take turns; who comes first takes turns too."""
    names = list(rivals)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-WARM_UP, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait()
            started = time.perf_counter()
            rivals[name]()
            wait()
            if number >= 0:
                taken[name].append(time.perf_counter() - started)
    return taken


def copy_by_layers(chunks: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    a_layer = sum(kv_L2NHD[0].numel() * kv_L2NHD.element_size() for kv_L2NHD in chunks)
    group = max(1, min(GROUP_BYTES // a_layer, LAYERS))
    for first in range(0, LAYERS, group):
        for kv_L2NHD, target in zip(chunks, targets, strict=True):
            there = target[first : first + group]
            there.copy_(kv_L2NHD[first : first + group], non_blocking=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    has_gpu = torch.cuda.is_available()
    device, name = "cpu", "no GPU"
    if has_gpu:
        torch.cuda.init()  # the memory tier page-locks where this process uses a GPU
        device, name = "cuda", torch.cuda.get_device_name()
    else:
        print("No GPU here: a dry run within ordinary memory, whose figures mean nothing.")

    def wait() -> None:
        if has_gpu:
            torch.cuda.synchronize()

    shape = (LAYERS, 2, args.tokens, HEADS, SIZE)
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(args.chunks)]
    loose = [torch.full(shape, n, dtype=torch.bfloat16) for n in range(args.chunks)]
    nbytes = sum(kv_L2NHD.numel() * kv_L2NHD.element_size() for kv_L2NHD in loose)
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}", end=", ")
    print(f"Python {platform.python_version()}, cacheblend-rag {__version__}")
    print(f"{args.chunks} chunks of {args.tokens} tokens, {nbytes / 1e6:.0f} MB", end=", ")
    print(f"{args.rounds} rounds, {WARM_UP} more to warm up", flush=True)

    store = MemoryStore(1 << 40)
    for key, kv_L2NHD in zip(keys, loose, strict=True):
        store.put(key, ChunkKV(tuple(range(args.tokens)), 0, kv_L2NHD))
    held = [chunk for chunk in store.get_many(keys).chunks if chunk is not None]
    is_locked = all(chunk.kv_L2NHD.is_pinned() for chunk in held) if has_gpu else False
    print(f"{len(held)} chunks in the memory tier, page-locked: {'yes' if is_locked else 'no'}")

    targets = [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in keys]
    whole = torch.empty(nbytes, dtype=torch.uint8, device=device)
    plain = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=has_gpu)

    def from_plain() -> None:
        whole.copy_(plain, non_blocking=True)

    def from_store() -> None:
        found = [chunk.kv_L2NHD for chunk in store.get_many(keys).chunks if chunk is not None]
        copy_by_layers(found, targets)

    rivals = {PLAIN: from_plain, TIER: from_store, LOOSE: lambda: copy_by_layers(loose, targets)}
    show(rounds_of(rivals, args.rounds, wait), nbytes)
    for target in targets:
        target.fill_(-1)
    from_store()
    wait()
    assert all(bool((target == n).all()) for n, target in enumerate(targets))


def show(taken: dict[str, list[float]], nbytes: int) -> None:
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for title, seconds in medians.items():
        low, high = min(taken[title]), max(taken[title])
        rate, share = nbytes / seconds / 1e9, medians[PLAIN] / seconds
        spread = f"{nbytes / high / 1e9:.1f} to {nbytes / low / 1e9:.1f}"
        print(f"{title:28} median {rate:6.2f} GB/s ({spread})  {share:.1%} of {PLAIN!r}")

    paired = [a / b for a, b in zip(taken[PLAIN], taken[TIER], strict=True)]
    print(f"ratio of medians {medians[PLAIN] / medians[TIER]:.3f}", end=", ")
    print(f"median of the rounds' ratios {statistics.median(paired):.3f} (aim: 0.9)")


if __name__ == "__main__":
    main()
