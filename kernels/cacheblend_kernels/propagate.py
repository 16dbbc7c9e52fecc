# mypy: allow-untyped-defs, allow-incomplete-defs
"""Move reused tokens in the paged cache as the recomputed ones around them were moved.

Shape legend: N context tokens, R recomputed tokens, T of them in this pass, G KV heads, D head
size, P rotated pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from cacheblend_kernels.launch import Launcher
from cacheblend_kernels.paged import PagedKV, Propagation, check_cache, has_whole_rows
from cacheblend_kernels.reference import CUTOFF

_TOKENS, _ROWS = 64, 16  # context tokens a program, recomputed tokens a step
_PROGRAMS = 128  # a KV head; each takes every so many-th stretch of tokens
_WARPS = 4
_MOST_DIM = 128  # of a head of latents


def propagate(
    propagation: Propagation,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    cache: PagedKV,
    cos_XP: torch.Tensor,
    sin_XP: torch.Tensor,
    *,
    is_neox: bool,
    first: int = 0,
) -> None:
    """Move the tokens around the recomputed ones of this pass, whose fresh K and V are not in the
    cache yet.

    The same as ``reference.nearness`` times the differences, keys compared as if all stood at
    position 0. Recomputed tokens of other passes move nothing here, but count in the sum that all
    weights are divided by. So the passes together do what one would.

    Args:
        k_TGD, v_TGD: fresh K and V, of the pass's tokens first; rows of [G, D] are contiguous.
        cos_XP, sin_XP: float32 tables of a turn from position 0 to each position.
        is_neox: pairs are (p, p + P) if true, (2p, 2p + 1) if false.
        first: the first rotary dimension of latents, whose values have no dimensions; else 0.
    """
    k, v, cache = _of_latents(k_TGD, v_TGD, cache, first)
    _launch(*_arguments(propagation, k, v, cache, cos_XP, sin_XP, is_neox, first), num_warps=_WARPS)


class Propagator:
    """``propagate`` for one layer of a pass after the other. What the layers share is checked and
    made ready at the first, since a host that does it for each is slower than a GPU.

    Args:
        cos_TXP, sin_TXP: the tables of ``propagate``, of which a layer has one.
    """

    def __init__(
        self,
        propagation: Propagation,
        cos_TXP: torch.Tensor,
        sin_TXP: torch.Tensor,
        *,
        is_neox: bool,
        first: int = 0,
    ) -> None:
        self._propagation, self._is_neox, self._first = propagation, is_neox, first
        self._tables = list(zip(cos_TXP, sin_TXP, strict=True))
        self._ready: dict[int, tuple[object, Any, list[Any]]] = {}

    def __call__(
        self, table: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor, cache: PagedKV
    ) -> None:
        """The same as ``propagate`` with this table.

        Args:
            cache: a layer's; all have the strides, the dtype and the block table of the first.
        """
        k_TGD, v_TGD, cache = _of_latents(k_TGD, v_TGD, cache, self._first)
        k, v = cache.k_BSGD, cache.v_BSGD
        like = (
            k_TGD.stride(), v_TGD.stride(), k_TGD.shape,
            # Triton compiles anew for other multiples of 16.
            *(x.data_ptr() % 16 == 0 for x in (k_TGD, v_TGD, k, v)),
        )  # fmt: skip
        known, run, values = self._ready.get(table, (None, None, []))
        # In the order of ``_arguments``: fresh K and V first, those of the cache at 9.
        if known == like:
            run(k_TGD, v_TGD, *values[2:9], k, v, *values[11:])
            return
        cos_XP, sin_XP = self._tables[table]
        grid, given, constants = _arguments(
            self._propagation, k_TGD, v_TGD, cache, cos_XP, sin_XP, self._is_neox, self._first
        )
        compiled = _launch(grid, given, constants, num_warps=_WARPS)
        if compiled is not None:
            self._ready[table] = like, compiled[grid], [*given, *constants.values()]


def _of_latents(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, cache: PagedKV, first: int
) -> tuple[torch.Tensor, torch.Tensor, PagedKV]:
    """Where values have no dimensions, what is not rotated of keys is moved as values are."""
    assert (first > 0) is (v_TGD.shape[-1] == 0), "only latents are rotated behind other dimensions"
    if not first:
        return k_TGD, v_TGD, cache
    return k_TGD, k_TGD, cache._replace(v_BSGD=cache.k_BSGD)


def _arguments(
    propagation: Propagation,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    cache: PagedKV,
    cos_XP: torch.Tensor,
    sin_XP: torch.Tensor,
    is_neox: bool,
    first: int,
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants of the kernel, checked."""
    groups, dim = k_TGD.shape[1:]
    pairs = cos_XP.shape[1]
    _, size, _, _ = cache.k_BSGD.shape
    check_cache(cache)
    assert k_TGD.shape == v_TGD.shape and cache.k_BSGD.shape[2:] == (groups, dim)
    assert has_whole_rows(k_TGD) and has_whole_rows(v_TGD)
    assert cos_XP.shape == sin_XP.shape and 2 * pairs <= dim
    if first:
        assert groups == 1 and first + 2 * pairs == dim, "these are no latents"
        # a program has no room for all that is not rotated, and one has what is
        dim = math.gcd(first, _MOST_DIM)
        groups = 1 + first // dim
    for each in (*propagation, cos_XP, sin_XP):
        assert each.is_contiguous()
    k, v = cache.k_BSGD, cache.v_BSGD
    return (
        (_PROGRAMS, groups, 1),
        (
            k_TGD, v_TGD, propagation.chunk_N, propagation.position_R, propagation.chunk_R,
            propagation.before_N, propagation.pass_2, propagation.propagation_length_1,
            cache.table, k, v, cos_XP, sin_XP, cache.length, k_TGD.stride(0), v_TGD.stride(0),
            *k.stride()[:3], *v.stride()[:3],
        ),
        {
            "SIZE": size, "GROUPS": groups, "DIM": dim, "PAIRS": pairs, "NEOX": is_neox,
            "BLOCK_P": max(16, triton.next_power_of_2(pairs)),
            "BLOCK_D": max(16, triton.next_power_of_2(dim)), "REST": not first and 2 * pairs < dim,
            "BLOCK_N": _TOKENS, "BLOCK_R": _ROWS, "CUTOFF": CUTOFF,
            "FIRST": first,
        },
    )  # fmt: skip


