"""A Ray cluster on this machine, over one Valkey."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from servers import RedisServer
from tiny import VOCAB

ROOT = Path(__file__).parents[2]
ENGINE = {  # of a tiny model
    "dtype": "float32",
    "max_model_len": 1024,
    "num_gpu_blocks_override": 512,
    "enforce_eager": True,
    "block_size": 32,
}


def texts(count: int, seed: int, size: int = 40) -> list[str]:
    """Of words that are a tiny model's tokens, no two of them alike."""
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(3, VOCAB)}" for _ in range(size)) for _ in range(count)]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Any]:
    """Ray, its processes finding this checkout and its plugins."""
    from live_server import entry_points

    paths = [entry_points(folder / "plugins"), ROOT, ROOT / "kernels", ROOT / "integrations"]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, [*paths, ROOT / "tests" / "helpers"]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    # Replicas take two CPUs each as Ray counts them, and the ingress some. It keeps a process for
    # each CPU that it was given.
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def stored(server: RedisServer) -> Counter[str]:
    """How often each chunk was put into a Valkey, by its feed of changes; those that are there."""
    import redis

    with redis.Redis.from_url(server.url) as client:
        there = {name.decode().rpartition("/")[2] for name in client.scan_iter(count=1000)}
        found: Counter[str] = Counter()
        for name in client.scan_iter(_type="stream"):
            for _, fields in client.xrange(name):
                found.update(fields.get(b"put", b"").decode().split())
    return Counter({key: count for key, count in found.items() if key in there})


def processes(title: str) -> list[psutil.Process]:
    """Actors of this machine by what Ray writes into their title."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if line.startswith("ray::") and title in line:
            found.append(process)
    return found


def kill(process: psutil.Process) -> None:
    """As the kernel does when memory runs out."""
    with contextlib.suppress(psutil.NoSuchProcess):
        os.kill(process.pid, signal.SIGKILL)


def until(condition: Callable[[], bool], within_s: float, step_s: float = 0.05) -> float:
    """Wait; how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, "it did not come about"
        time.sleep(step_s)
    return round(time.monotonic() - started, 2)
