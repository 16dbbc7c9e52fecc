"""A real server of tenants that computes some of its answers again, and moves ratios by that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from tiny import WORDS, Words, make_with_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

words = Words(91)


def text(count: int) -> str:
    return " ".join(WORDS[token] for token in words(count))


TEXTS = [text(80) for _ in range(3)]


@pytest.fixture(scope="module")
def server(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("shadow")
    keys = folder / "tenants.toml"
    keys.write_text('"sk-red" = "red-of-acme"\n"sk-blue" = "blue-of-acme"\n')
    options = ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "m"]
    options += ["--store", str(folder / "kv"), "--blend-if", "always", "--ingest-prefix", "bos"]
    options += ["--num-gpu-blocks-override", "512", "--tenants", str(keys)]
    options += ["--shadow", "1", "--recompute-ratio", "auto", "--changed-allowed", "0.05"]
    with live_server(make_with_tokenizer("llama", tiny_models), folder, options) as found:
        for tenant in ("red", "blue"):
            act(found, tenant)
            job = found.ask("POST", "/ingestions", json={"chunks": TEXTS, "wait": True})
            assert job["status"] == "completed"
        yield found


def act(server: LiveServer, tenant: str) -> None:
    server.client.headers["Authorization"] = f"Bearer sk-{tenant}"


def complete(server: LiveServer, **options: Any) -> tuple[str, dict[str, Any]]:
    """The request's name and report; its prompt is another each time."""
    prompt = f"{text(9)} {' '.join(TEXTS)} {text(14)}"
    body: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    body["kv_transfer_params"] = {"cacheblend": {"template": "answers", **options}}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    name = answer.json()["id"]
    return name, server.ask("GET", f"/requests/{name}")


def shadowed(server: LiveServer, name: str, within_s: float = 30) -> dict[str, Any]:
    until = time.monotonic() + within_s
    while True:
        found: dict[str, Any] = server.ask("GET", f"/requests/{name}")["shadow"]
        if found["state"] != "waiting":
            return found
        assert time.monotonic() < until, server.log[-3000:]
        time.sleep(0.1)


def until_off(server: LiveServer) -> list[float]:
    """The ratios of a template's requests, until it is not blended."""
    ratios = []
    for _ in range(12):
        name, report = complete(server)
        if report["reason"] == "changed_too_often":
            return ratios
        assert report["blended"], report
        ratios.append(report["recompute_ratio"])
        assert shadowed(server, name)["changed"]
    raise AssertionError(ratios)


def test_answers_are_computed_again_and_ratios_follow(server: LiveServer) -> None:
    act(server, "red")
    complete(server)  # the proof
    exact, report = complete(server, recompute_ratio=1.0)
    assert report["blended"] and report["shadow"]["template"] == "answers"
    found = shadowed(server, exact)
    assert found["state"] == "done" and found["tokens"] == 8
    assert found["kl"] < 1e-4 and found["agreement"] == 1 and not found["changed"]
    # a random model, which no ratio of the ladder suits
    ratios = until_off(server)
    assert ratios and set(ratios) == {0.5}  # where it begins, and the last step


def test_tenants_are_steered_apart_and_not_named(server: LiveServer) -> None:
    act(server, "blue")
    name, report = complete(server)
    assert report["blended"] and report["recompute_ratio"] == 0.5, "what red's answers showed"
    assert shadowed(server, name)["state"] == "done"
    act(server, "red")
    assert server.client.get(f"/v1/cacheblend/requests/{name}").status_code == 404
    metrics = server.client.get("/metrics").text
    lines = [line for line in metrics.splitlines() if line.startswith("cacheblend_shadow_kl_count")]
    namespaces = {line.partition('namespace="')[2].partition('"')[0] for line in lines}
    assert len(namespaces) == 2 and all(len(name) == 16 for name in namespaces)
    assert "acme" not in metrics and 'template="answers"' in lines[0]
