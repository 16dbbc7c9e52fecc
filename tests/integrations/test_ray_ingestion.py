"""Workers of Ray Data without Ray: what they do with a batch, and what is refused beforehand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cacheblend_rag import BlendConfig
from cacheblend_rag.errors import (
    CacheBlendError,
    ConfigError,
    EngineDeadError,
    EngineError,
    MissingExtraError,
    ModelError,
    PromptError,
    StoreError,
)
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.reason import Reason
from ray_cacheblend import HttpIngestor, Ingestor, ingest
from ray_cacheblend.command import _cause, ingest_texts
from ray_cacheblend.ingestion import COUNTS, _digest, _step, _with_group


class Blend:
    """In the place of an engine: its store has no room for ``full``."""

    refusal, dies = "", 0
    made: list[Blend]

    def __init__(self) -> None:
        self.made.append(self)
        self.closed = False
        self.calls: list[dict[str, Any]] = []
        self.model_check = SimpleNamespace(passed=not self.refusal, detail=self.refusal)

    def close(self) -> None:
        self.closed = True

    def ingest(self, texts: Sequence[Any], **options: Any) -> IngestReport:
        if len(self.made) <= self.dies:
            raise EngineDeadError("it ended")
        self.calls.append({"texts": texts, **options})
        if self.refusal:
            return IngestReport(chunks=len(texts), reason=Reason.HYBRID, detail=self.refusal)
        keys = ["" if text == "short" else f"k-{text}" for text in texts]
        return IngestReport(
            chunks=len(texts),
            computed=len(set(texts)) - ("short" in texts),
            too_short=list(texts).count("short"),
            not_stored={"k-full": "no room"} if "full" in texts else {},
            tokens=7,
            keys=keys,
        )


@pytest.fixture
def blend(monkeypatch: pytest.MonkeyPatch) -> type[Blend]:
    kind = type("Fresh", (Blend,), {"made": []})
    monkeypatch.setattr(Ingestor, "_open", lambda self: kind())
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "")
    return kind


def batch(**columns: Sequence[Any]) -> dict[str, Any]:
    return {name: np.array(column, dtype=object) for name, column in columns.items()}


def test_a_batch_comes_back_with_keys_and_counts_that_add_up(blend: type[Blend]) -> None:
    step = Ingestor("m", document="source")
    texts = ["one", "short", "full"]
    done = step(batch(text=texts, source=["a", None, float("nan")], page=[1, 2, 3]))
    assert blend.made[0].calls == [
        {"texts": texts, "documents": ["a", None, None], "left_context": None, "progress": False}
    ]
    assert done["key"].tolist() == ["k-one", "", "k-full"]
    assert done["problem"].tolist() == ["", "", "no room"]
    assert {name: int(done[name].sum()) for name in COUNTS if done[name].any()} == {
        "chunks": 3,
        "computed": 2,
        "too_short": 1,
        "not_stored": 1,
        "tokens": 7,
    }
    assert done["computed"].tolist() == [2, 0, 0]
    assert done["page"].tolist() == [1, 2, 3]
    assert "text" not in done


def test_token_ids_and_what_stands_before_them_are_plain(blend: type[Blend]) -> None:
    step = Ingestor("m", text="ids", left_context="before")
    ids = np.empty(2, dtype=object)
    ids[:] = [np.arange(3), np.arange(4)]
    with pytest.raises(TypeError, match="unhashable"):  # of this test's own engine, behind the call
        step({"ids": ids, "before": np.array(["x", None], dtype=object)})
    assert blend.made[0].calls[0]["texts"] == [[0, 1, 2], [0, 1, 2, 3]]
    assert blend.made[0].calls[0]["left_context"] == ["x", None]


def test_an_empty_batch_counts_nothing(blend: type[Blend]) -> None:
    done = Ingestor("m")(batch(text=[]))
    assert {len(column) for column in done.values()} == {0}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["x"]}, "no column text; it has body"),
        ({"text": ["x"], "key": ["k"]}, "column key, which an ingestion adds; rename"),
    ],
)
def test_columns_that_lack_or_clash_are_refused(
    blend: type[Blend], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Ingestor("m")(batch(**columns))


def test_a_model_that_does_not_blend_ends_the_job(blend: type[Blend]) -> None:
    blend.refusal = "it has no attention"
    with pytest.raises(ModelError, match=r"nothing can be ingested: it has no attention"):
        Ingestor("m")
    assert blend.made[0].closed


def test_an_engine_that_stops_to_blend_ends_the_job(blend: type[Blend]) -> None:
    step = Ingestor("m")
    blend.refusal = "the first blend was wrong"
    with pytest.raises(ModelError, match="any more: the first blend was wrong"):
        step(batch(text=["x"]))


def test_an_engine_that_died_is_started_once_more(blend: type[Blend]) -> None:
    blend.dies = 1
    done = Ingestor("m")(batch(text=["x"]))
    assert done["key"].tolist() == ["k-x"]
    assert [made.closed for made in blend.made] == [True, False]


def test_an_engine_that_dies_again_ends_the_job(blend: type[Blend]) -> None:
    blend.dies = 2
    with pytest.raises(EngineDeadError):
        Ingestor("m")(batch(text=["x"]))


# ---- before anything runs ------------------------------------------------------------------------

STORE = {"store": "redis://host:6379/0"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "give a model, for workers"),
        ({"model": "a/b", "url": "http://x:1"}, ConfigError, "give a model, for workers"),
        ({"url": "http://x:1", "config": {}}, ConfigError, "those of the server"),
        ({"url": "http://x:1", "engine_args": {"dtype": "auto"}}, ConfigError, "of the server"),
        ({"model": "a/b", "config": STORE, "connect": {"api_key": "k"}}, ConfigError, "connect is"),
        ({"model": "a/b"}, ConfigError, "memory://, which ends with each worker"),
        ({"model": "a/b", "config": {"store": "null://"}}, ConfigError, "ends with each worker"),
        ({"model": "a/b", "config": {"stor": "x"}}, ConfigError, "stor"),
        ({"model": "a/b", "config": {"store": "ftp://x"}}, StoreError, "ftp"),
        ({"model": "/no/such", "config": STORE}, ModelError, "/no/such"),
    ],
)
def test_options_are_checked_where_the_job_is_made(
    given: dict[str, Any], error: type[CacheBlendError], message: str
) -> None:
    named = {"model": None, "url": None, "config": None, "engine_args": None, "connect": None}
    with pytest.raises(error, match=message):
        _step(**{**named, **given})


def test_a_step_is_made_of_plain_data() -> None:
    kind, named = _step("a/b", None, BlendConfig(store=STORE["store"]), {"dtype": "auto"}, None)
    assert kind is Ingestor
    assert named["config"]["store"] == STORE["store"]
    assert BlendConfig.of(named["config"], "config") == BlendConfig(store=STORE["store"])
    kind, named = _step(None, "http://x:1", None, None, {"api_key": "k"})
    assert (kind, named) == (HttpIngestor, {"url": "http://x:1", "options": {"api_key": "k"}})


def test_equal_texts_are_of_one_group() -> None:
    rows = batch(text=["a", "b", "a", "\ud800"])
    groups = _with_group(rows, "text")["_cacheblend_group"]
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 3
    assert _digest([1, 2]) == _digest([1, 2]) != _digest([1, 3])
    with pytest.raises(ConfigError, match="no column body; it has text"):
        _with_group(rows, "body")


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "ray" or n.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("without_ray")
def test_without_ray_the_extra_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'cacheblend-rag\[ray\]'"):
        ingest(object(), "a/b", config=STORE)


# ---- the command's part --------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["docs", "./docs", "host", "http://host:1", "local:"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"no address of a Ray cluster.*paths come before it"):
        ingest_texts([], [], address=address, workers=1, model="a/b", config=STORE, engine_args={})


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:99999"])
def test_where_no_cluster_is(address: str) -> None:
    """Ray would try for minutes."""
    named = {"workers": 1, "model": "a/b", "config": STORE, "engine_args": {}}
    with pytest.raises(EngineError, match=r"no Ray cluster at .*ray start --head"):
        ingest_texts([], [], address=address, **named)


def test_what_a_worker_raised_is_raised_here() -> None:
    ours = PromptError("text 3: it is no text")
    around = RuntimeError("a task failed")
    around.__cause__ = ours
    assert _cause(around) is ours
    task = SimpleNamespace(cause=ours, __cause__=None)
    assert _cause(task) is ours  # type: ignore[arg-type]
    assert isinstance(_cause(RuntimeError("no room")), EngineError)
    assert "no room" in str(_cause(RuntimeError("no room")))
