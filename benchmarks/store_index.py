"""How long does opening a large store take, and how much memory? And asking what is in it?

Fills a folder with small chunks of many tokens (the index holds keys and tokens, not KV), then
opens and scans it in fresh processes: with its index, and with the index deleted. Then it is asked
for pages of its keys, as a server's `GET /v1/cacheblend/chunks` does. The first one makes the list.
Meanwhile another thread, which wants the interpreter again and again as an engine's steps do, notes
how long it had to wait at most: with the list being made, and with none.

    python benchmarks/store_index.py --chunks 100000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cacheblend_rag.engine.stored import RankStore
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.store import ChunkKV, DiskStore

NAMESPACE, SPACE = "bench-0of1", KeySpace("bench", (1, 2, 3, 4))
PAGES = 100


def fill(folder: Path, chunks: int, tokens: int) -> float:
    os.fsync = lambda descriptor: None  # only here: the files need not survive a power cut
    kv_L2NHD = torch.zeros(1, 2, tokens, 1, 1, dtype=torch.bfloat16)
    started = time.perf_counter()
    with DiskStore(folder, namespace=NAMESPACE) as store:
        for n in range(chunks):
            ids = tuple(range(n, n + tokens))
            store.put(SPACE.key(ids), ChunkKV(ids, len(SPACE.prefix_ids), kv_L2NHD))
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


def ask(folder: Path) -> dict[str, float]:
    """In a process of its own: milliseconds of pages, and the longest that others waited."""
    rank, after = RankStore(DiskStore(folder, namespace=NAMESPACE), lambda key: None), ""
    rank.follower.start(None)
    idle_ms, _ = waits_during(lambda: time.sleep(5))
    wait_ms, first_ms = waits_during(lambda: rank.page(SPACE, "", 100))
    pages = list[float]()
    for _ in range(PAGES):
        started = time.perf_counter()
        after = (rank.page(SPACE, after, 100) or [""])[-1]
        pages.append(1e3 * (time.perf_counter() - started))
    count = rank.count(SPACE)
    rank.close()
    return {
        "chunks": count,
        "first_page_s": round(first_ms / 1e3, 1),
        "slowest_other_page_ms": round(max(pages), 2),
        "longest_wait_ms": round(wait_ms, 1),
        "longest_wait_idle_ms": round(idle_ms, 1),
    }


def waits_during(work: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds: the longest that another thread waited for a turn, and those of ``work``."""
    longest, over = 0.0, threading.Event()

    def loop() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(0.0002)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    other = threading.Thread(target=loop)
    other.start()
    started = time.perf_counter()
    work()
    took = time.perf_counter() - started
    over.set()
    other.join()
    return 1e3 * longest, 1e3 * took


def in_new_process(folder: Path, what: str = "--measure") -> str:
    command = [sys.executable, __file__, what, str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=400, help="of each chunk")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure or args.ask:
        print(json.dumps(measure(args.measure) if args.measure else ask(args.ask)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "kv"
        print(f"filled in {fill(folder, args.chunks, args.tokens):.0f} s")
        size = sum(path.stat().st_size for path in folder.glob("index.sqlite*"))
        print(f"index: {size / 1e6:.0f} MB on disk")
        for _ in range(3):
            print("with its index:   ", in_new_process(folder))
        print("asked for its keys:", in_new_process(folder, "--ask"))
        for path in folder.glob("index.sqlite*"):
            path.unlink()
        print("without its index:", in_new_process(folder))


if __name__ == "__main__":
    main()
