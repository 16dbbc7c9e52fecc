"""A Ray cluster on this machine, over one Valkey."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from servers import RedisServer
from tiny import VOCAB

from cacheblend_rag.errors import PromptError
from cacheblend_rag.ingest import IngestReport
from ray_cacheblend.ingestion import Step

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


class Noting(Step):
    """A worker without an engine, whose keys are the texts; one of them is no text to it."""

    def _open(self) -> Any:
        def ingest(given: list[str], **options: Any) -> IngestReport:
            if "bad" in given:
                raise PromptError("this is no text")
            return IngestReport(chunks=len(given), computed=len(given), keys=given)

        check = SimpleNamespace(passed=True, detail="")
        return SimpleNamespace(model_check=check, ingest=ingest, close=lambda: None)


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


class Replica:
    """One replica of an app, by its actor: to ask it and no other."""

    def __init__(self, ray: Any, name: str) -> None:
        self.name, self._ray = name, ray
        self._actor = ray.get_actor(name, namespace="serve")

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and answer of one of our endpoints."""
        from ray.serve._private.common import RequestMetadata

        name = f"test-{uuid.uuid4()}"
        metadata = RequestMetadata(request_id=name, internal_request_id=name, call_method="relay")
        content = b"" if body is None else json.dumps(body).encode()
        asked = (method, f"/v1/cacheblend{path}", [("content-type", "application/json")], content)
        reply = self._ray.get(self._actor.handle_request.remote(pickle.dumps(metadata), asked))
        return reply[0], json.loads(reply[2])

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a request that no router has a say in."""
        from ray.serve._private.common import RequestMetadata
        from ray.serve.llm.openai_api_models import CompletionRequest

        name = f"test-{uuid.uuid4()}"
        metadata = RequestMetadata(
            request_id=name,
            internal_request_id=name,
            call_method="completions",
            is_streaming=True,
        )
        method = self._actor.handle_request_streaming.options(num_returns="streaming")
        stream = method.remote(pickle.dumps(metadata), CompletionRequest(**body), None)
        [found] = [self._ray.get(item) for item in stream]
        return dict(found.model_dump())


def replicas(ray: Any, deployment: str) -> list[Replica]:
    """Those that are alive, in order of their names."""
    named = (row["name"] for row in ray.util.list_named_actors(all_namespaces=True))
    found = sorted(n for n in named if n.startswith("SERVE_REPLICA::") and deployment in n)
    return [Replica(ray, name) for name in found]


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
