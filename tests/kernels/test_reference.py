"""The plain-torch operations against definitions written out."""

from __future__ import annotations

import math

import pytest
import torch

from cacheblend_kernels import (
    key_deviation,
    masked_attention,
    nearness,
    question_attention,
    rerotate,
    window_average,
)

SHAPES = [(1, 1, 32, 16), (7, 3, 64, 64), (53, 2, 96, 24), (130, 5, 80, 80)]  # N, G, D, rotary
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def rope(k: torch.Tensor, positions: torch.Tensor, rotary: int, is_neox: bool) -> torch.Tensor:
    """RoPE by complex numbers, in float64."""
    theta = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None].double() * theta)
    x, rest = k[..., :rotary].double(), k[..., rotary:].double()
    if is_neox:
        pairs = torch.complex(*x.chunk(2, -1)) * turn[:, None]
        return torch.cat([pairs.real, pairs.imag, rest], -1)
    pairs = torch.complex(x[..., ::2].contiguous(), x[..., 1::2].contiguous()) * turn[:, None]
    return torch.cat([torch.view_as_real(pairs).flatten(-2), rest], -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rerotated_keys_equal_keys_rotated_there(
    shape: tuple[int, int, int, int], is_neox: bool, dtype: torch.dtype
) -> None:
    n, groups, dim, rotary = shape
    torch.manual_seed(n)
    k = torch.randn(n, groups, dim)
    old, new = torch.randint(0, 4000, (n,)), torch.randint(0, 4000, (n,))
    stored = rope(k, old, rotary, is_neox).to(dtype)
    theta = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angle = (new - old)[:, None].double() * theta
    moved = rerotate(stored, angle.cos().float(), angle.sin().float(), is_neox=is_neox)
    assert moved.dtype == dtype and moved.shape == stored.shape
    expected = rope(k, new, rotary, is_neox)
    torch.testing.assert_close(moved.double(), expected, atol=TOLERANCE[dtype], rtol=1e-2)


def test_rotated_dimensions_may_lie_anywhere_and_layers_differ() -> None:
    k, angle = torch.randn(3, 9, 2, 64), torch.randn(3, 9, 16)
    moved = rerotate(k, angle.cos(), angle.sin(), is_neox=False, first=20)
    for layer in range(3):
        cos, sin = angle[layer].cos(), angle[layer].sin()
        alone = rerotate(k[layer, ..., 20:52], cos, sin, is_neox=False)
        assert torch.equal(moved[layer, ..., 20:52], alone)
    assert torch.equal(moved[..., :20], k[..., :20])
    assert torch.equal(moved[..., 52:], k[..., 52:])


def test_rerotation_by_nothing_changes_nothing() -> None:
    k = torch.randn(9, 2, 64, dtype=torch.bfloat16)
    same = rerotate(k, torch.ones(9, 32), torch.zeros(9, 32), is_neox=True)
    assert torch.equal(same, k)


def attention(q, k, v, visible, scale, softcap, sinks):  # type: ignore[no-untyped-def]
    """One query, one head at a time."""
    rows, heads, _ = q.shape
    out, score = torch.zeros(rows, heads, v.shape[-1]), torch.zeros(len(k))
    for r in range(rows):
        for h in range(heads):
            g = h * k.shape[1] // heads
            logits = (k[:, g] @ q[r, h]) * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logits[~visible[r]] = -math.inf
            sink = [] if sinks is None else [sinks[h : h + 1]]
            weights = torch.cat([logits, *sink]).softmax(0)[: len(k)]
            out[r, h], score = weights @ v[:, g], score + weights
    return out, score


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(
    ("rows", "keys", "heads", "groups"), [(1, 1, 1, 1), (5, 23, 6, 2), (9, 9, 4, 4)]
)
def test_attention(
    rows: int, keys: int, heads: int, groups: int, softcap: float, has_sinks: bool
) -> None:
    torch.manual_seed(rows)
    q, k, v = (
        torch.randn(rows, heads, 32),
        torch.randn(keys, groups, 32),
        torch.randn(keys, groups, 32),
    )
    visible = torch.rand(rows, keys) < 0.6
    visible[:, 0] = True
    sinks = torch.randn(heads) if has_sinks else None
    options = {"scale": 0.3, "softcap": softcap, "sinks_H": sinks}
    expected, expected_score = attention(q, k, v, visible, 0.3, softcap, sinks)
    out, score = question_attention(q, k, v, visible, **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score, expected_score, atol=1e-5, rtol=1e-4)
    again = masked_attention(q, k, v, visible, **options)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)


def test_key_deviation_is_the_squared_distance() -> None:
    a, b = torch.randn(6, 2, 32), torch.randn(6, 2, 32)
    expected = torch.stack([(x - y).norm() ** 2 for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(key_deviation(a, b), expected)


@pytest.mark.parametrize("window", [1, 3, 9])
def test_window_average(window: int) -> None:
    score = torch.rand(20)
    half = window // 2
    padded = [0.0] * half + score.tolist() + [0.0] * half
    expected = [sum(padded[i : i + window]) / window for i in range(20)]
    torch.testing.assert_close(window_average(score, window), torch.tensor(expected))


def test_nearness_ends_at_four_reaches_and_between_chunks() -> None:
    at = torch.tensor([10, 50, 51])
    sources = torch.tensor([12, 30])
    weight = nearness(at, sources, 10)
    near, far = math.exp(-0.2), math.exp(-2)
    expected = torch.tensor([[near, far], [math.exp(-3.8), far], [math.exp(-3.9), math.exp(-2.1)]])
    torch.testing.assert_close(weight, expected / (1 + expected.sum(1, keepdim=True)))
    beyond = nearness(torch.tensor([52, 53]), sources, 10)
    assert beyond[0, 0] > 0 and beyond[1, 0] == 0, "40 tokens are heard, 41 are not"
    alone = nearness(at, sources, 10, torch.tensor([[True, False]] * 3))
    torch.testing.assert_close(alone[0], torch.tensor([near / (1 + near), 0.0]))
