# mypy: allow-untyped-defs, allow-incomplete-defs
"""Softmax of logits over the keys that a row sees, rounded as it is written.

Shape legend: R rows, X keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cacheblend_kernels.launch import Launcher

_KEYS = 1024  # a step


def masked_softmax(
    logits_RX: torch.Tensor,
    at_T: torch.Tensor,
    at_X: torch.Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same as ``reference.masked_softmax``. Reads the logits twice and writes once."""
    rows, keys = logits_RX.shape
    assert logits_RX.is_contiguous() and logits_RX.dtype == torch.float32
    assert at_T.is_contiguous() and at_X.is_contiguous() and at_X.shape == (keys,)
    assert not rows % len(at_T)
    out = torch.empty(rows, keys, dtype=dtype, device=logits_RX.device)
    _launch(
        (rows, 1, 1),
        (logits_RX, at_T, at_X, out, len(at_T), keys, scale * 1.4426950408889634),
        {"BLOCK": _KEYS},
        num_warps=4,
    )
    return out


@triton.jit
def _softmax_kernel(logits, at_row, at_key, out, tokens, keys, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(at_row + row % tokens)
    x = tl.arange(0, BLOCK)
    logits += row * keys
    # Each lane has a softmax of its own while the keys go by; they are joined behind. Base 2,
    # because exp2 is one instruction.
    most = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, keys, BLOCK):
        logit = _logits(logits, at_key, at, start + x, keys, scale)
        new = tl.maximum(most, logit)
        # -inf - -inf would be NaN, and stay so
        sure = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2(most - sure) + tl.exp2(logit - sure)
        most = new
    largest = tl.max(most, 0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    whole = tl.sum(total * tl.exp2(most - largest), 0)
    # a row without any key becomes 0
    share = tl.where(whole > 0, 1.0 / tl.where(whole > 0, whole, 1.0), 0.0)
    out += row * keys
    for start in range(0, keys, BLOCK):
        logit = _logits(logits, at_key, at, start + x, keys, scale)
        weight = tl.exp2(logit - largest) * share
        tl.store(out + start + x, weight.to(out.dtype.element_ty), mask=start + x < keys)


@triton.jit
def _logits(logits, at_key, at, j, keys, scale):
    """Logits of the keys ``j``, -inf of those that are not seen."""
    there = j < keys
    seen = there & (tl.load(at_key + j, mask=there, other=0) <= at)
    logit = tl.load(logits + j, mask=there, other=0.0) * scale
    return tl.where(seen, logit, -float("inf"))


_launch = Launcher(_softmax_kernel)
