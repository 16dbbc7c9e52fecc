"""Chunks that stay in GPU memory, here in the CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cacheblend_rag.engine.device_cache import DeviceCache
from cacheblend_rag.store.base import ChunkKV

pytestmark = pytest.mark.vllm


def chunk(tokens: int) -> ChunkKV:
    return ChunkKV(tuple(range(tokens)), 7, torch.randn(3, 2, tokens, 1, 4))


def test_what_is_whole_is_handed_out_and_the_longest_unused_leaves() -> None:
    a, b, c = chunk(5), chunk(5), chunk(5)
    device_cache = DeviceCache(a.nbytes + b.nbytes, torch.device("cpu"))
    held = device_cache.room("a", a)
    assert held is not None and device_cache.get("a", a) is held
    assert device_cache.complete("a") is None, "its transfer is not through"
    held.kv.copy_(a.kv_L2NHD)
    held.is_complete = True
    kept = device_cache.complete("a")
    assert kept is not None and (kept.token_ids, kept.base) == (a.token_ids, 7)
    assert torch.equal(kept.kv_L2NHD, a.kv_L2NHD) and kept.kv_L2NHD is not a.kv_L2NHD
    assert device_cache.room("b", b) is not None
    device_cache.get("a", a)
    assert device_cache.room("c", c) is not None
    assert device_cache.complete("a") is not None and device_cache.get("b", b) is None
    device_cache.discard("a")
    assert device_cache.complete("a") is None and device_cache.nbytes == c.nbytes
    assert torch.equal(kept.kv_L2NHD, a.kv_L2NHD), "who has it keeps it"
    assert device_cache.room("d", chunk(11)) is None


def test_a_copy_is_of_the_same_tokens_at_the_same_positions() -> None:
    a, longer = chunk(5), chunk(8)
    moved = replace(a, base=0)
    device_cache = DeviceCache(a.nbytes + longer.nbytes, torch.device("cpu"))
    for wanted in (longer, a, moved):
        assert device_cache.get("a", wanted) is None
        held = device_cache.room("a", wanted)
        assert held is not None and device_cache.get("a", wanted) is held
        assert device_cache.nbytes == wanted.nbytes, "in the place of the others"


def test_what_has_no_key_is_not_kept() -> None:
    device_cache = DeviceCache(1 << 20, torch.device("cpu"))
    assert device_cache.room("", chunk(5)) is None
    assert device_cache.get("", chunk(5)) is None and device_cache.nbytes == 0
