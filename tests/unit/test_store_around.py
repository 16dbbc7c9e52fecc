"""A store around another one hands on what it does not change."""

from __future__ import annotations

import pytest
from chunks import chunk_of

from cacheblend_rag.store.base import KVStore
from cacheblend_rag.store.learnt import LearningStore
from cacheblend_rag.store.memory import MemoryStore
from cacheblend_rag.store.part import PartStore
from cacheblend_rag.store.write_back import WriteBackStore


@pytest.mark.parametrize(
    ("kind", "made_of_others"),
    [
        (PartStore, {"forget", "gc"}),
        (LearningStore, {"forget", "gc"}),
        (WriteBackStore, {"forget", "gc", "drop"}),
    ],
)
def test_all_that_a_store_does_is_passed_on(kind: type[KVStore], made_of_others: set[str]) -> None:
    """A new method of the contract would else do nothing behind such a store."""
    public = {name for name in vars(KVStore) if not name.startswith("_")}
    left_alone = {name for name in public if getattr(kind, name) is getattr(KVStore, name)}
    assert left_alone == made_of_others


def test_documents_of_a_store_that_is_written_later() -> None:
    with WriteBackStore(MemoryStore(1 << 20)) as store:
        store.put("a" * 64, chunk_of(1))
        store.register("ships", ["a" * 64])
        assert store.document_keys("ships") == ["a" * 64]
        assert store.forget("ships") == 1
        assert not store.contains("a" * 64) and not store.document_keys("ships")
