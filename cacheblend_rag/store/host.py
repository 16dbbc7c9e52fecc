"""Memory of this machine that a GPU reads at full speed, where there is one in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cacheblend_rag.store.base import ChunkKV

if TYPE_CHECKING:
    import torch


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor on the CPU; page-locked where this process uses a GPU."""
    import torch

    if torch.cuda.is_initialized():
        try:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system locks no more: a copy to the GPU is slower then
            pass
    return torch.empty(tuple(shape), dtype=dtype)


def pinned(chunk: ChunkKV) -> ChunkKV:
    """The chunk in page-locked memory where this process uses a GPU; else as it is."""
    import torch

    kv_L2NHD = chunk.kv_L2NHD
    if not torch.cuda.is_initialized() or kv_L2NHD.is_pinned():
        return chunk
    return ChunkKV(
        chunk.token_ids, chunk.base, empty(kv_L2NHD.shape, kv_L2NHD.dtype).copy_(kv_L2NHD)
    )