@triton.jit(do_not_specialize=["k_row", "v_row"])
def _propagate_kernel(
    fresh_k, fresh_v, chunk, position, chunk_of_row, before, pass_2, propagation_length_1, table, k,
    v, cos, sin, length, k_row, v_row, k_block, k_place, k_head, v_block, v_place, v_head,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr,
    NEOX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, REST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CUTOFF: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    context, g = tl.load(length), tl.program_id(1)
    first, rows = tl.load(pass_2), tl.load(pass_2 + 1)
    propagation_length = tl.load(propagation_length_1)
    far, nearness = (
        (CUTOFF * propagation_length).to(tl.int32),
        1.4426950408889634 / propagation_length,
    )  # log2(e): exp2 below
    kind: tl.constexpr = k.dtype.element_ty
    if FIRST:
        # Of latents, the first program has what is rotated, each other one some of the dimensions.
        new_head = tl.where(g == 0, FIRST, (g - 1) * DIM)
        old_k_head, old_v_head = new_head, new_head
    else:
        new_head, old_k_head, old_v_head = g * DIM, g * k_head, g * v_head
    d, p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    in_d, in_p = d < DIM, p < PAIRS
    one = p if NEOX else 2 * p
    two = p + PAIRS if NEOX else 2 * p + 1
    # A fixed number of programs strides over the context: a CUDA graph cannot launch more.
    for start in range(tl.program_id(0) * BLOCK_N, context, tl.num_programs(0) * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mine = tl.load(chunk + n, mask=n < context, other=-1)
        moves = mine >= 0
        # Recomputed tokens ascend, so those near enough to this stretch are a run of them.
        low = tl.load(before + tl.maximum(start - far, 0))
        high = tl.load(before + tl.minimum(start + BLOCK_N + far, context))
        # no token of the stretch moves: an empty run, as a loop can't be left early
        if tl.max(mine) < 0:
            high = low
        total = tl.zeros([BLOCK_N], tl.float32)
        sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        sum_a = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        sum_b = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        sum_rest = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for r0 in range(low, high, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            there = r < high
            at = tl.load(position + r, mask=there, other=0).to(tl.int32)
            theirs = tl.load(chunk_of_row + r, mask=there, other=-1)
            distance = tl.abs(n[:, None] - at[None]).to(tl.float32)
            # Tokens of another chunk miss another context: their differences say nothing here.
            near = (
                (mine[:, None] == theirs[None])
                & moves[:, None]
                & (distance <= CUTOFF * propagation_length)
            )
            weight = tl.where(near, tl.exp2(-distance * nearness), 0.0)
            # of all passes, later ones too: each pass adds its own part of the same mean
            total += tl.sum(weight, 1)
            t = r - first
            # Of this pass: only its differences are known.
            now = there & (t >= 0) & (t < rows) & (theirs >= 0)
            weight = weight.to(kind)
            # Fresh K and V are compared with what lies in the cache: this runs before they are
            # written, and a recomputed token is moved by none of the programs.
            there_d, there_p = now[:, None] & in_d[None], now[:, None] & in_p[None]
            block = tl.load(table + at // SIZE, mask=now, other=0).to(tl.int64)
            old_k = k + block * k_block + at % SIZE * k_place + old_k_head
            old_v = v + block * v_block + at % SIZE * v_place + old_v_head
            new_k, new_v = fresh_k + t * k_row + new_head, fresh_v + t * v_row + new_head
            if not FIRST or g > 0:
                values = _difference(new_v, old_v, d, there_d)
                sum_v = tl.dot(weight, values.to(kind), sum_v, input_precision="ieee")
            if not FIRST or g == 0:
                a = _difference(new_k, old_k, one, there_p)
                b = _difference(new_k, old_k, two, there_p)
                turn = at[:, None] * PAIRS + p[None]
                co = tl.load(cos + turn, mask=there_p, other=0.0)
                si = tl.load(sin + turn, mask=there_p, other=0.0)
                # Turned back by the token's own angle, so that differences at unlike positions can
                # be added.
                sum_a = tl.dot(weight, (a * co + b * si).to(kind), sum_a, input_precision="ieee")
                sum_b = tl.dot(weight, (b * co - a * si).to(kind), sum_b, input_precision="ieee")
            if REST:
                rest = _difference(new_k, old_k, d, there_d & (d >= 2 * PAIRS)[None])
                sum_rest = tl.dot(weight, rest.to(kind), sum_rest, input_precision="ieee")
        # 1 + total, not total: a token whose neighbours are far or few hardly moves.
        share = 1.0 / (1.0 + total)
        block = tl.load(table + n // SIZE, mask=moves, other=0).to(tl.int64)
        to_k = k + block * k_block + n % SIZE * k_place + old_k_head
        to_v = v + block * v_block + n % SIZE * v_place + old_v_head
        whole = moves[:, None] & in_d[None]
        if not FIRST or g > 0:
            where = to_v[:, None] + d[None]
            was = tl.load(where, mask=whole).to(tl.float32)
            tl.store(where, (was + sum_v * share[:, None]).to(kind), whole)
        if REST:
            rest = whole & (d >= 2 * PAIRS)[None]
            where = to_k[:, None] + d[None]
            was = tl.load(where, mask=rest).to(tl.float32)
            tl.store(where, (was + sum_rest * share[:, None]).to(kind), rest)
        if not FIRST or g == 0:
            some = moves[:, None] & in_p[None]
            # turned on from position 0 to where the moved token stands
            co = tl.load(cos + n[:, None] * PAIRS + p[None], mask=some)
            si = tl.load(sin + n[:, None] * PAIRS + p[None], mask=some)
            a, b = sum_a * share[:, None], sum_b * share[:, None]
            where = to_k[:, None] + one[None]
            was = tl.load(where, mask=some).to(tl.float32)
            tl.store(where, (was + a * co - b * si).to(kind), some)
            where = to_k[:, None] + two[None]
            was = tl.load(where, mask=some).to(tl.float32)
            tl.store(where, (was + b * co + a * si).to(kind), some)


@triton.jit
def _difference(new, old, column, mask):
    """[R, C] float32: rows at ``new`` less those at ``old``, at these columns."""
    return tl.load(new[:, None] + column[None], mask=mask, other=0.0).to(tl.float32) - tl.load(
        old[:, None] + column[None], mask=mask, other=0.0
    )


_launch = Launcher(_propagate_kernel)
