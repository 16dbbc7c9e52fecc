"""Two tenants on one server, whose requests two API processes take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer
from tiny import WORDS, Words, make_with_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

words = Words(57)
Ask = Callable[..., httpx.Response]


def text(count: int) -> str:
    return " ".join(WORDS[token] for token in words(count))


@pytest.fixture(scope="module")
def server(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "tenants.toml").write_text('"sk-red" = "red"\n"sk-blue" = "blue"\n')
    options = ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "m"]
    options += ["--store", str(folder / "kv"), "--blend-if", "always", "--ingest-prefix", "bos"]
    options += ["--num-gpu-blocks-override", "512", "--api-server-count", "2"]
    options += ["--tenants", str(folder / "tenants.toml")]
    found = LiveServer(make_with_tokenizer("llama", tiny_models), folder, options)
    try:
        found.start()
        yield found
    finally:
        found.client.close()
        found.kill()


def asking(server: LiveServer, key: str) -> Ask:
    def ask(method: str, path: str, status: int = 200, **options: Any) -> Any:
        # a connection for each call, so that both processes are asked
        answer = httpx.request(
            method,
            f"{server.url}/v1{path}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
            **options,
        )
        assert answer.status_code == status, (answer.status_code, answer.text)
        return answer.json()

    return ask


def complete(ask: Ask, chunk: str) -> Any:
    body = {"model": "m", "prompt": f"{text(3)} {chunk} {text(20)}", "max_tokens": 3}
    return ask("POST", "/completions", json=body)


def forgets_nothing(blue: Ask, keys: list[str], chunk: str) -> None:
    """Whatever it asks for, by keys, texts and documents of another."""
    assert not blue("DELETE", f"/cacheblend/chunks/{keys[0]}")["deleted"]
    assert not blue("DELETE", "/cacheblend/documents/d")["deleted"]
    gone = blue("POST", "/cacheblend/chunks/delete", json={"ids": keys})
    assert gone["deleted"] == 0
    assert blue("POST", "/cacheblend/chunks/delete", json={"texts": [chunk]})["deleted"] == 0
    assert blue("POST", "/cacheblend/chunks/delete", json={"except_texts": []})["deleted"] == 0
    forged = {"documents": {"e": keys}}
    blue("POST", "/cacheblend/documents", json=forged)
    assert blue("POST", "/cacheblend/documents/delete", json={"documents": ["e"]})["deleted"] == 0


def test_nothing_of_one_reaches_the_other(server: LiveServer) -> None:
    red, blue = asking(server, "sk-red"), asking(server, "sk-blue")
    asking(server, "sk-none")("GET", "/cacheblend", 401)
    chunk, other = text(90), text(80)
    put = {"chunks": [chunk, other], "wait": True}
    job = red("PUT", "/cacheblend/documents/d", json=put)
    assert job["counts"]["computed"] == 2
    for _ in range(4):  # whichever process is asked
        assert red("GET", f"/cacheblend/ingestions/{job['id']}")["status"] == "completed"
        assert red("GET", "/cacheblend/documents/d")["registered"]
        answer = complete(red, chunk)
        assert red("GET", f"/cacheblend/requests/{answer['id']}")["blended"]
        blue("GET", f"/cacheblend/requests/{answer['id']}", 404)
        plain = complete(blue, chunk)
        report = blue("GET", f"/cacheblend/requests/{plain['id']}")
        assert not report["blended"] and report["reason"] == "no_chunk_found"
        red("GET", f"/cacheblend/requests/{plain['id']}", 404)
    blue("GET", f"/cacheblend/ingestions/{job['id']}", 404)
    blue("POST", f"/cacheblend/ingestions/{job['id']}/cancel", 404)
    assert blue("GET", "/cacheblend/ingestions")["data"] == []
    assert blue("GET", "/cacheblend/chunks")["data"] == []
    blue("GET", "/cacheblend/documents/d", 404)
    states = [ask("GET", "/cacheblend") for ask in (red, blue)]
    assert [s["chunks"] for s in states] == [2, 0]
    assert [s["namespace"] for s in states] == ["red", "blue"] and states[0]["store"] == {}
    forgets_nothing(blue, job["keys"], chunk)
    assert red("GET", "/cacheblend")["chunks"] == 2

    # the same texts and names are the other's own
    again = blue("PUT", "/cacheblend/documents/d", json=put)
    assert again["counts"]["computed"] == 2 and not set(again["keys"]) & set(job["keys"])
    assert red("DELETE", "/cacheblend/documents/d")["chunks"] == 2
    assert blue("GET", "/cacheblend")["chunks"] == 2
    answer = complete(blue, chunk)
    assert blue("GET", f"/cacheblend/requests/{answer['id']}")["blended"]
    blue("POST", "/completions", 400, json={"kv_transfer_params": {"cacheblend": {"space": "x"}}})
    blue("POST", "/chat/completions/batch", 403, json={})
    body = {"model": "m", "prompt": f"{text(3)} {chunk} w9 {text(60)}", "max_tokens": 3}
    first = red("POST", "/completions", json=body)
    second = blue("POST", "/completions", json={**body, "kv_transfer_params": None})
    cached = second["usage"]["prompt_tokens_details"]
    report = blue("GET", f"/cacheblend/requests/{second['id']}")
    assert report["tokens_prefix_cached"] == 0, "red's blocks are not blue's"
    assert first and cached
