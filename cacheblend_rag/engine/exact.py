"""A plain prefill of our own, for a request whose blend can't be had."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cacheblend_rag.engine.attention import PagedCache, PagedPass
from cacheblend_rag.engine.outcome import BlendTask
from cacheblend_rag.engine.upload import upload


def prefill(cache: PagedCache, task: BlendTask, most_tokens: int) -> None:
    """Compute what vLLM takes for computed, [write_from, first_row), by the backend's own kernels,
    at most so many tokens at once, and put its KV into the paged cache. Where one rank can't, all
    raise. The request's own blocks are cleared before.
    """
    cache.handle.ranks.all_or_none(lambda: _prefill(cache, task, most_tokens))


def clear(cache: PagedCache, blocks: Sequence[int], most_tokens: int) -> None:
    """Put zeros in the place of what a failure left: attention multiplies what lies behind a
    sequence's end in its last block by zero, and zero times NaN is NaN.
    """
    handle = cache.handle
    dtype = handle.config.model_config.dtype
    slots = cache.slots(torch.tensor(blocks), torch.arange(len(blocks) * cache.block_size))
    for some in slots.split(most_tokens):
        shape = handle.layout.shape(1, len(some))[1:]
        zeros = torch.zeros(shape, dtype=dtype, device=handle.device)
        for index in range(handle.num_layers):
            k, v = handle.layout.split(zeros, index)
            handle.write(index, k, v, some)


def _prefill(cache: PagedCache, task: BlendTask, most_tokens: int) -> None:
    handle = cache.handle
    clear(cache, task.own_blocks(cache.block_size), most_tokens)
    ids = upload(np.array(task.token_ids, dtype=np.int64), handle.device)
    blocks = torch.tensor(task.blocks)
    # vLLM has reserved the memory for a step of so many tokens, not for more.
    for tile in torch.arange(task.write_from, task.first_row).split(most_tokens):
        if len(tile):
            at = upload(tile, handle.device)
            handle.run(PagedPass(cache, blocks, tile), ids[at], at)
