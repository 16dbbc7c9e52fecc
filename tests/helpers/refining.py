"""A prompt whose blend is refined, and what the paged cache holds of it."""

from __future__ import annotations

from typing import Any

import torch
from tiny import Words

from cacheblend_rag import CacheBlend
from cacheblend_rag.engine.hashes import cached

BLOCK = 32
words = Words(41)
PREFIX = words(4)
CHUNKS = [words(n) for n in (70, 100, 64, 90)]
PROMPT = words(9) + CHUNKS[0] + words(3) + CHUNKS[1] + CHUNKS[2] + words(2) + CHUNKS[3] + words(25)
ASK: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": -1}


def core(blend: CacheBlend) -> Any:
    """vLLM's, of an engine in this process."""
    return blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]


def reset(blend: CacheBlend) -> None:
    """Empty the prefix cache."""
    engine: Any = blend._engine
    for _ in range(8):  # steps that were scheduled ahead hold blocks
        if core(blend).scheduler.reset_prefix_cache():
            return
        engine._llm.llm_engine.step()
    raise AssertionError("the prefix cache could not be emptied")


def kv_of(blend: CacheBlend, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """What the blocks hold that a plain request with these tokens finds, layer by layer."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    pool = core(blend).scheduler.kv_cache_manager.block_pool
    hasher = core(blend).request_block_hasher
    plain = Request("plain", list(ids), SamplingParams(), None, block_hasher=hasher)
    found = plain.block_hashes[: cached(pool, plain.block_hashes)]
    blocks = torch.tensor(
        [pool.get_cached_block(h, [0])[0].block_id for h in found], dtype=torch.int64
    )
    held = []
    for layer in connector().rows.handle.layers:
        at = list(layer.kv_cache.shape).index(pool.num_gpu_blocks)
        here = blocks.to(layer.kv_cache.device)
        held.append(layer.kv_cache.index_select(at, here).movedim(at, 0).clone())
    return held


def connector() -> Any:
    """The worker's side of it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()
