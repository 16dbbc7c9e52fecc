"""How long does opening a large store take, and how much memory?

Fills a folder with small chunks of many tokens (the index holds keys and tokens, not KV), then
opens and scans it in fresh processes: with its index, and with the index deleted.

    python benchmarks/store_index.py --chunks 100000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cacheblend_rag.store import ChunkKV, DiskStore

NAMESPACE = "bench-0of1"


def fill(folder: Path, chunks: int, tokens: int) -> float:
    os.fsync = lambda descriptor: None  # only here: the files need not survive a power cut
    kv_L2NHD = torch.zeros(1, 2, tokens, 1, 1, dtype=torch.bfloat16)
    started = time.perf_counter()
    with DiskStore(folder, namespace=NAMESPACE) as store:
        for n in range(chunks):
            key = hashlib.sha256(str(n).encode()).hexdigest()
            store.put(key, ChunkKV(tuple(range(n, n + tokens)), 4, kv_L2NHD))
    return time.perf_counter() - started


def measure(folder: Path) -> dict[str, float]:
    """In a process of its own: seconds and the growth of peak memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    with DiskStore(folder, namespace=NAMESPACE) as store:
        opened = time.perf_counter() - started
        count = sum(1 for _ in store.scan())
    return {
        "chunks": count,
        "open_s": round(opened, 3),
        "open_and_scan_s": round(time.perf_counter() - started, 3),
        "memory_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1),
    }


def in_new_process(folder: Path) -> str:
    command = [sys.executable, __file__, "--measure", str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=400, help="of each chunk")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "kv"
        print(f"filled in {fill(folder, args.chunks, args.tokens):.0f} s")
        size = sum(path.stat().st_size for path in folder.glob("index.sqlite*"))
        print(f"index: {size / 1e6:.0f} MB on disk")
        for _ in range(3):
            print("with its index:   ", in_new_process(folder))
        for path in folder.glob("index.sqlite*"):
            path.unlink()
        print("without its index:", in_new_process(folder))


if __name__ == "__main__":
    main()
