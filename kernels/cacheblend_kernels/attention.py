# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of queries at scattered positions over the paged cache, and how much each key got.

Shape legend: R query rows, H query heads, G KV heads (H is a multiple of G), D head size,
N context tokens, X extra tokens that are not in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cacheblend_kernels.paged import PagedKV, check_cache, has_whole_rows

_LOG2E = 1.4426950408889634
_KEYS = 64  # a step
_PROGRAMS = 384  # enough to fill a GPU; fewer are split along the keys
_MANY_ROWS = 16384  # rows of a KV head from which larger tiles, which are read less often, pay
_LAST = 64  # rows; few questions are longer
_WHOLE, _WITHOUT_LAST, _ONLY_LAST = range(3)  # parts of the rows


class Extra(NamedTuple):
    """Keys and values beside the cache: the question's own. Positions ascend behind the context."""

    k_XGD: torch.Tensor
    v_XGD: torch.Tensor
    position_X: torch.Tensor  # int64


def scattered_attention(
    q_RHD: torch.Tensor,
    position_R: torch.Tensor,
    cache: PagedKV,
    out_RHD: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
    known_N: torch.Tensor | None = None,
    extra: Extra | None = None,
    count_1: torch.Tensor | None = None,
    want_lse: bool = False,
) -> torch.Tensor | None:
    """Each row attends to the context tokens, and extra ones, at its own and earlier positions.

    Selective recomputation (CacheBlend, section 4.2) needs just this: a causal mask by position,
    not by place in the batch. Query heads that share a KV head are packed into one tile.

    A question behind the context sees all keys and would run on when all other rows are done. So
    the last rows, where ``count_1`` says which, get a launch of their own that splits the keys.

    Args:
        q_RHD: queries; rows of ``[H, D]`` are contiguous.
        position_R: int64, ascending; rows of -1 at the end see nothing and become 0.
        cache: a layer's paged cache.
        out_RHD: written.
        scale: factor on the logits; softcap: ``softcap * tanh(logits / softcap)`` where not 0.
        window: tokens a row sees back, itself included.
        known_N: bool [N], context tokens that may be seen; None for all.
        extra: further keys.
        count_1: int32 on the device, how many rows have a position.
        want_lse: also return log2-sum-exp2 of the logits in base 2, float32 [R, H].
    """
    rows, heads, dim = q_RHD.shape
    _, size, groups, _ = cache.k_BSGD.shape
    _check(q_RHD, position_R, cache, out_RHD, extra)
    share = heads // groups
    num_extra = len(extra.position_X) if extra is not None else 0
    empty = q_RHD  # a pointer that is never followed
    lse = torch.empty(rows, heads, dtype=torch.float32, device=q_RHD.device)
    k, v = cache.k_BSGD, cache.v_BSGD
    ek, ev = (extra.k_XGD, extra.v_XGD) if extra is not None else (empty, empty)
    count = count_1 if count_1 is not None else empty
    # One launch for all rows, or one for all but the last ones and one for those.
    for part in _parts(rows, share, cache, split=count_1 is not None and window is None):
        some = min(_LAST, rows) if part == _ONLY_LAST else rows
        tiles, block_m, splits = _grid(some, share, cache)
        # The partial result of a single split is the result, so it is written in place.
        partial, partial_lse = (
            _partials(splits, some, out_RHD, lse) if splits > 1 else (out_RHD, lse)
        )
        _attention_kernel[(tiles, groups, splits)](
            q_RHD, position_R, k, v, cache.table, partial, partial_lse,
            known_N if known_N is not None else empty, ek, ev,
            extra.position_X if extra is not None else empty, count,
            some, cache.length, num_extra, scale * _LOG2E, softcap * _LOG2E,
            q_RHD.stride(0), partial.stride(-3), some * heads * dim, some * heads,
            k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
            ek.stride(0), ev.stride(0), window or 0,
            SIZE=size, SHARE=share, HEADS=heads, DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
            SOFTCAP=softcap > 0, WINDOW=window is not None, KNOWN=known_N is not None,
            EXTRA=num_extra > 0, BLOCK_M=block_m, BLOCK_N=_KEYS,
            FITS_32_BITS=_fits_32_bits(k) and _fits_32_bits(v),
            WITHOUT_LAST=part == _WITHOUT_LAST, ONLY_LAST=part == _ONLY_LAST, LAST=_LAST,
            num_warps=8 if block_m == 128 else 4, num_stages=3,
        )  # fmt: skip
        if splits > 1:
            _combine(partial, partial_lse, out_RHD, lse, count, only_last=part == _ONLY_LAST)
    return lse if want_lse else None


