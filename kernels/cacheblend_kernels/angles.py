# mypy: allow-untyped-defs, allow-incomplete-defs
"""The further angles of keys that move from one position to another: one launch for a request.

Shape legend: T tables, X positions, N tokens, P rotated pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cacheblend_kernels.launch import Launcher

_TOKENS = 16  # a program


def rotation_deltas(
    cos_TXP: torch.Tensor,
    sin_TXP: torch.Tensor,
    inverse_m2_TP: torch.Tensor,
    old_N: torch.Tensor,
    new_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as ``reference.rotation_deltas``."""
    (tables, positions, pairs), n = cos_TXP.shape, len(old_N)
    assert sin_TXP.shape == cos_TXP.shape and inverse_m2_TP.shape == (tables, pairs)
    assert old_N.dtype == new_N.dtype == torch.int64 and new_N.shape == (n,)
    for each in (cos_TXP, sin_TXP, inverse_m2_TP, old_N, new_N):
        assert each.is_contiguous()
    for each in (cos_TXP, sin_TXP, inverse_m2_TP):
        assert each.dtype == torch.float32
    cos_TNP, sin_TNP = cos_TXP.new_empty(2, tables, n, pairs)
    if n:
        _launch(
            (triton.cdiv(n, _TOKENS), tables, 1),
            (cos_TXP, sin_TXP, inverse_m2_TP, old_N, new_N, cos_TNP, sin_TNP, n, positions),
            {"PAIRS": pairs, "BLOCK_N": _TOKENS, "BLOCK_P": triton.next_power_of_2(pairs)},
            num_warps=4,
        )
    return cos_TNP, sin_TNP


@triton.jit(do_not_specialize=["n", "positions"])
def _rotation_deltas_kernel(
    cos, sin, inverse_m2, old, new, out_cos, out_sin, n, positions,
    PAIRS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64 bits: several tables of a million positions are more numbers than 32 bits count
    table = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    here = t < n
    some = here[:, None] & (p < PAIRS)[None]
    before = tl.load(old + t, mask=here, other=0)
    after = tl.load(new + t, mask=here, other=0)
    from_old = (table * positions + before)[:, None] * PAIRS + p[None]
    from_new = (table * positions + after)[:, None] * PAIRS + p[None]
    cos_old, sin_old = tl.load(cos + from_old, mask=some), tl.load(sin + from_old, mask=some)
    cos_new, sin_new = tl.load(cos + from_new, mask=some), tl.load(sin + from_new, mask=some)
    scale = tl.load(inverse_m2 + table * PAIRS + p, mask=p < PAIRS)[None]
    stays = (before == after)[:, None]
    turned_cos = (cos_new * cos_old + sin_new * sin_old) * scale
    turned_sin = (sin_new * cos_old - cos_new * sin_old) * scale
    at = (table * n + t)[:, None] * PAIRS + p[None]
    tl.store(out_cos + at, tl.where(stays, 1.0, turned_cos), some)
    tl.store(out_sin + at, tl.where(stays, 0.0, turned_sin), some)


_launch = Launcher(_rotation_deltas_kernel)
