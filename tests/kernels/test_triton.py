"""Triton kernels against their plain-torch twins; on the GPU where there is one, else in Triton's
interpreter (``TRITON_INTERPRET=1``, which conftest sets before Triton is imported).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from cacheblend_kernels.paged import PagedKV
from cacheblend_kernels.reference import masked_softmax, moved, placed, question_attention
from cacheblend_kernels.reference import rotation_deltas as reference_deltas

pytest.importorskip("triton", reason="this platform has no Triton")
from cacheblend_kernels import propagate as propagate_module
from cacheblend_kernels.angles import rotation_deltas
from cacheblend_kernels.attention import Extra, _parts, question_scores, scattered_attention
from cacheblend_kernels.propagate import Propagation, Propagator, propagate
from cacheblend_kernels.rotate_and_scatter import Sources, rotate_and_scatter
from cacheblend_kernels.softmax import masked_softmax as softmax

pytestmark = pytest.mark.anywhere

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def paged(num_tokens: int, size: int, groups: int, dim: int, dtype: torch.dtype) -> PagedKV:
    """A cache in vLLM's layout [B, G, S, 2 D], its blocks in random order, with room to spare."""
    used = -(-num_tokens // size)
    cache = torch.randn(used + 5, groups, size, 2 * dim, device=DEVICE).to(dtype)
    k, v = cache.transpose(1, 2).split(dim, -1)
    table = torch.randperm(used + 5, device=DEVICE)[:used].int()
    length = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    return PagedKV(k, v, table, length, num_tokens)


class Shape(NamedTuple):
    context: int
    rows: int
    heads: int
    groups: int
    dim: int
    size: int


SHAPES = [
    Shape(64, 1, 1, 1, 16, 16),
    Shape(77, 9, 6, 2, 32, 16),
    Shape(150, 33, 14, 2, 64, 48),  # blocks that a step of keys does not divide into
    Shape(333, 40, 4, 4, 80, 128),
    Shape(700, 70, 4, 2, 128, 16),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (64, 32), (80, 80), (128, 128), (96, 24)])
def test_place(dim: int, rotary: int, is_neox: bool, dtype: torch.dtype, is_aligned: bool) -> None:
    torch.manual_seed(dim)
    groups, lengths, layers = 3, (21, 50, 7), 2
    chunks = [
        torch.randn(layers, 2, n, groups, dim, device=DEVICE).to(dtype).contiguous()
        for n in lengths
    ]
    picks = [(0, r) for r in range(21)] + [(2, r) for r in (3, 4, 6)] + [(1, r) for r in range(49)]
    chunk_N, row_N = (torch.tensor(x, device=DEVICE) for x in zip(*picks, strict=True))
    positions = torch.randperm(130, device=DEVICE)[: len(picks)].sort().values
    angle = torch.rand(len(picks), rotary // 2, device=DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()
    caches = [paged(130, 16, groups, dim, dtype) for _ in range(layers)]
    caches[1] = caches[1]._replace(table=caches[0].table)
    twins = [c._replace(k_BSGD=c.k_BSGD.clone(), v_BSGD=c.v_BSGD.clone()) for c in caches]
    for layer, twin in enumerate(twins):
        k = torch.stack([chunks[c][layer, 0, r] for c, r in picks])
        v = torch.stack([chunks[c][layer, 1, r] for c, r in picks])
        placed(k, v, cos, sin, positions, twin, is_neox=is_neox)
    sources = Sources(
        torch.tensor(
            [[c[layer].data_ptr() for c in chunks] for layer in range(layers)], device=DEVICE
        ),
        torch.tensor(lengths, device=DEVICE),
        chunk_N.int(),
        row_N.int(),
    )
    addresses = torch.tensor(
        [[c.k_BSGD.data_ptr(), c.v_BSGD.data_ptr()] for c in caches], device=DEVICE
    )
    rotate_and_scatter(
        sources, cos, sin, positions, caches[0], addresses, is_neox=is_neox, is_aligned=is_aligned
    )
    for cache, twin in zip(caches, twins, strict=True):
        torch.testing.assert_close(cache.v_BSGD, twin.v_BSGD, atol=0, rtol=0)
        torch.testing.assert_close(cache.k_BSGD, twin.k_BSGD, atol=TOLERANCE[dtype], rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (64, 32), (80, 80), (128, 128), (96, 24)])
