"""Memory of this machine that a GPU reads at full speed, where there is one in use."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cacheblend_rag.store.base import ChunkKV
from cacheblend_rag.store.source import PAGE

if TYPE_CHECKING:
    import torch


_HUGE_PAGE = 2 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, at: int = 0) -> torch.Tensor:
    """An uninitialised tensor on the CPU; page-locked where this process uses a GPU, else in huge
    pages where it is large and the system has them: a disk fills these at nearly twice the speed.

    Args:
        at: bytes past a multiple of ``PAGE`` at which it starts, a multiple of the dtype's size; of
            what is read from there in a file, so that the disk can write into it.
    """
    nbytes, lead = math.prod(shape) * dtype.itemsize, at % PAGE
    raw = _raw(lead + nbytes)
    # Memory at the same distance from a page as the bytes in the file: direct reading asks for
    # that.
    start = (lead - raw.data_ptr()) % PAGE
    return raw[start : start + nbytes].view(dtype).view(tuple(shape))


def _raw(nbytes: int) -> torch.Tensor:
    """Bytes, and a page more."""
    import torch

    # Asked at each allocation, and never begun here: a process that only reads a store should not
    # take a GPU's context.
    if torch.cuda.is_initialized():
        try:
            return torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # the system locks no more: a copy to the GPU is slower then
            pass
    if nbytes < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes + PAGE, dtype=torch.uint8)
    size = nbytes + PAGE + _HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # this kernel has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    # Huge pages begin at their own multiples only.
    return raw[-raw.data_ptr() % _HUGE_PAGE :]


def pinned(chunk: ChunkKV) -> ChunkKV:
    """The chunk in page-locked memory where this process uses a GPU; else as it is."""
    import torch

    kv_L2NHD = chunk.kv_L2NHD
    if not torch.cuda.is_initialized() or kv_L2NHD.is_pinned():
        return chunk
    return ChunkKV(
        chunk.token_ids, chunk.base, empty(kv_L2NHD.shape, kv_L2NHD.dtype).copy_(kv_L2NHD)
    )
