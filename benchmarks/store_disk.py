"""How much of the disk's read speed does the disk tier reach?

Reads the same cold files (dropped from the page cache each time) with the store, which also checks
them, with plain ``readv`` into one buffer, and with fio where it is installed. They take turns,
round by round, in an order by chance: a disk's speed changes, also with what was just read. Before
each turn as much memory is used and freed as the chunks need: a virtual machine may hand memory
that lies unused back to its host, and wait longer to get it again than for the disk. fio, which
fills one small buffer over and over, never waits for that; the first line says what it costs here.

    python benchmarks/store_disk.py --folder /data/bench --chunks 32 --tokens 512
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cacheblend_rag.store import ChunkKV, DiskStore, Encoding
from cacheblend_rag.store.host import empty
from cacheblend_rag.store.source import PAGE

LAYERS, HEADS, SIZE = 32, 8, 128  # an 8B model: 128 KiB a token in bfloat16


def fill(store: DiskStore, chunks: int, tokens: int) -> list[str]:
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(chunks)]
    for n, key in enumerate(keys):
        bits = torch.randint(0, 30_000, (LAYERS, 2, tokens, HEADS, SIZE), dtype=torch.int16)
        store.put(key, ChunkKV(tuple(range(n, n + tokens)), 0, bits.view(torch.bfloat16)))
    return keys


def drop_from_page_cache(files: Sequence[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(files: Sequence[Path], threads: int) -> None:
    def read(path: Path) -> None:
        buffer = bytearray(path.stat().st_size)
        left = memoryview(buffer)
        with path.open("rb", buffering=0) as file:
            while left:
                left = left[file.readinto(left) :]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, files))


def use_memory(nbytes: Sequence[int]) -> None:
    """Use and free as many bytes as are about to be needed, in as large pieces."""
    pieces = [empty((size,), torch.uint8) for size in nbytes]
    for piece in pieces:
        piece[::PAGE] = 1


def seconds_of(work: Callable[[], float | None]) -> float:
    """What ``work`` says it took, or else what it did take."""
    started = time.perf_counter()
    measured = work()
    return time.perf_counter() - started if measured is None else measured


def fio(files: Sequence[Path], threads: int, block: int) -> float:
    """Seconds that fio needs for the same files, each read once in order, by as many jobs, each
    with one buffer of ``block`` bytes; without its start.
    """
    command = ["fio", "--output-format=json", "--rw=read", f"--bs={block}", "--ioengine=psync"]
    command += ["--invalidate=1", "--group_reporting", "--readonly", "--thread"]
    for job in range(threads):
        names = ":".join(str(path) for path in files[job::threads])
        command += [f"--name=job{job}", f"--filename={names}", "--file_service_type=sequential"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["runtime"]) / 1e3


def fio_version() -> str:
    done = subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else a temporary one")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    has_fio = shutil.which("fio") is not None
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        encoding = Encoding(fp8=args.fp8)
        with DiskStore(Path(name) / "kv", namespace="bench", encoding=encoding) as store:
            keys = fill(store, args.chunks, args.tokens)
            files = sorted(Path(name).rglob("*.safetensors"))
            total, size = sum(path.stat().st_size for path in files), files[0].stat().st_size
            print(f"{len(files)} files, {total / 1e6:.0f} MB, {args.rounds} rounds", end=", ")
            print(f"{fio_version() if has_fio else 'no fio'}, torch {torch.__version__}")

            sizes = [path.stat().st_size for path in files]
            for state in ("left alone for 10 s", "just used"):
                if state != "just used":
                    time.sleep(10)
                rate = total / seconds_of(lambda: use_memory(sizes)) / 1e9
                print(f"memory {state} is ready at {rate:.2f} GB/s")

            def one_by_one() -> None:
                for key in keys:
                    store.get(key)

            def at_once() -> None:
                store.get_many(keys)

            for threads, ours in ((1, one_by_one), (8, at_once)):
                rivals: dict[str, Callable[[], float | None]] = {
                    "store": ours,
                    "readv": lambda threads=threads: read_raw(files, threads),  # type: ignore[misc]
                }
                if has_fio:
                    for title, block in (
                        ("fio, whole files", size),
                        ("fio, 1 MiB blocks", 1 << 20),
                    ):
                        rivals[title] = lambda t=threads, b=block: fio(files, t, b)  # type: ignore[misc]
                for cold in (True, False):
                    compare(rivals, files, cold, args.rounds, f"{threads} at once")


def compare(
    rivals: dict[str, Callable[[], float | None]],
    files: Sequence[Path],
    cold: bool,
    rounds: int,
    title: str,
) -> None:
    """Let them take turns and print the medians; fio reads cold files only."""
    names = [name for name in rivals if cold or not name.startswith("fio")]
    total = sum(path.stat().st_size for path in files)
    taken: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(1)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            if cold:
                drop_from_page_cache(files)
            use_memory([path.stat().st_size for path in files])
            taken[name].append(seconds_of(rivals[name]))
    state = "cold" if cold else "cached"
    for name in names:
        rate = total / statistics.median(taken[name]) / 1e9
        low, high = (total / edge(taken[name]) / 1e9 for edge in (max, min))
        pairs = [other / ours for ours, other in zip(taken["store"], taken[name], strict=True)]
        share = "" if name == "store" else f"  store / {name}: {statistics.median(pairs):.1%}"
        print(f"{state}, {title}: {name:17} {rate:.2f} GB/s ({low:.2f} to {high:.2f}){share}")


if __name__ == "__main__":
    main()
