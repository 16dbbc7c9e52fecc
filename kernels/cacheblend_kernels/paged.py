"""What the kernels know of a paged cache: two strided views and a request's block table.

Shape legend: B blocks, S tokens a block, G KV heads, D head size, N context tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PagedKV(NamedTuple):
    """One layer's paged cache as one request sees it.

    Attributes:
        k_BSGD, v_BSGD: views of the same dtype; the last dimension has stride 1. Values of latents
            have no dimensions.
        table: int32 numbers of the blocks that hold positions ``[0, len(table) * S)``.
        length: int32 [1] N, the positions that may be read. On the device, so that a CUDA graph
            serves any context.
        most: a bound on N, known to the host: what is launched depends on it.
    """

    k_BSGD: torch.Tensor
    v_BSGD: torch.Tensor
    table: torch.Tensor
    length: torch.Tensor
    most: int

    def slots(self, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and place within it of each position; int64 [N] each."""
        # a view of vLLM's cache: blocks of a request lie anywhere in it
        size = self.k_BSGD.shape[1]
        return self.table[positions_N // size].long(), positions_N % size

    def gather(self, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [N, G, D] at these positions: the plain way, for twins and tests."""
        block, place = self.slots(positions_N)
        return self.k_BSGD[block, place], self.v_BSGD[block, place]


def check_cache(cache: PagedKV) -> None:
    """Assert what every kernel assumes of a cache. A kernel has addresses and strides only, and
    would read and write elsewhere without a sign.
    """
    k, v = cache.k_BSGD, cache.v_BSGD
    assert k.dtype == v.dtype and k.shape[:3] == v.shape[:3], "K and V are not alike"
    assert v.shape[3] in (0, k.shape[3]), "K and V are not alike"
    assert k.stride(-1) == v.stride(-1) == 1, "a head's numbers are apart"
    assert cache.table.is_contiguous() and cache.table.dtype == torch.int32, "no block table"


def has_whole_rows(x_NGD: torch.Tensor) -> bool:
    """Whether each row of [G, D] is in one piece; rows may be apart."""
    _, heads, dim = x_NGD.shape
    return x_NGD.stride(-1) == 1 and (heads == 1 or x_NGD.stride(-2) == dim)


class Propagation(NamedTuple):
    """Which tokens move, and by whom.

    All are tensors on the device, so that a CUDA graph can read other values there.

    Attributes:
        chunk_N: int32 number of the chunk of each context token that moves; -1 for the others.
        position_R: int64, ascending; chunk_R: int32 chunk of each recomputed token, -1 for those
            that no stored KV is known of.
        before_N: int32 [N + 1], how many recomputed tokens come before each position.
        pass_2: int32, the first recomputed token of this pass and how many there are.
        propagation_length_1: float32, tokens at which a weight has fallen to 1/e.
    """

    chunk_N: torch.Tensor
    position_R: torch.Tensor
    chunk_R: torch.Tensor
    before_N: torch.Tensor
    pass_2: torch.Tensor
    propagation_length_1: torch.Tensor
