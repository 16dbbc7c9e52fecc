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
    clear(cache, task.own_blocks(cache.block_size), most_tokens)
    some = task.token_ids[task.write_from : task.first_row]
    compute(cache, some, task.write_from, task.blocks, most_tokens)


def compute(
    cache: PagedCache,
    token_ids: Sequence[int],
    start: int,
    blocks: Sequence[int],
    most_tokens: int,
) -> None:
    """Compute these tokens, which stand at ``start`` and behind it, over what the request's blocks
    hold before them.
    """
    handle, table = cache.handle, torch.tensor(blocks)
    ids = upload(np.array(token_ids, dtype=np.int64), handle.device)
    positions = torch.arange(start, start + len(ids))
    # vLLM has reserved the memory for a step of so many tokens, not for more.
    for some, tile in zip(ids.split(most_tokens), positions.split(most_tokens), strict=True):
        if len(tile):
            handle.run(PagedPass(cache, table, tile), some, upload(tile, handle.device))
