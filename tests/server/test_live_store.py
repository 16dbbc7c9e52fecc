"""A real server whose chunk store is full, is removed, or goes away and comes back."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, live_server
from servers import RedisServer
from tiny import WORDS, Words, make_with_tokenizer

from cacheblend_rag import CacheBlend
from cacheblend_rag.errors import UnavailableError

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

words = Words(63)
OPTIONS = ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "m"]
OPTIONS += ["--blend-if", "always", "--ingest-prefix", "bos", "--num-gpu-blocks-override", "512"]


def text(count: int) -> str:
    return " ".join(WORDS[token] for token in words(count))


CHUNKS = [text(70), text(90), text(64)]


def ingested(server: LiveServer, chunks: list[str]) -> Any:
    return server.ask("POST", "/ingestions", json={"chunks": chunks, "wait": True})


def answered(server: LiveServer, prompt: str, mode: str) -> tuple[str, Any]:
    body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    body["kv_transfer_params"] = {"cacheblend": {"mode": mode}}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["text"], server.ask("GET", f"/requests/{found['id']}")


def asked(server: LiveServer) -> Any:
    """The report of a new prompt with the chunks; without a blend, the answer is the exact one."""
    prompt = f"{text(3)} {' w3 '.join(CHUNKS)} {text(15)}"
    said, report = answered(server, prompt, "blend")
    exact, _ = answered(server, prompt, "off")
    assert report["blended"] or said == exact
    return report


def wrong(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, (answer.status_code, answer.text)
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    command = ["mount", "-t", "tmpfs", "-o", f"size={14 << 20}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_then_a_folder_that_is_gone(
    small_disk: Path, tiny_models: Path, tmp_path: Path
) -> None:
    model, kv = make_with_tokenizer("llama", tiny_models), small_disk / "kv"
    with live_server(model, tmp_path, [*OPTIONS, "--store", str(kv)]) as server:
        assert ingested(server, CHUNKS)["counts"]["computed"] == 3
        assert asked(server)["blended"]

        job = ingested(server, [text(200) for _ in range(400)])
        assert job["status"] == "failed" and "Free disk space" in job["error"]["message"]
        assert 0 < job["counts"]["computed"] < 100 and job["counts"]["remaining"] > 300
        later = server.ask("POST", "/ingestions", json={"chunks": [text(200)]})
        assert server.ended(later["id"])["status"] == "failed"
        assert asked(server)["blended"]
        state = server.ask("GET", "")
        assert state["blending"]["on"] and state["chunks"] == state["store"]["chunks"] > 3
        gone = server.ask("POST", "/chunks/delete", json={"except_texts": CHUNKS})
        assert gone["deleted"] == state["chunks"] - 3
        job = ingested(server, [text(90)])
        assert job["status"] == "completed" and job["counts"]["computed"] == 1

        shutil.rmtree(kv)
        assert asked(server)["reason"] == "chunks_missing"
        assert ingested(server, CHUNKS)["counts"]["computed"] == 3
        assert asked(server)["blended"]

        shutil.rmtree(small_disk / "kv-serve")
        answer = server.client.post("/v1/cacheblend/ingestions", json={"chunks": [text(90)]})
        error = wrong(answer, 503)
        assert error["code"] == "state_unavailable" and "start the server anew" in error["message"]
        assert asked(server)["blended"]
        assert server.stop() == 0
        server.start()
        assert asked(server)["blended"]
        assert ingested(server, [text(90)])["counts"]["computed"] == 1


def test_redis_that_goes_away_and_comes_back(tiny_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    redis = RedisServer(folder)
    options = [*OPTIONS, "--store", redis.url, "--state", str(tmp_path / "jobs")]
    try:
        with live_server(make_with_tokenizer("llama", tiny_models), tmp_path, options) as server:
            assert ingested(server, CHUNKS)["counts"]["computed"] == 3
            assert asked(server)["blended"]
            redis.kill()
            assert not asked(server)["blended"]
            for method, path in (("GET", "/chunks"), ("DELETE", f"/chunks/{'ab' * 32}")):
                answer = server.client.request(method, f"/v1/cacheblend{path}")
                assert wrong(answer, 503)["code"] == "store_unavailable"
            state = server.ask("GET", "")
            assert state["blending"]["on"] and state["chunks"] is None and state["store_error"]
            with CacheBlend.connect(server.url) as remote:
                assert remote.generate(text(9), max_tokens=2).token_ids
                with pytest.raises(UnavailableError, match="store"):
                    remote.stats()
            job = ingested(server, [text(80)])
            assert job["status"] == "failed" and job["error"]["code"] == "store_unavailable"
            redis.start()
            deadline = time.monotonic() + 5
            while server.ask("GET", "")["store_error"] is not None:
                assert time.monotonic() < deadline, "the store is back and not asked"
                time.sleep(0.1)
            done = ingested(server, CHUNKS)
            assert done["counts"]["computed"] + done["counts"]["present"] == 3
            assert server.ask("GET", "")["store_error"] is None
            assert asked(server)["blended"]
    finally:
        redis.kill()
