# mypy: allow-untyped-defs, allow-incomplete-defs
"""Re-rotate stored keys and scatter K and V into the paged cache: many layers in one launch.

Shape legend: K layers, N tokens to place, P rotated pairs, G KV heads, D head size, C source
chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cacheblend_kernels.launch import Launcher
from cacheblend_kernels.paged import PagedKV, check_cache

_TOKENS = 16  # a program


class Sources(NamedTuple):
    """Where each token's stored KV is. A source is, per layer, a contiguous ``[2, n, G, D]``, or
    ``[1, n, G, D]`` where values have no dimensions (latents).

    Attributes:
        address_KC: int64 device addresses of the sources, in the cache's dtype.
        length_C: int64 n of each.
        chunk_N: int32 source of each token; row_N: int32 its row there.
    """

    address_KC: torch.Tensor
    length_C: torch.Tensor
    chunk_N: torch.Tensor
    row_N: torch.Tensor


def rotate_and_scatter(
    sources: Sources,
    cos_NP: torch.Tensor,
    sin_NP: torch.Tensor,
    positions_N: torch.Tensor,
    cache: PagedKV,
    address_K2: torch.Tensor,
    *,
    is_neox: bool,
    first: int = 0,
    is_aligned: bool = False,
) -> None:
    """Put stored K and V at ``positions_N`` (int64), keys turned by a further angle per token.

    The same as ``reference.rerotate`` of the source rows, written through ``PagedKV.slots``
    (CacheBlend, section 4.3). Reads each row once and writes it once.

    Args:
        cos_NP, sin_NP: float32 cosine and sine of the further angle.
        cache: any layer's paged cache; all have its strides.
        address_K2: int64 device addresses of each layer's K and V view.
        is_neox: pairs are (p, p + P) if true, (2p, 2p + 1) if false.
        first: the first of the 2P rotary dimensions; the others stay.
        is_aligned: every row of a source and of the caches, [D] each, begins at a multiple of 16
            bytes; rows are moved 16 bytes at a time then. It is not checked.
    """
    n, pairs = cos_NP.shape
    layers = len(address_K2)
    if n == 0 or layers == 0:
        return
    _, size, groups, dim = cache.k_BSGD.shape
    check_cache(cache)
    assert first + 2 * pairs <= dim and cos_NP.shape == sin_NP.shape
    assert cos_NP.dtype == sin_NP.dtype == torch.float32
    assert sources.address_KC.dtype == address_K2.dtype == torch.int64
    assert sources.address_KC.shape == (layers, len(sources.length_C))
    assert len(positions_N) == len(sources.chunk_N) == len(sources.row_N) == n
    for each in (*sources, cos_NP, sin_NP, positions_N, address_K2):
        assert each.is_contiguous()
    k, v = cache.k_BSGD, cache.v_BSGD
    has_values = v.shape[-1] > 0
    # of what is copied: all of a row, or what comes before the pairs
    copied = first if not has_values and first + 2 * pairs == dim else dim
    _launch(
        (triton.cdiv(n, _TOKENS), groups, layers),
        (
            sources.address_KC, sources.length_C, sources.chunk_N, sources.row_N,
            cos_NP, sin_NP, positions_N, cache.table, address_K2, k, n, len(sources.length_C),
            *k.stride()[:3], *v.stride()[:3],
        ),
        {
            "SIZE": size, "GROUPS": groups, "DIM": dim, "PAIRS": pairs, "NEOX": is_neox,
            "BLOCK_N": _TOKENS, "BLOCK_P": triton.next_power_of_2(pairs),
            "BLOCK_D": triton.next_power_of_2(max(1, copied)), "FIRST": first,
            "VALUES": has_values, "ALIGNED": is_aligned,
        },
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "num_chunks"])
def _rotate_and_scatter_kernel(
    address, length, chunk, row, cos, sin, positions, table, caches, like,
    n, num_chunks, k_block, k_place, k_head, v_block, v_place, v_head,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr,
    NEOX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    FIRST: tl.constexpr, VALUES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g, layer = tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = like.dtype.element_ty
    # Layers are addresses, not tensors: one launch serves caches that were allocated apart.
    # Nothing checks that they have the strides and the dtype of the one that is passed.
    k = tl.load(caches + 2 * layer).to(tl.pointer_type(kind))
    v = tl.load(caches + 2 * layer + 1).to(tl.pointer_type(kind))
    here = t < n
    c = tl.load(chunk + t, mask=here, other=0)
    # A source holds K, then V, of one chunk at one layer, so its V begins n * G * D elements on.
    base = tl.load(address + layer * num_chunks + c, mask=here, other=0)
    far = tl.load(length + c, mask=here, other=0) * (GROUPS * DIM)  # elements from K to V
    from_k = (tl.load(row + t, mask=here, other=0).to(tl.int64) * GROUPS + g) * DIM
    source = base.to(tl.pointer_type(kind)) + from_k
    source_v = source + far

    position = tl.load(positions + t, mask=here, other=0)
    # 64 bits: a block number times the stride of a block exceeds 32 in large caches
    block = tl.load(table + position // SIZE, mask=here, other=0).to(tl.int64)
    inside = position % SIZE
    to_k = k + block * k_block + inside * k_place + g * k_head
    to_v = v + block * v_block + inside * v_place + g * v_head

    # The compiler knows nothing of addresses that are loaded: it would move two bytes at a time.
    if ALIGNED:
        source, source_v = tl.multiple_of(source, 16), tl.multiple_of(source_v, 16)
        to_k, to_v = tl.multiple_of(to_k, 16), tl.multiple_of(to_v, 16)

    d = tl.arange(0, BLOCK_D)
    whole = here[:, None] & (d < DIM)[None]
    if VALUES:
        tl.store(to_v[:, None] + d[None], tl.load(source_v[:, None] + d[None], mask=whole), whole)
    # partial rotary: what is not rotated is copied
    if 2 * PAIRS < DIM:
        rest = whole & ((d < FIRST) | (d >= FIRST + 2 * PAIRS))[None]
        tl.store(to_k[:, None] + d[None], tl.load(source[:, None] + d[None], mask=rest), rest)

    p = tl.arange(0, BLOCK_P)
    # Two loads and two stores a pair instead of one shuffled row: the pairs of NeoX lie P apart.
    some = here[:, None] & (p < PAIRS)[None]
    first = FIRST + (p if NEOX else 2 * p)
    second = FIRST + (p + PAIRS if NEOX else 2 * p + 1)
    a = tl.load(source[:, None] + first[None], mask=some).to(tl.float32)
    b = tl.load(source[:, None] + second[None], mask=some).to(tl.float32)
    at = t[:, None] * PAIRS + p[None]
    # The angle of the move alone: keys are stored rotated at their old positions. In float32,
    # so that a key is rounded once.
    co = tl.load(cos + at, mask=some)
    si = tl.load(sin + at, mask=some)
    tl.store(to_k[:, None] + first[None], (a * co - b * si).to(kind), some)
    tl.store(to_k[:, None] + second[None], (b * co + a * si).to(kind), some)


_launch = Launcher(_rotate_and_scatter_kernel)
