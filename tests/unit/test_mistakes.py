"""What users get wrong in Python raises our own exceptions, which say what to do instead. Those of
the command are in ``test_cli.py``, of a server in ``tests/server``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, install

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.errors import CacheBlendError

pytestmark = pytest.mark.usefixtures("embedded")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    return install(monkeypatch)


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"propagation_lenght": 3}, "Did you mean 'propagation_length'?"),
    "by the command's name": ({"ratio": 0.3}, "it is called 'recompute_ratio'"),
    "a mode": ({"mode": "blen"}, "must be one of blend, full, reuse, off"),
    "a percentage": ({"recompute_ratio": 15}, r"is a share: 0 \(reuse all\) to 1"),
    "a selector": ({"selector": "hkdv"}, "must be one of query, hkvd"),
    "a selector's option": ({"selector_options": {"windw": 3}}, "it has coverage, first_share"),
    "too short": ({"min_chunk_tokens": 3}, "at least 32"),
    "a prefix": ({"ingest_prefix": "system"}, "one of auto, prompt_prefix, document, bos, none"),
    "a list": ({"system_prompt": ["x"]}, "it must be a text, or None"),
    "a size": ({"gpu_cache": "4 apples"}, "Write for example 512MiB, 2GB"),
    "a store": ({"store": 5}, "it must be a text"),
}


@pytest.mark.parametrize(("fields", "says"), CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_configuration(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(CacheBlendError, match=says):
        BlendConfig(**fields)


def test_a_configuration_is_copied_as_any_other_object() -> None:
    config = BlendConfig(selector="first_k", recompute_ratio=0.3)
    assert copy.copy(config) == config
    assert replace(config, recompute_ratio=0.15) == BlendConfig(selector="first_k")


STARTS: dict[str, tuple[Callable[[], Any], str]] = {
    "no model": (lambda: CacheBlend(None), "name a folder"),  # type: ignore[arg-type]
    "no folder": (lambda: CacheBlend("./none"), "There is no model folder './none'"),
    "a table": (
        lambda: CacheBlend(MODEL, config={"mode": "off"}),  # type: ignore[arg-type]
        r"must be a BlendConfig: BlendConfig\(mode='off'\)",
    ),
    "a store's option": (
        lambda: CacheBlend(MODEL, config=BlendConfig(store="file:///kv?capcity=3GB")),
        "capcity",
    ),
    "a store's scheme": (
        lambda: CacheBlend(MODEL, config=BlendConfig(store="ftp://kv")),
        "cannot be opened by ftp://. Use memory://",
    ),
    "no scheme": (lambda: CacheBlend.connect("localhost:8000"), "begins with http://"),
    "a server's table": (
        lambda: CacheBlend.connect("http://localhost:1", config={}),  # type: ignore[arg-type]
        "must be a BlendConfig",
    ),
}


@pytest.mark.parametrize(("start", "says"), STARTS.values(), ids=STARTS.keys())
def test_a_start(start: Callable[[], Any], says: str, engines: list[FakeEngine]) -> None:
    with pytest.raises(CacheBlendError, match=says):
        start()
    assert engines == [], "it is told before a model is loaded"


CALLS: dict[str, tuple[Callable[[CacheBlend], Any], str]] = {
    "a number": (lambda b: b.generate(5), "pass text, chat messages or token ids"),  # type: ignore
    "nothing": (lambda b: b.generate(""), "the prompt is empty"),
    "no role": (lambda b: b.generate([{"content": "x"}]), "give it one"),
    "misspelt": (lambda b: b.generate("x", mod="off"), "Did you mean 'mode'?"),  # type: ignore
    "sampling": (lambda b: b.generate("x", temprature=0), "Did you mean 'temperature'?"),  # type: ignore
    "of the start": (
        lambda b: b.generate("x", ingest_prefix="none"),  # type: ignore[call-overload]
        r"set at start, for all calls: BlendConfig\(ingest_prefix=\.\.\.\)",
    ),
    "a word for a number": (
        lambda b: b.generate("x", max_tokens="many"),  # type: ignore[call-overload]
        "the sampling parameter max_tokens='many'",
    ),
    "a schema": (
        lambda b: b.generate("x", structured_outputs={"jsn": {}}),
        "vLLM refused structured_outputs",
    ),
    "several for a stream": (lambda b: b.stream(["a", "b"]), "pass one text"),  # type: ignore
    "too long": (lambda b: b.generate("word " * 20_000), "Retrieve fewer or shorter chunks"),
    "chunks": (lambda b: b.ingest(["a", 5]), "text 2 of 2"),  # type: ignore[list-item]
    "documents": (lambda b: b.ingest(["a"], documents=["a", "b"]), "give one for each"),
    "a context": (lambda b: b.ingest(["a"], left_context="b"), "ingest_prefix='document'"),
    "tools": (lambda b: b.generate("x", tools=[1]), "must have the form"),  # type: ignore
}


@pytest.mark.parametrize(("call", "says"), CALLS.values(), ids=CALLS.keys())
def test_a_call(call: Callable[[CacheBlend], Any], says: str, engines: list[FakeEngine]) -> None:
    with CacheBlend(MODEL) as blend, pytest.raises(CacheBlendError, match=says):
        call(blend)
