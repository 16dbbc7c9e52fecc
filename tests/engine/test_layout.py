"""What is kept of a token where layers differ, and what a layer sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_rag.engine.attention import visible
from cacheblend_rag.engine.compat import Sight, longest_blend, sight
from cacheblend_rag.engine.layout import layout_of

LIKE_GEMMA_4 = ((16, 256), (4, 512), (16, 256))


def layers(shapes: tuple[tuple[int, int], ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(num_kv_heads=heads, head_size=size) for heads, size in shapes]


def test_layers_that_differ_are_stored_as_large_as_the_largest() -> None:
    kept = layout_of(layers(LIKE_GEMMA_4), 16)
    assert (kept.heads, kept.dim, kept.by_layer) == (16, 256, LIKE_GEMMA_4)
    host = torch.zeros(kept.shape(3, 5))
    for layer, shape in enumerate(LIKE_GEMMA_4):
        k, v = torch.randn(2, 5, *shape)
        for there, here in zip(kept.split(host[layer], layer), (k, v), strict=True):
            there.copy_(here)  # they are views
        assert torch.equal(kept.joined(k, v), host[layer])
        got = kept.split(host[layer : layer + 1], layer)
        assert torch.equal(got[0][0], k) and torch.equal(got[1][0], v)


@pytest.mark.parametrize("shapes", [((8, 128),) * 3, ((1, 64),)])
def test_layers_that_are_alike_are_stored_as_they_are(shapes: tuple[tuple[int, int], ...]) -> None:
    kept = layout_of(layers(shapes), 8)
    assert (kept.heads, kept.all_heads, kept.dim) == (shapes[0][0], 8, shapes[0][1])
    assert not kept.by_layer


def test_a_layer_that_attends_within_chunks_sees_no_other_chunk() -> None:
    layer = SimpleNamespace(impl=SimpleNamespace(sliding_window=None), attention_chunk_size=4)
    assert sight(layer) == Sight(None, 4) and sight(layer).least() == 4
    at = torch.arange(9)
    seen = visible(at, at, sight(layer))
    for query in range(9):
        assert seen[query].nonzero().flatten().tolist() == list(range(query // 4 * 4, query + 1))


def test_a_layer_with_a_window_sees_that_many_tokens() -> None:
    at = torch.arange(6)
    seen = visible(at, at, Sight(3, None))
    assert seen[5].nonzero().flatten().tolist() == [3, 4, 5]
    assert visible(at, at, Sight(None, None)).equal(torch.ones(6, 6, dtype=torch.bool).tril())


def test_where_all_layers_attend_within_chunks_a_blend_ends_in_the_first_one() -> None:
    """vLLM keeps no KV of the chunks before that of the token that is computed next."""
    from vllm.v1.core.single_type_kv_cache_manager import ChunkedLocalAttentionManager
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

    shape = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    spec = ChunkedLocalAttentionSpec(block_size=16, attention_chunk_size=64, **shape)
    groups: Any = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    longest = longest_blend(groups)
    assert longest == 63
    skipped = ChunkedLocalAttentionManager.get_num_skipped_tokens
    manager: Any = SimpleNamespace(attention_chunk_size=64)
    assert skipped(manager, longest) == 0 < skipped(manager, longest + 1)
