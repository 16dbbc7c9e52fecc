"""The question's pass over latents in a paged cache, against the dense twin: no engine, no GPU."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_kernels import masked_attention, question_attention
from cacheblend_kernels.paged import PagedKV
from cacheblend_rag.engine import latent_pass, layout
from cacheblend_rag.engine.kernel_pass import NEVER, NOWHERE, PassRows
from cacheblend_rag.engine.latent_pass import LatentQuestionPass, check
from cacheblend_rag.select import AskedLayers

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, LATENT, ROTATED, OTHERS, VALUE, SIZE = 6, 32, 8, 12, 16, 16


class Layer:
    """Of latent attention, with the weights that vLLM makes of its projection."""

    kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim = LATENT, ROTATED, OTHERS, VALUE
    num_heads = HEADS

    def __init__(self) -> None:
        up = torch.randn(LATENT, HEADS, OTHERS + VALUE, device=DEVICE) / LATENT**0.5
        self.impl = SimpleNamespace(scale=(OTHERS + ROTATED) ** -0.5)
        self.W_UK_T = up[..., :OTHERS].permute(1, 2, 0).contiguous()
        self.W_UV = up[..., OTHERS:].transpose(0, 1).contiguous()
        self.kv_b_proj = lambda latents: (latents @ up.flatten(1), None)


class Handle:
    """One layer, and a cache that it writes as vLLM does: slots of -1 are none."""

    device = torch.device(DEVICE)

    def __init__(self, cache_BSD: torch.Tensor) -> None:
        self.layers = [Layer()]
        self._rows = cache_BSD.flatten(0, 1)

    def write(self, index: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        self._rows[slots[slots >= 0]] = k[slots >= 0, 0]


def on_device(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


class Case:
    """A question of 3 tokens behind a context of 70, and two tokens between chunks."""

    end, glue, ahead, spare = 70, [20, 41], [0, 1], 3

    def __init__(self) -> None:
        torch.manual_seed(5)
        cache = torch.randn(9, SIZE, LATENT + ROTATED, device=DEVICE)
        self.handle: Any = Handle(cache)
        k = cache[:, :, None]
        table = torch.randperm(8, device=DEVICE)[:6].int() + 1
        length = torch.tensor([self.end], dtype=torch.int32, device=DEVICE)
        self.view = PagedKV(k, layout.no_values(k), table, length, 90)
        at = [*sorted({*self.glue, *self.ahead}), 80, 81, 82]
        rows = len(at) + self.spare
        slots = [self.slot(n) if n in self.glue else NOWHERE for n in at]
        first = len(at) - 3
        self.rows = PassRows(
            self.padded([7] * len(at), 0),
            self.padded(at, NOWHERE),
            self.padded([NOWHERE] * first + at[first:], NOWHERE),
            self.padded([NEVER] * first + at[first:], NEVER),
            self.padded(slots, NOWHERE),
        )
        self.at, self.asks = on_device(at), slice(first, len(at))
        self.q = torch.randn(rows, HEADS, OTHERS + ROTATED, device=DEVICE)
        self.k = torch.randn(rows, 1, LATENT + ROTATED, device=DEVICE)

    def slot(self, position: int) -> int:
        return int(self.view.table[position // SIZE]) * SIZE + position % SIZE

    def padded(self, values: list[int], filler: int) -> torch.Tensor:
        return on_device(values + [filler] * (len(self.glue + self.ahead) + 6 - len(values)))

    def run(
        self, layers: AskedLayers, known: torch.Tensor | None, index: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the pass puts out and what it sums."""
        score = torch.zeros(1, 128, device=DEVICE)
        step = LatentQuestionPass(self.handle, lambda _: self.view, self.rows, known, score, layers)
        out = torch.full((len(self.q), HEADS, VALUE), float("nan"), device=DEVICE)
        step.attend(index, self.handle.layers[0], self.q, self.k, layout.no_values(self.k), out)
        return out, score[0]


