"""The proxy in front of two real servers that share a store; one of them is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import ROOT, LiveServer
from servers import RedisServer, free_port
from tiny import WORDS, Words, make_with_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(500)]

words = Words(71)
OPTIONS = ["--dtype", "float32", "--max-model-len", "2048", "--served-model-name", "m"]
OPTIONS += ["--blend-if", "always", "--ingest-prefix", "bos", "--num-gpu-blocks-override", "512"]
KEY = {"authorization": "Bearer root"}


def text(count: int) -> str:
    return " ".join(WORDS[token] for token in words(count))


CHUNKS = [text(70), text(90), text(64)]


class Fleet:
    """Two servers, and the proxy as the command starts it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.redis = RedisServer(folder)
        self.servers = list[LiveServer]()
        for name in ("a", "b"):
            (folder / name).mkdir()
            options = [*OPTIONS, "--store", self.redis.url]
            self.servers.append(LiveServer(model, folder / name, options))
        starting = [threading.Thread(target=server.start) for server in self.servers]
        for thread in starting:
            thread.start()
        for thread in starting:
            thread.join()
        port = free_port()
        replicas = [word for server in self.servers for word in ("--replica", server.url)]
        command = [sys.executable, "-m", "cacheblend_rag", "route", *replicas, "--port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CACHEBLEND_ROUTE_KEY": "root"}
        self.proxy = subprocess.Popen(
            [*command, "--check-every", "0.3"], stderr=subprocess.DEVNULL, env=environment
        )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        until(lambda: self.client.get("/health").status_code == 200, 30)

    def close(self) -> None:
        self.client.close()
        self.proxy.terminate()
        self.proxy.wait(30)
        for server in self.servers:
            server.kill()
            server.client.close()
        self.redis.process.kill()
        self.redis.process.wait()

    def ids(self) -> list[str]:
        """Of replicas, in the order of the servers."""
        return [r["id"] for r in self.state()]

    def state(self) -> list[dict[str, Any]]:
        return list(self.client.get("/route", headers=KEY).json()["replicas"])

    def asked(self, replica: str | None = None) -> dict[str, Any]:
        """The report of a new prompt, through the proxy."""
        body = {"model": "m", "max_tokens": 4, "temperature": 0}
        body["prompt"] = f"{text(3)} {' w3 '.join(CHUNKS)} {text(15)}"
        headers = {} if replica is None else {"x-cacheblend-replica": replica}
        answer = self.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        assert replica in (None, answer.headers["x-cacheblend-replica"])
        report = self.client.get(f"/v1/cacheblend/requests/{answer.json()['id']}")
        assert report.status_code == 200, report.text
        return dict(report.json())


def until(condition: Any, within_s: float) -> None:
    end = time.monotonic() + within_s
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"), make_with_tokenizer("llama", tiny_models))
    yield made
    made.close()


def test_chunks_that_came_through_the_proxy_are_blended_by_both(fleet: Fleet) -> None:
    body = {"chunks": CHUNKS, "wait": True}
    done = fleet.client.post("/v1/cacheblend/ingestions", json=body).json()
    assert done["status"] == "completed" and done["counts"]["computed"] == 3
    for replica in fleet.ids():
        fleet.asked(replica)  # the first blend is a proof
        until(lambda name=replica: fleet.asked(name)["blended"], 3)
    assert [r["models"] for r in fleet.state()] == [["m"], ["m"]]


def test_what_is_forgotten_through_the_proxy_is_gone_from_both(fleet: Fleet) -> None:
    gone = fleet.client.post("/v1/cacheblend/chunks/delete", json={"texts": CHUNKS})
    assert gone.status_code == 200, gone.text
    for replica in fleet.ids():
        until(lambda name=replica: not fleet.asked(name)["tokens_reused"], 3)


def test_one_that_is_killed_ends_its_answer_and_the_other_goes_on(fleet: Fleet) -> None:
    body = {
        "model": "m",
        "prompt": text(40),
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": True,
    }
    second = {"x-cacheblend-replica": fleet.ids()[1]}
    with fleet.client.stream("POST", "/v1/completions", json=body, headers=second) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        fleet.servers[1].kill()
        rest = [line for line in lines if line]
    assert "replica_lost" in rest[-1] and rest[-1].startswith('data: {"error"')
    until(lambda: [r["state"] for r in fleet.state()] == ["up", "down"], 5)
    for _ in range(4):
        fleet.asked()
    refused = fleet.client.post("/v1/completions", json={**body, "stream": False}, headers=second)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "no_replica"