def test_move(dim: int, rotary: int, is_neox: bool, dtype: torch.dtype) -> None:
    """In two passes, over chunks with holes between them."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    torch.manual_seed(dim)
    context, groups, propagation_length = 300, 2, 6
    cache = paged(context, 16, groups, dim, dtype)
    chunk_N = torch.full((context,), -1, dtype=torch.int32, device=DEVICE)
    for number, (start, end) in enumerate([(5, 90), (90, 120), (140, 290)]):
        chunk_N[start:end] = number
    position_R = torch.randperm(context, device=DEVICE)[:50].sort().values
    chunk_R = chunk_N[position_R]
    chosen = torch.zeros(context, dtype=torch.bool, device=DEVICE)
    chosen[position_R] = True
    moves = (chunk_N >= 0) & ~chosen
    chunk_N = chunk_N.masked_fill(chosen, -1)
    before = F.pad(chosen.cumsum(0), (1, 0)).int()
    k, v = torch.randn(2, 50, groups, dim, device=DEVICE).to(dtype)
    angle = torch.arange(context, device=DEVICE)[:, None] * torch.rand(rotary // 2, device=DEVICE)
    cos, sin = angle.cos(), angle.sin()

    everywhere = torch.arange(context, device=DEVICE)
    old_k, old_v = (x.clone() for x in cache.gather(everywhere))
    twin = cache._replace(k_BSGD=cache.k_BSGD.clone(), v_BSGD=cache.v_BSGD.clone())
    pass_2 = torch.tensor([0, 50], dtype=torch.int32, device=DEVICE)
    propagation_length_1 = torch.tensor([float(propagation_length)], device=DEVICE)
    propagation = Propagation(chunk_N, position_R, chunk_R, before, pass_2, propagation_length_1)
    moved(propagation, k, v, twin, cos, sin, is_neox=is_neox)
    for some in (slice(0, 21), slice(21, 50)):
        here = torch.tensor([some.start, some.stop - some.start], device=DEVICE).int()
        fresh = (F.pad(x[some], (0, 0, 0, 0, 0, 7), value=9.0) for x in (k, v))  # rows to spare
        propagate(propagation._replace(pass_2=here), *fresh, cache, cos, sin, is_neox=is_neox)
    new_k, new_v = cache.gather(everywhere)
    assert torch.equal(new_k[~moves], old_k[~moves]) and torch.equal(new_v[~moves], old_v[~moves])
    bound = 2 * TOLERANCE[dtype]
    expected = twin.gather(everywhere)
    for new, old, want in zip((new_k, new_v), (old_k, old_v), expected, strict=True):
        torch.testing.assert_close(new.float(), want.float(), atol=bound, rtol=1e-2)
        assert (want - old)[moves].abs().max() > 0.1


def latents(num_tokens: int, size: int, dim: int, dtype: torch.dtype) -> PagedKV:
    """A cache of latents in vLLM's layout [B, S, D], as ``paged``."""
    used = -(-num_tokens // size)
    k = torch.randn(used + 5, size, 1, dim, device=DEVICE).to(dtype)
    table = torch.randperm(used + 5, device=DEVICE)[:used].int()
    length = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    return PagedKV(k, k[..., :0], table, length, num_tokens)


def twin_cache(cache: PagedKV) -> PagedKV:
    k = cache.k_BSGD.clone()
    return cache._replace(k_BSGD=k, v_BSGD=k[..., :0])


@pytest.mark.parametrize(("tables", "pairs", "count"), [(1, 64, 1), (2, 12, 50), (3, 32, 0)])
def test_rotation_deltas(tables: int, pairs: int, count: int) -> None:
    torch.manual_seed(count)
    positions = 200
    scale = torch.rand(tables, 1, pairs, device=DEVICE) + 0.5
    angle = torch.rand(tables, positions, pairs, device=DEVICE) * 6
    cos, sin, inverse_m2 = angle.cos() * scale, angle.sin() * scale, 1 / scale[:, 0] ** 2
    old, new = torch.randint(0, positions, (2, count), device=DEVICE)
    new[::3] = old[::3]  # these stay
    ours, want = (
        rotation_deltas(cos, sin, inverse_m2, old, new),
        reference_deltas(cos, sin, inverse_m2, old, new),
    )
    for mine, theirs in zip(ours, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
        assert torch.equal(mine[:, ::3], theirs[:, ::3]), "what stays keeps its bits"
    moved = angle[:, new] - angle[:, old]
    torch.testing.assert_close(ours[0], moved.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[1], moved.sin(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [5, 1024, 2500])
def test_softmax(keys: int, dtype: torch.dtype) -> None:
    torch.manual_seed(keys)
    heads, at_T = 3, torch.tensor([keys, 1, -1, keys // 2], device=DEVICE)
    at_X = torch.arange(keys, device=DEVICE)
    at_X[1::3] = 1 << 30  # which no row may see
    at_X[-1] = 0
    logits = torch.randn(heads * len(at_T), keys, device=DEVICE) * 20
    given = logits.clone()
    how: Any = {"scale": 0.3, "dtype": dtype}
    ours, want = softmax(logits, at_T, at_X, **how), masked_softmax(logits, at_T, at_X, **how)
    assert ours.dtype == dtype and torch.equal(logits, given)
    torch.testing.assert_close(ours, want, atol=TOLERANCE[dtype] / 8, rtol=1e-2)
    seen = (at_X[None] <= at_T[:, None]).repeat(heads, 1)
    assert not want[~seen].any() and not ours[~seen].any()
    sums = torch.tensor([1.0, 1.0, 0.0, 1.0], device=DEVICE).repeat(heads)
    torch.testing.assert_close(want.float().sum(1), sums, atol=1e-2, rtol=0)
    torch.testing.assert_close(ours.float().sum(1), sums, atol=1e-2, rtol=0)


LATENTS = [(512, 64), (32, 16), (24, 8)]  # of no position, and rotated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("first", "rotary"), LATENTS)
def test_place_latents(
    first: int, rotary: int, is_neox: bool, dtype: torch.dtype, is_aligned: bool
) -> None:
    torch.manual_seed(first)
    dim, lengths = first + rotary, (21, 50)
    chunks = [torch.randn(1, 1, n, 1, dim, device=DEVICE).to(dtype) for n in lengths]
    picks = [(0, r) for r in range(21)] + [(1, r) for r in range(3, 49)]
    chunk_N, row_N = (torch.tensor(x, device=DEVICE) for x in zip(*picks, strict=True))
    positions = torch.randperm(130, device=DEVICE)[: len(picks)].sort().values
    angle = torch.rand(len(picks), rotary // 2, device=DEVICE) * 6
    cache = latents(130, 16, dim, dtype)
    twin = twin_cache(cache)
    k = torch.stack([chunks[c][0, 0, r] for c, r in picks])
    how: Any = {"is_neox": is_neox, "first": first}
    placed(k, k[..., :0], angle.cos(), angle.sin(), positions, twin, **how)
    sources = Sources(
        torch.tensor([[c.data_ptr() for c in chunks]], device=DEVICE),
        torch.tensor(lengths, device=DEVICE),
        chunk_N.int(),
        row_N.int(),
    )
    address = torch.tensor([[cache.k_BSGD.data_ptr(), 0]], device=DEVICE)
    rotate_and_scatter(
        sources, angle.cos(), angle.sin(), positions, cache, address, is_aligned=is_aligned, **how
    )
    assert torch.equal(cache.k_BSGD[..., :first], twin.k_BSGD[..., :first])
    torch.testing.assert_close(cache.k_BSGD, twin.k_BSGD, atol=TOLERANCE[dtype], rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("first", "rotary"), LATENTS)
def test_move_latents(first: int, rotary: int, is_neox: bool, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    torch.manual_seed(first)
    context, dim = 200, first + rotary
    cache = latents(context, 16, dim, dtype)
    chunk_N = torch.zeros(context, dtype=torch.int32, device=DEVICE)
    chunk_N[90:] = 1
    position_R = torch.randperm(context, device=DEVICE)[:30].sort().values
    chosen = torch.zeros(context, dtype=torch.bool, device=DEVICE)
    chosen[position_R] = True
    propagation = Propagation(
        chunk_N.masked_fill(chosen, -1), position_R, chunk_N[position_R],
        F.pad(chosen.cumsum(0), (1, 0)).int(),
        torch.tensor([0, 30], dtype=torch.int32, device=DEVICE),
        torch.tensor([6.0], device=DEVICE),
    )  # fmt: skip
    k = torch.randn(30, 1, dim, device=DEVICE).to(dtype)
    angle = torch.arange(context, device=DEVICE)[:, None] * torch.rand(rotary // 2, device=DEVICE)
    twin, again = twin_cache(cache), twin_cache(cache)
    before, how = cache.k_BSGD.clone(), {"is_neox": is_neox, "first": first}
    fresh = k, k[..., :0]
    moved(propagation, *fresh, twin, angle.cos(), angle.sin(), **how)
    propagate(propagation, *fresh, cache, angle.cos(), angle.sin(), **how)
    bound = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(cache.k_BSGD, twin.k_BSGD, atol=bound, rtol=1e-2)
    for part in (slice(0, first), slice(first, dim)):
        assert (twin.k_BSGD - before)[..., part].abs().max() > 0.1
    run = Propagator(propagation, angle.cos()[None], angle.sin()[None], **how)
    run(0, *fresh, again)
    assert torch.equal(again.k_BSGD, cache.k_BSGD)


class InPlaceOfCompiled:
    """What Triton would have compiled, where it interprets: takes all arguments in order."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., object]:
        return lambda *args: self._kernel[grid](*args, num_warps=4)


def test_layers_that_share_what_is_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh K and V as parts of one product, and once elsewhere in memory; two tables."""
    prepared: list[str] = []
    launches: dict[str, Any] = {}
    for name in ("off", "move"):

        def launched(*args: Any, name: str = name, **options: Any) -> Any:
            prepared.append(name)
            kernel = getattr(propagate_module, f"_{name}_kernel")
            return launches[name](*args, **options) or InPlaceOfCompiled(kernel)

        launches[name] = getattr(propagate_module, f"_launch_{name}")
        monkeypatch.setattr(propagate_module, f"_launch_{name}", launched)
    torch.manual_seed(3)
    context, groups, dim, rows, dtype = 300, 2, 64, 40, torch.float16
    layers = [paged(context, 16, groups, dim, dtype) for _ in range(5)]
    table, length = layers[0].table, layers[0].length
    layers = [layer._replace(table=table, length=length) for layer in layers]
    twins = [c._replace(k_BSGD=c.k_BSGD.clone(), v_BSGD=c.v_BSGD.clone()) for c in layers]
    position_R = torch.arange(3, 3 + 7 * rows, 7, device=DEVICE)
    chosen = torch.zeros(context, dtype=torch.bool, device=DEVICE)
    chosen[position_R] = True
    chunk_N = torch.zeros(context, dtype=torch.int32, device=DEVICE)
    propagation = Propagation(
        chunk_N.masked_fill(chosen, -1), position_R, chunk_N[position_R],
        F.pad(chosen.cumsum(0), (1, 0)).int(),
        torch.tensor([0, rows], dtype=torch.int32, device=DEVICE),
        torch.tensor([9.0], device=DEVICE),
    )  # fmt: skip
    angle = torch.arange(context, device=DEVICE)[:, None] * torch.rand(2, 1, dim // 2).to(DEVICE)
    cos, sin = angle.cos(), angle.sin()
    run = Propagator(propagation, cos, sin, is_neox=True)
    for number, (cache, twin) in enumerate(zip(layers, twins, strict=True)):
        qkv = torch.randn(rows, 4 * groups * dim, device=DEVICE).to(dtype)
        first = 3 if number == 2 else 0  # not at a multiple of 16 bytes
        parts = qkv[:, first : first + 2 * groups * dim].split(groups * dim, -1)
        k, v = (part.view(rows, groups, dim) for part in parts)
        propagate(propagation, k, v, twin, cos[number % 2], sin[number % 2], is_neox=True)
        before = cache.k_BSGD.clone()
        run(number % 2, k, v, cache)
        assert not torch.equal(cache.k_BSGD, before)
        assert torch.equal(cache.k_BSGD, twin.k_BSGD) and torch.equal(cache.v_BSGD, twin.v_BSGD)
    once = 2 * len(layers) - 1  # layer 3 is as layer 1 was
    assert sorted(prepared) == ["move"] * once + ["off"] * once


def twin_of(q, positions, cache, context, *, extra, known, window, scale, softcap):  # type: ignore[no-untyped-def]
    """Output and score by ``question_attention`` over gathered keys."""
    at = torch.arange(context, device=DEVICE)
    k, v = cache.gather(at)
    seen = torch.ones(context, dtype=torch.bool, device=DEVICE) if known is None else known
    if extra is not None:
        k, v = torch.cat([k, extra.k_XGD]), torch.cat([v, extra.v_XGD])
        at = torch.cat([at, extra.position_X])
        seen = torch.cat([seen, torch.ones_like(extra.position_X, dtype=torch.bool)])
    distance = positions[:, None] - at[None]
    visible = (distance >= 0) & seen
    if window is not None:
        visible &= distance < window
    return question_attention(q, k, v, visible, scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["plain", "window", "softcap", "holes", "extra", "everything"])
def test_attention_and_scores(case: str, shape: Shape, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    if DEVICE == "cpu" and dtype == torch.float16 and shape.context > 100:
        pytest.skip("slow in Triton's interpreter; float32 has these shapes")
    torch.manual_seed(shape.context)
    every = case == "everything"
    window = max(5, shape.context // 3) if case == "window" or every else None
    softcap = 7.0 if case == "softcap" or every else 0.0
    scale = 1.3 * shape.dim**-0.5
    cache = paged(shape.context, shape.size, shape.groups, shape.dim, dtype)
    known = extra = None
    rows = shape.rows
    positions = torch.randperm(shape.context, device=DEVICE)[:rows].sort().values
    if case == "holes" or every:
        known = torch.rand(shape.context, device=DEVICE) < 0.7
        known[positions] = True  # a row sees itself
    if case == "extra" or every:
        ask = min(17, rows)
        behind = torch.arange(ask, device=DEVICE) + shape.context + 3
        positions = torch.cat([positions[: rows - ask], behind])
        kv = torch.randn(2, ask, shape.groups, shape.dim, device=DEVICE).to(dtype)
        extra = Extra(kv[0], kv[1], behind)
    q = torch.randn(rows, shape.heads, shape.dim, device=DEVICE).to(dtype)
    out = torch.full_like(q, torch.nan)
    options = {"scale": scale, "softcap": softcap, "window": window, "known_N": known}
    lse = scattered_attention(q, positions, cache, out, extra=extra, want_lse=True, **options)
    expected, weights = twin_of(
        q, positions, cache, shape.context, extra=extra, known=known, window=window,
        scale=scale, softcap=softcap,
    )  # fmt: skip
    torch.testing.assert_close(out.float(), expected.float(), atol=TOLERANCE[dtype], rtol=1e-2)
    score = torch.ones(shape.groups, shape.context, device=DEVICE)
    question_scores(q, positions, lse, cache, score, **options)
    got = (score - 1).sum(0)
    bound = TOLERANCE[dtype] * max(1.0, float(weights.max()))
    torch.testing.assert_close(got, weights[: shape.context], atol=bound, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scattered", "question", "spare"),
    [(150, 20, 0), (100, 64, 25), (100, 90, 40), (3, 5, 200), (0, 40, 150)],
)
def test_the_last_rows_apart(
    scattered: int,
    question: int,
    spare: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A question of fewer, as many and more rows than are taken apart, and rows to spare."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 matrices as integers")
    torch.manual_seed(scattered)
    context, heads, groups, dim = 320, 4, 2, 32
    cache = paged(context, 16, groups, dim, dtype)
    early = torch.randperm(context - question, device=DEVICE)[:scattered].sort().values
    late = torch.arange(context - question, context, device=DEVICE)
    positions = F.pad(torch.cat([early, late]), (0, spare), value=-1)
    rows = scattered + question
    q = torch.randn(len(positions), heads, dim, device=DEVICE).to(dtype)
    out = torch.full_like(q, torch.nan)
    count = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr("cacheblend_kernels.attention._PROGRAMS", 8)  # so few rows fill a GPU
    assert len(_parts(len(q), heads // groups, cache, split=True)) == 2
    lse = scattered_attention(
        q, positions, cache, out, scale=0.3, softcap=7.0, count_1=count, want_lse=True
    )
    expected, _ = twin_of(
        q[:rows], positions[:rows], cache, context, extra=None, known=None, window=None,
        scale=0.3, softcap=7.0,
    )  # fmt: skip
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(out[:rows].float(), expected.float(), atol=bound, rtol=1e-2)
    assert not out[rows:].any()
    plain = scattered_attention(
        q, positions, cache, torch.empty_like(q), scale=0.3, softcap=7.0, want_lse=True
    )
    torch.testing.assert_close(lse[:rows], plain[:rows], atol=bound, rtol=1e-2)


@pytest.mark.parametrize("size", [16, 128])
def test_a_cache_too_large_for_32_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cache = paged(300, size, 2, 64, torch.float32)
    positions = torch.arange(3, 300, 7, device=DEVICE)
    q = torch.randn(len(positions), 4, 64, device=DEVICE)
    near, far = torch.empty_like(q), torch.empty_like(q)
    scattered_attention(q, positions, cache, near, scale=0.1)
    monkeypatch.setattr("cacheblend_kernels.attention._fits_32_bits", lambda cache: False)
    scattered_attention(q, positions, cache, far, scale=0.1)
    assert torch.equal(near, far)
    expected, _ = twin_of(
        q, positions, cache, 300, extra=None, known=None, window=None, scale=0.1, softcap=0.0
    )
    torch.testing.assert_close(near, expected, atol=1e-4, rtol=1e-3)


def test_queries_see_nothing_after_them() -> None:
    """Changing the future changes nothing, though a tile reads it."""
    torch.manual_seed(0)
    cache = paged(200, 16, 2, 64, torch.float32)
    positions = torch.arange(50, device=DEVICE) + 60
    q = torch.randn(50, 4, 64, device=DEVICE)
    before, after = torch.empty_like(q), torch.empty_like(q)
    scattered_attention(q, positions, cache, before, scale=0.1)
    block, inside = cache.slots(torch.arange(90, 200, device=DEVICE))
    cache.v_BSGD[block, inside] = torch.nan_to_num(torch.tensor(1e4))
    scattered_attention(q, positions, cache, after, scale=0.1)
    assert torch.equal(before[:30], after[:30]) and not torch.equal(before[30:], after[30:])


def test_rows_without_a_position_and_a_bound_beyond_the_context() -> None:
    """What a CUDA graph of a larger size does: rows to spare, programs for keys that are not."""
    torch.manual_seed(0)
    cache = paged(200, 16, 2, 64, torch.float32)
    positions = torch.tensor([3, 70, 199] + [-1] * 90, device=DEVICE)
    q = torch.randn(93, 4, 64, device=DEVICE)
    small, large = torch.empty_like(q[:3]), torch.full_like(q, torch.nan)
    scores = torch.zeros(2, 2, 2000, device=DEVICE)
    for rows, out, score, most in ((3, small, scores[0], 200), (93, large, scores[1], 2000)):
        view = cache._replace(most=most)
        lse = scattered_attention(q[:rows], positions[:rows], view, out, scale=0.1, want_lse=True)
        question_scores(q[:rows], positions[:rows], lse, view, score, scale=0.1)
    torch.testing.assert_close(large[:3], small, atol=1e-5, rtol=0)
    assert torch.equal(large[3:], torch.zeros_like(large[3:]))
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=0)
    assert not scores[1][:, 200:].any() and scores[1][:, :200].any()


# --- what launchers assume -----------------------------------------------------------------------


def across(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, with the last dimension no longer in one piece."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def test_attention_asserts_the_layout_of_rows() -> None:
    cache = paged(40, 16, 2, 16, torch.float32)
    q = torch.randn(3, 4, 16, device=DEVICE)
    at = torch.arange(3, device=DEVICE)
    for queries, out in ((across(q), q.clone()), (q, across(q)), (q, torch.empty(3, 4, 8))):
        with pytest.raises(AssertionError):
            scattered_attention(queries, at, cache, out, scale=1.0)
    scores = torch.zeros(40, 2, device=DEVICE).t()
    with pytest.raises(AssertionError):
        question_scores(q, at, torch.zeros(3, 4, device=DEVICE), cache, scores, scale=1.0)


def test_placing_asserts_what_addresses_and_angles_are() -> None:
    cache = paged(40, 16, 2, 16, torch.float32)
    kv = torch.randn(1, 2, 5, 2, 16, device=DEVICE)
    five = torch.arange(5, device=DEVICE)
    address = torch.tensor([[kv.data_ptr()]], device=DEVICE)
    sources = Sources(address, torch.tensor([5], device=DEVICE), five * 0, five)
    to = torch.tensor([[cache.k_BSGD.data_ptr(), cache.v_BSGD.data_ptr()]], device=DEVICE)
    angle = torch.ones(5, 8, device=DEVICE)
    for given, angles, targets in (
        (sources._replace(address_KC=address.int()), angle, to),
        (sources._replace(row_N=five[:4]), angle, to),
        (sources, across(angle), to),
        (sources, angle.half(), to),
        (sources, angle, to.int()),
        (sources, angle, to.repeat(2, 1)),
    ):
        with pytest.raises(AssertionError):
            rotate_and_scatter(given, angles, angles, five, cache, targets, is_neox=True)


def test_propagation_asserts_the_layout_of_rows() -> None:
    cache = paged(40, 16, 2, 16, torch.float32)
    fresh = torch.randn(2, 2, 16, device=DEVICE)
    chunk = torch.zeros(40, dtype=torch.int32, device=DEVICE)
    two, before = torch.arange(2, device=DEVICE), torch.zeros(41, dtype=torch.int32, device=DEVICE)
    length = torch.ones(1, device=DEVICE)
    how = Propagation(chunk, two, chunk[:2], before, chunk[:2], length)
    angle = torch.ones(40, 8, device=DEVICE)
    for k, v, cos in (
        (across(fresh), fresh, angle),
        (fresh, fresh[:1], angle),
        (fresh, fresh, across(angle)),
    ):
        with pytest.raises(AssertionError):
            propagate(how, k, v, cache, cos, angle, is_neox=True)