def _check(
    q_RHD: torch.Tensor,
    position_R: torch.Tensor,
    cache: PagedKV,
    out_RHD: torch.Tensor,
    extra: Extra | None,
) -> None:
    """Assert what ``scattered_attention`` says of its arguments."""
    rows, heads, dim = q_RHD.shape
    groups = cache.k_BSGD.shape[2]
    check_cache(cache)
    assert q_RHD.shape == out_RHD.shape and cache.k_BSGD.shape[-1] == dim and heads % groups == 0
    assert has_whole_rows(q_RHD) and has_whole_rows(out_RHD)
    assert position_R.shape == (rows,) and position_R.is_contiguous()
    if extra is not None:
        assert extra.k_XGD.shape == extra.v_XGD.shape == (len(extra.position_X), groups, dim)
        assert has_whole_rows(extra.k_XGD) and has_whole_rows(extra.v_XGD)


def _partials(
    splits: int, rows: int, out_RHD: torch.Tensor, lse_RH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the result of each split, and its log-sum."""
    shape, device = (splits, rows, *out_RHD.shape[1:]), out_RHD.device
    partial = torch.empty(shape, dtype=lse_RH.dtype, device=device)
    return partial, torch.empty(shape[:-1], dtype=lse_RH.dtype, device=device)


def _combine(
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    out_RHD: torch.Tensor,
    lse_RH: torch.Tensor,
    count_1: torch.Tensor,
    *,
    only_last: bool,
) -> None:
    """Join the results of the splits."""
    splits, rows, heads, dim = partial.shape
    _combine_kernel[(rows * heads,)](
        partial, partial_lse, out_RHD, lse_RH, count_1, rows * heads, out_RHD.stride(0),
        HEADS=heads, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), SPLITS=splits,
        ONLY_LAST=only_last, LAST=_LAST, num_warps=2,
    )  # fmt: skip


def _parts(rows: int, share: int, cache: PagedKV, *, split: bool) -> tuple[int, ...]:
    """The launches: two where that spreads the last rows over more programs."""
    last, whole = (_grid(n, share, cache)[2] for n in (min(_LAST, rows), rows))
    return (_WITHOUT_LAST, _ONLY_LAST) if split and last > whole else (_WHOLE,)


def _grid(rows: int, share: int, cache: PagedKV) -> tuple[int, int, int]:
    """Tiles of rows, rows and heads a tile, splits of the keys."""
    block_m = 128 if rows * share >= _MANY_ROWS else 64
    tiles, groups = triton.cdiv(rows * share, block_m), cache.k_BSGD.shape[2]
    return tiles, block_m, _power(min(_PROGRAMS // (tiles * groups), cache.most // (2 * _KEYS)))


def question_scores(
    q_RHD: torch.Tensor,
    position_R: torch.Tensor,
    lse_RH: torch.Tensor,
    cache: PagedKV,
    score_GN: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
    known_N: torch.Tensor | None = None,
) -> None:
    """Add the attention that each context token gets, summed over rows and the heads of a group.

    Args:
        lse_RH: what ``scattered_attention`` returned for these rows.
        position_R: as there; rows of -1 do not count.
        score_GN: float32, added to. Each group has a row of its own, so that no sum depends on the
            order in which programs happen to run.
    """
    rows, heads, dim = q_RHD.shape
    _, size, groups, _ = cache.k_BSGD.shape
    check_cache(cache)
    assert has_whole_rows(q_RHD) and position_R.shape == (rows,) and position_R.is_contiguous()
    assert lse_RH.shape == (rows, heads) and lse_RH.stride(-1) == 1
    assert score_GN.dtype == torch.float32 and score_GN.stride(-1) == 1
    assert len(score_GN) == groups and score_GN.shape[1] >= cache.most
    k = cache.k_BSGD
    _score_kernel[(triton.cdiv(cache.most, _KEYS), groups)](
        q_RHD, position_R, lse_RH, k, cache.table,
        known_N if known_N is not None else q_RHD, score_GN,
        rows, cache.length, scale * _LOG2E, softcap * _LOG2E, q_RHD.stride(0), lse_RH.stride(0),
        k.stride(0), k.stride(1), k.stride(2), score_GN.stride(0), window or 0,
        SIZE=size, SHARE=heads // groups, DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
        SOFTCAP=softcap > 0, WINDOW=window is not None, KNOWN=known_N is not None,
        BLOCK_M=64, BLOCK_N=_KEYS, num_warps=4,
    )  # fmt: skip


def _fits_32_bits(cache_BSGD: torch.Tensor) -> bool:
    """Whether 32 bits tell where an element lies: half the registers, and those are scarce."""
    spans = ((n - 1) * step for n, step in zip(cache_BSGD.shape, cache_BSGD.stride(), strict=True))
    return sum(spans) < 1 << 31


def _power(limit: int) -> int:
    """The largest power of two up to ``limit``, so that few kernels are compiled; at least 1."""
    return 1 << max(0, limit.bit_length() - 1)


@triton.jit
def _cap(x, softcap):
    """``softcap * tanh(x / softcap)``, both in units of base-2 exponents."""
    return softcap * (2.0 / (1.0 + tl.exp2(-2.0 * 1.4426950408889634 * x / softcap)) - 1.0)


# Triton would compile once more for each of these that happens to be 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=[
        "rows",
        "context",
        "extra",
        "q_row",
        "out_row",
        "out_split",
        "lse_split",
        "ek_row",
        "ev_row",
        "window",
    ]
)
def _attention_kernel(
    q, position, k, v, table, out, lse, known, extra_k, extra_v, extra_position, count,
    rows, length, extra, scale, softcap, q_row, out_row, out_split, lse_split,
    k_block, k_place, k_head, v_block, v_place, v_head, ek_row, ev_row, window,
    SIZE: tl.constexpr, SHARE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, KNOWN: tl.constexpr,
    EXTRA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FITS_32_BITS: tl.constexpr,
    WITHOUT_LAST: tl.constexpr, ONLY_LAST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    splits, context = tl.num_programs(2), tl.load(length)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    g, z = tl.program_id(1), tl.program_id(2)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # The query heads that share a KV head lie side by side in a tile: its keys are loaded once
    # for all of them, and few rows still fill a matrix product.
    to_row, head = m // SHARE, g * SHARE + m % SHARE
    live, row = to_row < rows, to_row
    if ONLY_LAST:
        # Only the device knows how many rows are real, so a CUDA graph serves any number.
        row = to_row + tl.maximum(tl.load(count) - LAST, 0)
        live = live & (row < tl.load(count))
    d = tl.arange(0, BLOCK_D)
    FULL_D: tl.constexpr = DIM == BLOCK_D
    in_d = d < DIM
    at = tl.load(position + row, mask=live, other=-1).to(tl.int32)
    if WITHOUT_LAST:  # they see nothing in this launch
        at = tl.where(row < tl.load(count) - LAST, at, -1)
    live = live & (at >= 0)
    queries = tl.load(
        q + row[:, None] * q_row + head[:, None] * DIM + d[None],
        mask=live[:, None] & in_d[None], other=0.0,
    )  # fmt: skip
    # Softmax while the keys go by (FlashAttention): acc and total are sums of weights relative
    # to 2 ** most. They fade when a larger logit comes. Base 2, because exp2 is one instruction.
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    last = tl.minimum(tl.max(at) + 1, context)  # keys [first, last) concern this tile
    first_row = tl.min(tl.where(live, at, 1 << 30))
    first = 0
    if WINDOW:
        # down to a multiple of BLOCK_N, at which every step starts
        first = tl.maximum(first_row - window + 1, 0) // BLOCK_N * BLOCK_N
    blocks = tl.cdiv(last - first, BLOCK_N)
    # each split takes some of the keys; _combine_kernel joins their softmaxes
    each = tl.cdiv(blocks, splits)
    begin = first + z * each * BLOCK_N
    end = tl.minimum(begin + each * BLOCK_N, last)
    n = tl.arange(0, BLOCK_N)
    plain = begin
    if not (WINDOW or KNOWN):  # keys that every row of the tile sees
        # Every row of the tile stands behind these keys, so they need no mask: most steps.
        plain = tl.maximum(begin, tl.minimum(end, first_row + 1) // BLOCK_N * BLOCK_N)
    # block numbers are read a step ahead, or every load of keys would wait for its own
    ahead = tl.load(table + (begin + n) // SIZE, mask=begin + n < plain, other=0)
    for start in range(begin, plain, BLOCK_N):
        j = start + n
        block = ahead if FITS_32_BITS else ahead.to(tl.int64)
        # a step starts at a multiple of BLOCK_N
        inside = n % SIZE if BLOCK_N % SIZE == 0 else j % SIZE
        k_at = (k + g * k_head) + ((block * k_block + inside * k_place)[None] + d[:, None])
        v_at = (v + g * v_head) + ((block * v_block + inside * v_place)[:, None] + d[None])
        keys = tl.load(k_at) if FULL_D else tl.load(k_at, mask=in_d[:, None], other=0.0)
        ahead = tl.load(table + (j + BLOCK_N) // SIZE, mask=j + BLOCK_N < plain, other=0)
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        if SOFTCAP:
            logits = _cap(logits, softcap)
        new = tl.maximum(most, tl.max(logits, 1))
        weights = tl.exp2(logits - new[:, None])
        fade = tl.exp2(most - new)
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(v_at) if FULL_D else tl.load(v_at, mask=in_d[None], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        most = new
    # rows far apart in one tile: the earlier ones leave most keys to these steps
    ahead = tl.load(table + (plain + n) // SIZE, mask=plain + n < end, other=0)
    for start in range(plain, end, BLOCK_N):
        j = start + n
        there = j < end
        block = ahead if FITS_32_BITS else ahead.to(tl.int64)
        inside = n % SIZE if BLOCK_N % SIZE == 0 else j % SIZE
        see = (j[None] <= at[:, None]) & there[None] & live[:, None]
        if WINDOW:
            see = see & (at[:, None] - j[None] < window)
        if KNOWN:
            see = see & (tl.load(known + j, mask=there, other=0) != 0)[None]
        k_at = (k + g * k_head) + ((block * k_block + inside * k_place)[None] + d[:, None])
        v_at = (v + g * v_head) + ((block * v_block + inside * v_place)[:, None] + d[None])
        keys = tl.load(k_at, mask=there[None] & in_d[:, None], other=0.0)
        ahead = tl.load(table + (j + BLOCK_N) // SIZE, mask=j + BLOCK_N < end, other=0)
        values = tl.load(v_at, mask=there[:, None] & in_d[None], other=0.0)
        acc, most, total = _masked(
            queries, acc, most, total, keys, values, see, scale, softcap, SOFTCAP
        )
    if EXTRA:  # noqa: SIM102 - decided when compiled, the inner one when run
        # in one split, or these keys would count once in each
        if z == splits - 1:
            for first_x in range(0, extra, BLOCK_N):
                x = first_x + n
                there = x < extra
                where = tl.load(extra_position + x, mask=there, other=1 << 30).to(tl.int32)
                # An extra key without a position lies at 1 << 30: no row sees it.
                see = (where[None] <= at[:, None]) & there[None] & live[:, None]
                if WINDOW:
                    see = see & (at[:, None] - where[None] < window)
                keys = tl.load(
                    extra_k + x[None] * ek_row + g * DIM + d[:, None],
                    mask=there[None] & in_d[:, None], other=0.0,
                )  # fmt: skip
                values = tl.load(
                    extra_v + x[:, None] * ev_row + g * DIM + d[None],
                    mask=there[:, None] & in_d[None], other=0.0,
                )  # fmt: skip
                acc, most, total = _masked(
                    queries, acc, most, total, keys, values, see, scale, softcap, SOFTCAP
                )
    # a row without any key becomes 0, and its lse -inf: it weighs nothing beside other splits
    some = tl.where(total > 0, total, 1.0)
    result = tl.where(live[:, None], acc / some[:, None], 0.0)
    there = to_row < rows
    to = out + z * out_split + to_row[:, None] * out_row + head[:, None] * DIM + d[None]
    tl.store(to, result.to(out.dtype.element_ty), mask=there[:, None] & in_d[None])
    tl.store(
        lse + z * lse_split + to_row * HEADS + head,
        tl.where(live & (total > 0), most + tl.log2(some), -float("inf")), mask=there,
    )  # fmt: skip


@triton.jit
def _masked(q, acc, most, total, k, v, see, scale, softcap, SOFTCAP: tl.constexpr):
    """One block of keys, some of them hidden from some rows, into the running softmax."""
    logits = tl.dot(q, k, input_precision="ieee") * scale
    if SOFTCAP:
        logits = _cap(logits, softcap)
    logits = tl.where(see, logits, -float("inf"))
    new = tl.maximum(most, tl.max(logits, 1))
    # A row that has seen no key yet has no largest logit; -inf - -inf would be NaN, and stay so.
    sure = tl.where(new == -float("inf"), 0.0, new)
    weights = tl.exp2(logits - sure[:, None])
    fade = tl.exp2(most - sure)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new, total


@triton.jit(do_not_specialize=["split", "out_row"])
def _combine_kernel(
    partial, partial_lse, out, lse, count, split, out_row,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    ONLY_LAST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)  # row and head
    row = at // HEADS
    if ONLY_LAST:
        # the last rows only: partials begin at 0, the output where these rows are
        row += tl.maximum(tl.load(count) - LAST, 0)
        if row >= tl.load(count):
            return
    z, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    parts = tl.load(partial_lse + z * split + at)
    most = tl.max(parts, 0)
    sure = tl.where(most == -float("inf"), 0.0, most)
    weights = tl.exp2(parts - sure)
    total = tl.sum(weights, 0)
    some = tl.where(total > 0, total, 1.0)
    values = tl.load(
        partial + (z[:, None] * split + at) * DIM + d[None],
        mask=(d < DIM)[None], other=0.0,
    )  # fmt: skip
    result = tl.sum(values * (weights / some)[:, None], 0)
    to = out + row.to(tl.int64) * out_row + at % HEADS * DIM + d
    tl.store(to, result.to(out.dtype.element_ty), mask=d < DIM)
    tl.store(
        lse + row * HEADS + at % HEADS, tl.where(total > 0, sure + tl.log2(some), -float("inf"))
    )


@triton.jit(do_not_specialize=["rows", "q_row", "lse_row", "score_group", "window"])
def _score_kernel(
    q, position, lse, k, table, known, score,
    rows, length, scale, softcap, q_row, lse_row, k_block, k_place, k_head, score_group, window,
    SIZE: tl.constexpr, SHARE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, KNOWN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    g, context = tl.program_id(1), tl.load(length)
    # launched for the longest context that the graph may meet
    if tl.program_id(0) * BLOCK_N >= context:
        return
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    there, in_d = j < context, d < DIM
    block = tl.load(table + j // SIZE, mask=there, other=0).to(tl.int64)
    keys = tl.load(
        k + (block * k_block + j % SIZE * k_place)[None] + g * k_head + d[:, None],
        mask=there[None] & in_d[:, None], other=0.0,
    )  # fmt: skip
    open_j = there
    if KNOWN:
        open_j = open_j & (tl.load(known + j, mask=there, other=0) != 0)
    # A program owns its keys and goes through all rows itself. Atomic adds of programs that own
    # rows would round differently from run to run, and a prompt would get other tokens chosen.
    got = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows * SHARE, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row, head = m // SHARE, g * SHARE + m % SHARE
        live = row < rows
        at = tl.load(position + row, mask=live, other=-1).to(tl.int32)
        queries = tl.load(
            q + row[:, None] * q_row + head[:, None] * DIM + d[None],
            mask=live[:, None] & in_d[None], other=0.0,
        )  # fmt: skip
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        if SOFTCAP:
            logits = _cap(logits, softcap)
        # the softmax's denominator, known from the attention of these rows
        total = tl.load(lse + row * lse_row + head, mask=live, other=0.0)
        see = (j[None] <= at[:, None]) & open_j[None] & live[:, None]
        if WINDOW:
            see = see & (at[:, None] - j[None] < window)
        got += tl.sum(tl.where(see, tl.exp2(logits - total[:, None]), 0.0), 0)
    to = score + g * score_group + j
    tl.store(to, tl.load(to, mask=there, other=0.0) + got, mask=there)
