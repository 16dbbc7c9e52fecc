"""A plain prefill of our own, for a request whose blend can't be had."""

from __future__ import annotations

import numpy as np
import torch

from cacheblend_rag.engine.attention import PagedCache, PagedPass, upload
from cacheblend_rag.engine.outcome import BlendTask


def prefill(cache: PagedCache, task: BlendTask, most_tokens: int) -> None:
    """Compute what vLLM takes for computed, [write_from, first_row), by the backend's own kernels,
    at most so many tokens at once, and put its KV into the paged cache.
    """
    handle = cache.handle
    ids = upload(np.array(task.token_ids, dtype=np.int64), handle.device)
    blocks = torch.tensor(task.blocks)
    for tile in torch.arange(task.write_from, task.first_row).split(most_tokens):
        if len(tile):
            at = upload(tile, handle.device)
            handle.run(PagedPass(cache, blocks, tile), ids[at], at)
