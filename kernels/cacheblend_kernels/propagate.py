# mypy: allow-untyped-defs, allow-incomplete-defs
"""Move reused tokens in the paged cache as the recomputed ones around them were moved.

Two kernels: the first writes down how far each recomputed token of the pass moved, the second
moves the others. Most recomputed tokens are near to many stretches of the context, and to look a
token's old KV up takes one load after another.

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
_ROWS_OFF = 16  # recomputed tokens a program of the first kernel
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
    off = _room(k, cos_XP.shape[1], first)
    for launch, arguments in _launches(
        propagation, k, v, off, cache, cos_XP, sin_XP, is_neox, first
    ):
        launch(*arguments, num_warps=_WARPS)


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
        self._off: torch.Tensor | None = None  # of the layer that is moved
        self._ready: dict[int, tuple[object, list[tuple[Any, list[Any]]]]] = {}

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
        known, ready = self._ready.get(table, (None, []))
        # In the order of ``_launches``: the first kernel begins with what is fresh and the cache,
        # the second with the cache.
        if known == like:
            (off, of_off), (move, of_move) = ready
            off(k_TGD, v_TGD, k, v, *of_off[4:])
            move(k, v, *of_move[2:])
            return
        cos_XP, sin_XP = self._tables[table]
        if self._off is None or self._off.shape[1] != len(k_TGD):
            self._off = _room(k_TGD, cos_XP.shape[1], self._first)
        given = self._propagation, k_TGD, v_TGD, self._off, cache, cos_XP, sin_XP
        made = []
        for launch, (grid, values, constants) in _launches(*given, self._is_neox, self._first):
            compiled = launch(grid, values, constants, num_warps=_WARPS)
            if compiled is not None:
                made.append((compiled[grid], [*values, *constants.values()]))
        if made:
            self._ready[table] = like, made


def _of_latents(
    k_TGD: torch.Tensor, v_TGD: torch.Tensor, cache: PagedKV, first: int
) -> tuple[torch.Tensor, torch.Tensor, PagedKV]:
    """Where values have no dimensions, what is not rotated of keys is moved as values are."""
    assert (first > 0) is (v_TGD.shape[-1] == 0), "only latents are rotated behind other dimensions"
    if not first:
        return k_TGD, v_TGD, cache
    return k_TGD, k_TGD, cache._replace(v_BSGD=cache.k_BSGD)


def _heads(k_TGD: torch.Tensor, first: int) -> tuple[int, int]:
    """Heads that programs have one each of, and their size: of latents, what is rotated, and others
    of what is not, for all of which a program has no room.
    """
    groups, dim = k_TGD.shape[1:]
    if not first:
        return groups, dim
    dim = math.gcd(first, _MOST_DIM)
    return 1 + first // dim, dim


def _room(k_TGD: torch.Tensor, pairs: int, first: int) -> torch.Tensor:
    """Room for the differences of K and V, each [T, heads, width]."""
    heads, dim = _heads(k_TGD, first)
    return k_TGD.new_empty(2, len(k_TGD), heads, max(dim, 2 * pairs))


def _launches(
    propagation: Propagation,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    off: torch.Tensor,
    cache: PagedKV,
    cos_XP: torch.Tensor,
    sin_XP: torch.Tensor,
    is_neox: bool,
    first: int,
) -> list[tuple[Launcher, tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]]]:
    """Both kernels, each with its grid, arguments and constants, which are checked.

    Args:
        off: ``_room``.
    """
    count, groups, dim = k_TGD.shape
    pairs = cos_XP.shape[1]
    _, size, _, _ = cache.k_BSGD.shape
    check_cache(cache)
    assert k_TGD.shape == v_TGD.shape and cache.k_BSGD.shape[2:] == (groups, dim)
    assert has_whole_rows(k_TGD) and has_whole_rows(v_TGD)
    assert cos_XP.shape == sin_XP.shape and 2 * pairs <= dim
    assert not first or (groups == 1 and first + 2 * pairs == dim), "these are no latents"
    assert off.shape[1] == count and off.is_contiguous()
    for each in (*propagation, cos_XP, sin_XP):
        assert each.is_contiguous()
    heads, dim = _heads(k_TGD, first)
    k, v = cache.k_BSGD, cache.v_BSGD
    strides = (*k.stride()[:3], *v.stride()[:3])
    shapes = {
        "SIZE": size, "GROUPS": heads, "DIM": dim, "PAIRS": pairs, "WIDTH": off.shape[-1],
        "NEOX": is_neox, "BLOCK_P": max(16, triton.next_power_of_2(pairs)),
        "BLOCK_D": max(16, triton.next_power_of_2(dim)), "REST": not first and 2 * pairs < dim,
        "FIRST": first,
    }  # fmt: skip
    p = propagation
    written = (
        (triton.cdiv(max(count, 1), _ROWS_OFF), heads, 1),
        (
            k_TGD, v_TGD, k, v, off[0], off[1], p.position_R, p.chunk_R, p.pass_2, cache.table,
            cos_XP, sin_XP, k_TGD.stride(0), v_TGD.stride(0), *strides,
        ),
        {**shapes, "BLOCK_R": _ROWS_OFF},
    )  # fmt: skip
    moved = (
        (_PROGRAMS, heads, 1),
        (
            k, v, off[0], off[1], p.chunk_N, p.position_R, p.chunk_R, p.before_N, p.pass_2,
            p.propagation_length_1, cache.table, cos_XP, sin_XP, cache.length, *strides,
        ),
        {**shapes, "BLOCK_N": _TOKENS, "BLOCK_R": _ROWS, "CUTOFF": CUTOFF},
    )  # fmt: skip
    return [(_launch_off, written), (_launch_move, moved)]


@triton.jit(do_not_specialize=["k_row", "v_row"])
def _off_kernel(
    fresh_k, fresh_v, k, v, off_k, off_v, position, chunk_of_row, pass_2, table, cos, sin,
    k_row, v_row, k_block, k_place, k_head, v_block, v_place, v_head,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, NEOX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    REST: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Fresh K and V less those in the cache, keys turned back to position 0: the pairs' first
    halves, then their second ones, then what does not turn. 0 for tokens without stored KV.
    """
    first, rows, g = tl.load(pass_2), tl.load(pass_2 + 1), tl.program_id(1)
    kind: tl.constexpr = k.dtype.element_ty
    if FIRST:
        # Of latents, the first program has what is rotated, each other one some of the dimensions.
        new_head = tl.where(g == 0, FIRST, (g - 1) * DIM)
        old_k_head, old_v_head = new_head, new_head
    else:
        new_head, old_k_head, old_v_head = g * DIM, g * k_head, g * v_head
    d, p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    one = p if NEOX else 2 * p
    two = p + PAIRS if NEOX else 2 * p + 1
    t = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    here = t < rows
    known = here & (tl.load(chunk_of_row + first + t, mask=here, other=-1) >= 0)
    at = tl.load(position + first + t, mask=known, other=0).to(tl.int32)
    block = tl.load(table + at // SIZE, mask=known, other=0).to(tl.int64)
    old_k = k + block * k_block + at % SIZE * k_place + old_k_head
    old_v = v + block * v_block + at % SIZE * v_place + old_v_head
    new_k, new_v = fresh_k + t * k_row + new_head, fresh_v + t * v_row + new_head
    to = (t * GROUPS + g) * WIDTH
    in_d, in_p = here[:, None] & (d < DIM)[None], here[:, None] & (p < PAIRS)[None]
    there_d, there_p = in_d & known[:, None], in_p & known[:, None]
    if not FIRST or g > 0:
        values = _difference(new_v, old_v, d, there_d)
        tl.store(off_v + to[:, None] + d[None], values.to(kind), in_d)
    if not FIRST or g == 0:
        a = _difference(new_k, old_k, one, there_p)
        b = _difference(new_k, old_k, two, there_p)
        turn = at[:, None] * PAIRS + p[None]
        co = tl.load(cos + turn, mask=there_p, other=0.0)
        si = tl.load(sin + turn, mask=there_p, other=0.0)
        # Turned back by the token's own angle, so that differences at unlike positions can be
        # added.
        tl.store(off_k + to[:, None] + p[None], (a * co + b * si).to(kind), in_p)
        tl.store(off_k + to[:, None] + PAIRS + p[None], (b * co - a * si).to(kind), in_p)
    if REST:
        behind = (d >= 2 * PAIRS)[None]
        rest = _difference(new_k, old_k, d, there_d & behind)
        tl.store(off_k + to[:, None] + d[None], rest.to(kind), in_d & behind)


@triton.jit
def _move_kernel(
    k, v, off_k, off_v, chunk, position, chunk_of_row, before, pass_2, propagation_length_1, table,
    cos, sin, length, k_block, k_place, k_head, v_block, v_place, v_head,
    SIZE: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, NEOX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    REST: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CUTOFF: tl.constexpr,
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
        k_begin = tl.where(g == 0, FIRST, (g - 1) * DIM)
        v_begin = k_begin
    else:
        k_begin, v_begin = g * k_head, g * v_head
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
            now = there & (t >= 0) & (t < rows)
            weight = weight.to(kind)
            row = (t * GROUPS + g) * WIDTH
            of_p, of_d = now[:, None] & in_p[None], now[:, None] & in_d[None]
            if not FIRST or g == 0:
                a = tl.load(off_k + row[:, None] + p[None], mask=of_p, other=0.0)
                b = tl.load(off_k + row[:, None] + PAIRS + p[None], mask=of_p, other=0.0)
                sum_a = tl.dot(weight, a, sum_a, input_precision="ieee")
                sum_b = tl.dot(weight, b, sum_b, input_precision="ieee")
            if not FIRST or g > 0:
                values = tl.load(off_v + row[:, None] + d[None], mask=of_d, other=0.0)
                sum_v = tl.dot(weight, values, sum_v, input_precision="ieee")
            if REST:
                behind = of_d & (d >= 2 * PAIRS)[None]
                rest = tl.load(off_k + row[:, None] + d[None], mask=behind, other=0.0)
                sum_rest = tl.dot(weight, rest, sum_rest, input_precision="ieee")
        # 1 + total, not total: a token whose neighbours are far or few hardly moves.
        share = 1.0 / (1.0 + total)
        block = tl.load(table + n // SIZE, mask=moves, other=0).to(tl.int64)
        to_k = k + block * k_block + n % SIZE * k_place + k_begin
        to_v = v + block * v_block + n % SIZE * v_place + v_begin
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


_launch_off, _launch_move = Launcher(_off_kernel), Launcher(_move_kernel)
