"""What documents consist of is registered in the chunk store, for engines yet to come."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import start
from tiny import Words, make

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.shared import SharedEngine
from cacheblend_rag.store import MemoryStore

pytestmark = pytest.mark.vllm

words = Words(11)
A, B, C = words(70), words(64), words(41)


def chunks(blend: CacheBlend) -> int:
    return sum(rank["chunks"] for rank in blend.stats())


@pytest.mark.usefixtures("in_process")
def test_a_later_engine_forgets_documents_of_an_earlier_one(
    tiny_models: Path, tmp_path: Path
) -> None:
    model = make("llama", tiny_models)

    def opened(namespace: str = "") -> CacheBlend:
        return start(model, config=BlendConfig(store=f"file://{tmp_path}", namespace=namespace))

    with opened() as blend:
        at_start = chunks(blend)
        a, b, c = blend.ingest([A, B, C], progress=False).keys
        blend.register_documents({"one": [a, b], "two": [b, c]})
        assert chunks(blend) == at_start + 3
    with opened("tenant") as blend:
        assert blend.registered_documents(["one"]) == set()  # another's
        assert blend.forget_documents(["one"]) == 0
    with opened() as blend:
        assert blend.registered_documents(["one", "two", "three"]) == {"one", "two"}
        assert SharedEngine.from_running(blend).forget(["one"]) == 1  # of the two, "two" has one
        assert blend.forget_documents(["two"], [c, a]) == 1
        assert chunks(blend) == at_start + 1
        assert blend.registered_documents(["one", "two"]) == {"two"}
        assert blend.forget_documents(["two"]) == 1
        assert chunks(blend) == at_start


@pytest.mark.usefixtures("in_process")
def test_a_store_without_records_keeps_them_with_the_engine(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryStore, "keeps_documents", False)  # as one that keeps nothing is
    with start(make("llama", tiny_models)) as blend:
        [key] = blend.ingest([A], progress=False).keys
        blend.register_documents({"one": [key]})
        assert blend.registered_documents(["one"]) == {"one"}
        assert blend.forget_documents(["one"]) == 1
        assert blend.registered_documents(["one"]) == set()
