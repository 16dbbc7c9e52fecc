"""Chunks are stored with all their heads; each rank gets its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chunks import key_of

from cacheblend_rag.store import (
    ChunkKV,
    Encoding,
    Heads,
    KVStore,
    MemoryStore,
    open_store,
)

KEY, HEADS = key_of(1), 4
WHOLE = ChunkKV((5, 6, 7), 2, torch.randn(3, 2, 3, HEADS, 8, generator=torch.Generator()))
RANKS = [Heads(0, 2, HEADS), Heads(2, 2, HEADS, leads=False)]


def part(heads: Heads, chunk: ChunkKV = WHOLE) -> ChunkKV:
    kv = chunk.kv_L2NHD[:, :, :, heads.first : heads.first + heads.some].contiguous()
    return ChunkKV(chunk.token_ids, chunk.base, kv)


def of_rank(folder: Path, heads: Heads | None, options: str = "") -> KVStore:
    return open_store(f"file://{folder}{options}", namespace="tiny", heads=heads)


def put(stores: list[KVStore], key: str = KEY) -> None:
    """As an ingestion does: the leading rank has gathered all heads."""
    stores[0].put(key, WHOLE)
    for store, heads in zip(stores[1:], RANKS[1:], strict=True):
        store.put(key, part(heads))


def kv(chunk: ChunkKV | None) -> torch.Tensor:
    assert chunk is not None and chunk.kv_L2NHD.is_contiguous()
    return chunk.kv_L2NHD


@pytest.mark.parametrize("options", ["", "?memory=1MiB"])
def test_ranks_share_one_store_and_get_their_own_heads(tmp_path: Path, options: str) -> None:
    stores = [of_rank(tmp_path, heads, options) for heads in RANKS]
    put(stores)
    for _ in range(2):  # from the file, then from memory
        for store, heads in zip(stores, RANKS, strict=True):
            torch.testing.assert_close(kv(store.get(KEY)), kv(part(heads)), rtol=0, atol=0)
    assert [store.stats().chunks for store in stores] == [1, 1]
    with of_rank(tmp_path, None) as alone:
        torch.testing.assert_close(kv(alone.get(KEY)), kv(WHOLE), rtol=0, atol=0)
        alone.put(key_of(2), WHOLE)
    torch.testing.assert_close(kv(stores[1].get(key_of(2))), kv(part(RANKS[1])), rtol=0, atol=0)
    for store in stores:
        store.discard(KEY)
        assert store.get(KEY) is None
        store.close()


def test_a_rank_that_does_not_lead_writes_no_file(tmp_path: Path) -> None:
    with of_rank(tmp_path, RANKS[1]) as store:
        store.put(KEY, part(RANKS[1]))
        assert store.get(KEY) is None
        assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("url", ["memory://", "file://{}?memory=1MiB"])
def test_memory_holds_a_ranks_own_heads_alone(tmp_path: Path, url: str) -> None:
    for heads in RANKS:
        with open_store(url.format(tmp_path), namespace="tiny", heads=heads) as store:
            memory = getattr(store, "fast", store)
            assert isinstance(memory, MemoryStore)
            for chunk in (WHOLE, part(heads)):
                if heads.leads or chunk is not WHOLE:
                    store.put(KEY, chunk)
                assert memory.stats().nbytes in (0, WHOLE.nbytes // 2)
            torch.testing.assert_close(kv(memory.get(KEY)), kv(part(heads)), rtol=0, atol=0)
            store.discard(KEY)


def test_eight_bits_are_the_same_for_all_ranks(tmp_path: Path) -> None:
    stores = [of_rank(tmp_path, heads, "?dtype=fp8") for heads in (None, *RANKS)]
    stores[0].put(KEY, WHOLE)
    rounded = stores[0].get(KEY)
    assert rounded is not None and Encoding(fp8=True).folder_suffix == "-fp8"
    assert not torch.equal(kv(rounded), kv(WHOLE))
    for store, heads in zip(stores[1:], RANKS, strict=True):
        torch.testing.assert_close(kv(store.get(KEY)), kv(part(heads, rounded)), rtol=0, atol=0)


def test_a_chunk_of_other_heads_is_never_taken_for_a_part(tmp_path: Path) -> None:
    with of_rank(tmp_path, None) as alone:
        alone.put(KEY, part(RANKS[0]))  # as many heads as a rank has
    for heads in RANKS:
        with of_rank(tmp_path, heads) as store:
            assert store.get(KEY) is None
            assert store.get_many([KEY]).chunks == [None]
            assert store.get_in_time([KEY], 9.0).chunks == [None]
