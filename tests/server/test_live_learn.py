"""A real server that learns from its traffic: nothing is ingested."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_server import LiveServer, live_server
from tiny import WORDS, Words, make_with_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

words = Words(77)


def text(count: int) -> str:
    return " ".join(WORDS[token] for token in words(count))


def serving(
    tiny_models: Path, folder: Path, *more: str
) -> contextlib.AbstractContextManager[LiveServer]:
    options = ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "m"]
    options += ["--store", str(folder / "kv"), "--blend-if", "always", "--ingest-prefix", "bos"]
    options += ["--num-gpu-blocks-override", "512", "--learn", "memory", *more]
    return live_server(make_with_tokenizer("llama", tiny_models), folder, options)


@pytest.fixture(scope="module")
def server(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with serving(tiny_models, tmp_path_factory.mktemp("learning")) as found:
        yield found


def complete(server: LiveServer, prompt: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """The answer, and the report of its request."""
    ours, salt = options.pop("cacheblend", {}), options.pop("salt", None)
    body = {"model": "m", "prompt": prompt, "max_tokens": 6, "temperature": 0}
    body |= {"kv_transfer_params": {"cacheblend": ours}, **({"cache_salt": salt} if salt else {})}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["text"], server.ask("GET", f"/requests/{found['id']}")


def learnt(server: LiveServer) -> int:
    """How many chunks the server learnt so far."""
    return int(server.ask("GET", "")["store"]["learnt_chunks"])


def until_learnt(server: LiveServer, chunks: int, within_s: float = 20) -> None:
    until = time.monotonic() + within_s
    while learnt(server) < chunks:
        assert time.monotonic() < until, (learnt(server), server.log[-3000:])
        time.sleep(0.05)


class Traffic:
    """Prompts over the same texts, in another order each time."""

    def __init__(self, count: int = 6, size: int = 80) -> None:
        self.texts, self.draw = [text(size) for _ in range(count)], random.Random(3)
        orders = [list(order) for order in itertools.permutations(range(count))]
        self.orders = iter(self.draw.sample(orders, min(20, len(orders))))

    def prompt(self) -> str:
        order = next(self.orders)
        parts = "".join(f"{text(2)} {self.texts[n]} " for n in order)
        return f"{text(4)} {parts} {text(12)}"

    def teach(self, server: LiveServer, **options: Any) -> None:
        """Two prompts, and the time that learning takes."""
        before = learnt(server)
        for _ in range(2):
            assert not complete(server, self.prompt(), **options)[1]["tokens_reused"]
        until_learnt(server, before + len(self.texts))


def test_texts_are_reused_in_the_third_prompt(server: LiveServer) -> None:
    traffic = Traffic()
    traffic.teach(server)
    complete(server, traffic.prompt())  # the proof
    _, report = complete(server, traffic.prompt())
    known = report["tokens_reused"] + report["tokens_recomputed"]
    assert report["blended"] and known >= 6 * 80 - 32, report  # but for a block before the question
    state = server.ask("GET", "")
    assert state["config"]["learn"] == "memory" and state["store"]["learnt_bytes"] > 0
    assert state["store"]["chunks"] <= 1, "only the prompt prefix is in the user's store"


def test_at_ratio_1_answers_are_those_of_a_full_prefill(server: LiveServer) -> None:
    traffic = Traffic()
    traffic.teach(server)
    for _ in range(4):
        prompt = traffic.prompt()
        blended, report = complete(server, prompt, cacheblend={"recompute_ratio": 1.0})
        assert report["blended"] and report["tokens_recomputed"] > 400
        plain, off = complete(server, prompt, cacheblend={"mode": "off"})
        assert blended == plain and off["reason"] == "mode"


def test_nothing_is_learnt_from_requests_that_ask_for_no_blend(server: LiveServer) -> None:
    traffic, before = Traffic(), learnt(server)
    for _ in range(4):
        complete(server, traffic.prompt(), cacheblend={"mode": "off"})
    time.sleep(1.5)
    assert learnt(server) == before
    assert not complete(server, traffic.prompt())[1]["blended"]


def test_nothing_is_learnt_across_salts(server: LiveServer) -> None:
    traffic, before = Traffic(), learnt(server)
    for salt in ("one", "two", None):
        assert not complete(server, traffic.prompt(), salt=salt)[1]["blended"]
    time.sleep(1.5)
    assert learnt(server) == before, "each saw the texts once"
    complete(server, traffic.prompt(), salt="one")
    until_learnt(server, before + 6)
    assert complete(server, traffic.prompt(), salt="one")[1]["blended"]
    assert not complete(server, traffic.prompt(), salt="three")[1]["blended"]
    assert not complete(server, traffic.prompt(), salt="four")[1]["blended"]


@pytest.mark.slow
def test_a_tenant_teaches_itself_only(tiny_models: Path, tmp_path: Path) -> None:
    """Through two API processes, one of which has computed what was learnt."""
    keys = tmp_path / "tenants.toml"
    keys.write_text('"sk-red" = "red"\n"sk-blue" = "blue"\n')
    more = ("--tenants", str(keys), "--api-server-count", "2")
    traffic = Traffic()
    with serving(tiny_models, tmp_path, *more) as server:

        def blends(tenant: str) -> bool:
            server.client.headers["Authorization"] = f"Bearer sk-{tenant}"
            return bool(complete(server, traffic.prompt())[1]["blended"])

        def chunks(tenant: str) -> int:
            server.client.headers["Authorization"] = f"Bearer sk-{tenant}"
            return int(server.ask("GET", "")["chunks"])

        assert not blends("red") and not blends("blue") and not blends("red")
        until = time.monotonic() + 60
        while chunks("red") < 6:
            assert time.monotonic() < until, server.log[-3000:]
            time.sleep(0.2)
        assert chunks("blue") == 0
        assert blends("red") and not blends("blue")
