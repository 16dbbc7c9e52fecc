"""How much of the disk's read speed does the disk tier reach?

Reads the same cold files (dropped from the page cache each time) with the store, which also checks
them, with plain ``readv`` into one buffer, and with fio where it is installed.

    python benchmarks/store_disk.py --folder /data/bench --chunks 32 --tokens 512
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
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


def speed(files: Sequence[Path], cold: bool, work: Callable[[], object], rounds: int) -> float:
    """Median GB/s."""
    total = sum(path.stat().st_size for path in files)
    speeds = []
    for _ in range(rounds):
        if cold:
            drop_from_page_cache(files)
        started = time.perf_counter()
        work()
        speeds.append(total / (time.perf_counter() - started) / 1e9)
    return statistics.median(speeds)


def fio(files: Sequence[Path], threads: int, rounds: int) -> float | None:
    """The same files, each read once in order, by as many jobs."""
    if shutil.which("fio") is None:
        return None
    command = ["fio", "--output-format=json", "--rw=read", "--bs=1M", "--ioengine=psync"]
    command += ["--invalidate=1", "--group_reporting", "--readonly"]
    for job in range(threads):
        names = ":".join(str(path) for path in files[job::threads])
        command += [f"--name=job{job}", f"--filename={names}", "--file_service_type=sequential"]
    speeds = []
    for _ in range(rounds):
        drop_from_page_cache(files)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        job = json.loads(done.stdout)["jobs"][0]["read"]
        speeds.append(job["bw_bytes"] / 1e9)
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; else a temporary one")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        encoding = Encoding(fp8=args.fp8)
        with DiskStore(Path(name) / "kv", namespace="bench", encoding=encoding) as store:
            keys = fill(store, args.chunks, args.tokens)
            files = sorted(Path(name).rglob("*.safetensors"))
            total = sum(path.stat().st_size for path in files)
            print(f"{len(files)} files, {total / 1e6:.0f} MB, {torch.get_num_threads()} threads")
            rows: list[tuple[str, float | None]] = []
            for cold in (True, False):
                state = "cold" if cold else "cached"
                one = speed(files, cold, lambda: [store.get(key) for key in keys], args.rounds)
                rows.append((f"{state}: get, one after another", one))
                many = speed(files, cold, lambda: store.get_many(keys), args.rounds)
                rows.append((f"{state}: get_many", many))
                for threads in (1, 8):
                    raw = speed(
                        files, cold, lambda threads=threads: read_raw(files, threads), args.rounds
                    )
                    rows.append((f"{state}: readv, {threads} at once", raw))
            for threads in (1, 8):
                rows.append((f"cold: fio, {threads} at once", fio(files, threads, args.rounds)))
            for label, found in rows:
                print(f"{label:30} " + ("not installed" if found is None else f"{found:.2f} GB/s"))


if __name__ == "__main__":
    main()
