"""Prefill and decode on different engines: blended KV arrives, and no exact request finds it.

A connector of vLLM's carries the KV. On a CPU that is its ExampleConnector, whose files a helper
gives to the request that was told of them, as NixlConnector does; and NixlConnector itself where
its package is installed.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from disaggregated import Answer, Engine, hand_over, ours
from engines import start_in_process
from servers import free_port
from tiny import Words, make

from cacheblend_rag import BlendConfig
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

words = Words(31)
PREFIX, HEAD, QUESTION = words(4), words(40), words(15)
A, B, C = words(70), words(90), words(64)
EXACT_HEAD = 32  # tokens: the block that holds nothing approximate
WHOLE = 256  # tokens in full blocks of a prompt of three chunks


def prompt(*chunks: tuple[int, ...], first: int = 7) -> tuple[int, ...]:
    return (first, *HEAD, *(t for chunk in chunks for t in (3, *chunk)), *QUESTION)


PROVES, BLENDED, SILENT = prompt(A, B), prompt(B, A, C), prompt(C, A, B, first=8)
SEND: dict[str, Any] = {"do_remote_decode": True, "cacheblend": {"mode": "blend"}}
SEND_EXACT: dict[str, Any] = {"do_remote_decode": True, "cacheblend": {"mode": "off"}}
OFF: dict[str, Any] = {"cacheblend": {"mode": "off"}}

BLENDING = {"ingest_prefix": list(PREFIX), "blend_if": "always", "propagation_length": 0}
PAGE = Path(__file__).parents[2] / "docs" / "fleet.md"

Open = Callable[..., Engine]


@pytest.fixture(scope="module")
def opened(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """What starts an engine, which ends with the module."""
    model, folder = make("llama", tiny_models), tmp_path_factory.mktemp("logs")
    running: list[Engine] = []

    def begin(*connectors: Any, **options: Any) -> Engine:
        log = folder / f"log {len(running)}"
        running.append(Engine(model, *connectors, log=log, **options))
        return running[-1]

    yield begin
    for engine in running:
        engine.close()


@pytest.fixture(scope="module")
def store(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("store"))
    config = BlendConfig(store=url, ingest_prefix=PREFIX)
    with start_in_process(make("llama", tiny_models), config=config) as blend:
        blend.ingest([A, B, C], progress=False)
    return url


class Prefilled(NamedTuple):
    """What an engine that prefills answered; ``params`` go to the one that decodes."""

    blended: Answer
    again: Answer
    silent: Answer
    exact: Answer


def prefill(engine: Engine) -> Prefilled:
    engine.ask((7, *HEAD, *QUESTION), OFF)  # from here on, its prefix cache has the head
    for ids in (PROVES, words(40)):  # what the worker says leaves with a step
        engine.ask(ids, SEND)
    blended, again = engine.ask(BLENDED, SEND), engine.ask(BLENDED, SEND)
    return Prefilled(blended, again, engine.ask(SILENT, SEND), engine.ask(BLENDED, SEND_EXACT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("handed over")


@pytest.fixture(scope="module")
def prefilled(opened: Open, store: str, folder: Path) -> Prefilled:
    engine = opened(ours(store=store, **BLENDING), hand_over(folder), processes=True)
    found = prefill(engine)
    engine.close()
    return found


def test_the_prefilling_engine_says_what_is_blended(prefilled: Prefilled) -> None:
    blended, again, _, exact = prefilled
    assert not blended.is_like(exact)
    told = blended.report["handed_over"]
    assert told["start"] == EXACT_HEAD and told["tag"]
    assert again.report["handed_over"] == told, "it read the same blocks"
    assert again.is_like(blended)
    assert exact.report["handed_over"] == {"start": None, "tag": ""}
    assert exact.report["prefix_cached"] == EXACT_HEAD


def test_without_ours_the_decoding_engine_serves_blended_kv_as_exact(
    opened: Open, prefilled: Prefilled, folder: Path
) -> None:
    """What a connector on that side is for."""
    engine = opened(hand_over(folder))
    assert engine.ask(BLENDED, prefilled.blended.params).is_like(prefilled.blended)
    poisoned = engine.ask(BLENDED)
    assert poisoned.is_like(prefilled.blended) and poisoned.cached >= WHOLE
    engine.close()


def decodes_right(engine: Engine, prefilled: Prefilled) -> None:
    blended, again, silent, exact = prefilled
    arrived = engine.ask(BLENDED, blended.params)
    assert arrived.is_like(blended)
    assert arrived.report["reason"] == Reason.HANDED_OVER
    assert arrived.report["prefix_cached"] == 0

    plain = engine.ask(BLENDED, OFF)
    assert plain.is_like(exact), "blended KV is not found"
    assert plain.report["prefix_cached"] == EXACT_HEAD, "but its exact head is"

    shared = engine.ask(BLENDED, again.params)
    assert shared.is_like(blended) and shared.report["prefix_cached"] >= WHOLE

    params = {name: value for name, value in silent.params.items() if name != "cacheblend"}
    assert engine.ask(SILENT, params).is_like(silent)
    after = engine.ask(SILENT, OFF)
    assert not after.is_like(silent) and after.report["prefix_cached"] == 0, "all of it is hidden"

    assert engine.ask(BLENDED, exact.params).is_like(exact)
    assert engine.ask(BLENDED, OFF).is_like(exact)


def test_blended_kv_arrives_and_no_exact_request_finds_it(
    opened: Open, prefilled: Prefilled, folder: Path
) -> None:
    engine = opened(hand_over(folder), ours(store="null://"))
    decodes_right(engine, prefilled)


@pytest.mark.fleet
@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed")
def test_the_same_through_nixl(opened: Open, store: str) -> None:
    """Both engines live, started as "fleet.md" says: one reads the other's memory."""

    def engine(role: str, url: str, **more: Any) -> Engine:
        whole = of_the_page(role, url)
        whole["kv_connector_extra_config"]["connectors"][0]["kv_connector_extra_config"] |= more
        return opened(whole, VLLM_NIXL_SIDE_CHANNEL_PORT=str(free_port()))

    prefills = engine("kv_producer", store, **BLENDING)
    decodes = engine("kv_consumer", "null://")
    decodes_right(decodes, prefill(prefills))


def of_the_page(role: str, url: str) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config``, by the page's own shell function."""
    [function] = re.findall(r"^both\(\) \{.*?^.*?; \}$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    line = f"{function}\nboth {role} {shlex.quote(url)}"
    told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(told)
    return found