# of all heads together, of some, and of some rows
@pytest.mark.parametrize("logits", [1 << 23, 3000, 300])
@pytest.mark.parametrize("holes", [False, True])
def test_it_is_the_dense_twin(logits: int, holes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_pass, "_LOGITS", logits)
    case = Case()
    everywhere = torch.arange(case.end, device=DEVICE)
    known = torch.ones(90, dtype=torch.bool, device=DEVICE)
    if holes:
        known[50:60] = False
        for position in range(50, 60):  # where a chunk is missing there may be anything
            case.view.k_BSGD.flatten(0, 1)[case.slot(position)] = float("nan")
    case.view.k_BSGD.flatten(0, 1)[case.slot(case.end)] = float("nan")  # behind the context
    out, score = case.run(AskedLayers((0, 1), 0), known if holes else None)
    latents = case.view.gather(everywhere)[0].nan_to_num(0.0)
    fresh = case.k[: len(case.at)]
    assert torch.equal(latents[case.glue], fresh[[2, 3]]), "they were written before"
    layer = case.handle.layers[0]
    keys = torch.cat([latents, fresh[case.asks]])
    keys_at = torch.cat([everywhere, case.at[case.asks]])
    seen = torch.cat([known[: case.end], torch.ones(3, dtype=torch.bool, device=DEVICE)])
    sees = (case.at[:, None] >= keys_at) & seen
    k, v = layout.of_heads(layer, keys, layout.no_values(keys))
    how = {"scale": layer.impl.scale}
    want = masked_attention(case.q[: len(case.at)], k, v, sees, **how)
    torch.testing.assert_close(out[: len(case.at)], want, atol=1e-5, rtol=1e-5)
    _, scored = question_attention(case.q[case.asks], k, v, sees[case.asks], **how)
    torch.testing.assert_close(score[: case.end], scored[: case.end], atol=1e-5, rtol=1e-5)
    assert not score[case.end :].any()
    assert out.isfinite().all(), "rows to spare are no NaN"


def test_a_layer_that_is_not_summed_adds_nothing() -> None:
    case = Case()
    out, score = case.run(AskedLayers((3, 4), 0), None)
    summed, _ = case.run(AskedLayers((0, 4), 0), None)
    assert torch.equal(out, summed) and not score.any()


def test_below_the_layers_that_see_the_context_a_pass_sees_only_itself() -> None:
    case = Case()
    case.view.k_BSGD.fill_(float("nan"))
    out, score = case.run(AskedLayers((2,), 2), None)
    count = len(case.at)
    layer = case.handle.layers[0]
    k, v = layout.of_heads(layer, case.k[:count], layout.no_values(case.k[:count]))
    sees = case.at[:, None] >= case.at
    want = masked_attention(case.q[:count], k, v, sees, scale=layer.impl.scale)
    torch.testing.assert_close(out[:count], want, atol=1e-5, rtol=1e-5)
    assert not score.any() and out.isfinite().all()


def one_block(case: Case) -> PagedKV:
    none = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    return case.view._replace(table=none, length=none, most=SIZE)


def test_the_check_at_start_tells_a_layer_whose_weights_are_others() -> None:
    case = Case()
    assert check(case.handle, 0, one_block(case)) < 1e-4
    for name in ("W_UK_T", "W_UV"):
        layer = case.handle.layers[0]
        right = getattr(layer, name)
        setattr(layer, name, right.flip(0))  # another head's
        assert check(case.handle, 0, one_block(case)) > 0.1
        setattr(layer, name, right)
    case.handle.layers[0].impl.scale *= 4
    case.handle.layers[0].W_UK_T *= 2
    assert check(case.handle, 0, one_block(case)) > 0.1


def test_the_check_at_start_tells_a_backend_that_writes_slots_of_nothing() -> None:
    case = Case()
    case.handle.write = lambda index, k, v, slots: case.handle._rows.index_put_((slots,), k[:, 0])
    with pytest.raises(AssertionError, match="slots of -1"):
        check(case.handle, 0, one_block(case))  # where -1 is the last slot


@pytest.mark.parametrize(("count", "logits"), [(3, 2.0), (1, 9.0), (8, 0.5), (7, 3.5), (5, 100.0)])
def test_no_part_has_more_logits_than_it_may(count: int, logits: float) -> None:
    of_all = int(logits * latent_pass._LOGITS)
    parts = latent_pass._parts(count, of_all)
    sizes = [part.stop - part.start for part in parts]
    assert sum(sizes) == count and parts[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(parts))
    assert all(size == 1 or size * of_all <= count * latent_pass._LOGITS for size in sizes)
