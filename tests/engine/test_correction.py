"""How reused tokens are moved as recomputed ones around them were; no engine is started."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_kernels import nearness
from cacheblend_rag.engine.correction import Correction
from cacheblend_rag.engine.rope import Rerotator, Table

pytestmark = pytest.mark.vllm

END, GROUPS, SIZE, LENGTH = 60, 2, 8, 5
SPANS = [(4, 20), (23, 44), (44, 58)]  # chunks; what is between them is computed afresh
SOURCES = [6, 7, 15, 25, 40, 50]
KV = tuple[torch.Tensor, torch.Tensor]


def rope() -> Rerotator:
    angle = torch.arange(128.0)[:, None] * 0.7 ** torch.arange(SIZE // 2)
    return Rerotator([Table(angle.cos(), angle.sin(), True)], [0, 0], torch.device("cpu"))


class Case:
    """A blend: which rows are computed, and K and V of all tokens, stored and fresh."""

    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(3)
        new = [torch.randn(END, GROUPS, SIZE, generator=draw).to(dtype) for _ in range(4)]
        self.reused: KV = (new[0], new[1])
        self.fresh: KV = (new[2], new[3])
        self.candidate = torch.zeros(END, dtype=torch.bool)
        for start, end in SPANS:
            self.candidate[start:end] = True
        between = (~self.candidate).nonzero().flatten().tolist()
        self.rows = torch.tensor(sorted([*SOURCES, *between]))

    def correction(self) -> Correction:
        spans = [(start, end, None) for start, end in SPANS]
        executor: Any = SimpleNamespace(region=SimpleNamespace(spans=spans), rope=rope())
        return Correction(executor, self.candidate, self.rows, LENGTH)

    def run(self, correction: Correction, *ends: int) -> list[KV | None]:
        """Passes that end behind these rows."""
        done: list[KV | None] = []
        for first, last in pairwise((0, *ends)):
            correction.goes_on = last < len(self.rows)
            tile = self.rows[first:last]
            fresh = (self.fresh[0][tile], self.fresh[1][tile])
            done.append(correction.propagate(1, tile, fresh, self.reused))
        return done

    def slow(self, moved: torch.Tensor) -> KV:
        """One token after the other, keys as at position 0."""
        turn, zero = rope(), torch.zeros(1, dtype=torch.int64)
        k, v = (part[moved].float() for part in self.reused)
        for number, at in enumerate(moved.tolist()):
            span = next(span for span in SPANS if span[0] <= at < span[1])
            for source in (s for s in SOURCES if span[0] <= s < span[1]):
                near = torch.tensor([s for s in SOURCES if span[0] <= s < span[1]])
                weights = nearness(torch.tensor([at]), near, LENGTH)[0]
                weight = weights[near.tolist().index(source)]
                off_k, off_v = (
                    f[source].float() - r[source].float()
                    for f, r in zip(self.fresh, self.reused, strict=True)
                )
                there = torch.tensor([at])
                off_k = turn.apply(off_k[None], turn.delta(torch.tensor([source]), zero), 1)
                k[number] += weight * turn.apply(off_k, turn.delta(zero, there), 1)[0]
                v[number] += weight * off_v
        return k.to(self.reused[0].dtype), v.to(self.reused[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_a_slow_twin_computes(dtype: torch.dtype) -> None:
    case = Case(dtype)
    correction = case.correction()
    [moved] = case.run(correction, len(case.rows))
    assert moved is not None
    for one, other in zip(moved, case.slow(correction.moved_N), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)
    assert not correction._sums


@pytest.mark.parametrize("ends", [(3,), (7, 12), (1, 2, 9)])
def test_the_last_of_several_passes_is_what_one_computes(ends: tuple[int, ...]) -> None:
    case = Case(torch.float32)
    correction = case.correction()
    [whole] = case.run(case.correction(), len(case.rows))
    last = case.run(correction, *ends, len(case.rows))[-1]
    assert whole is not None and last is not None
    torch.testing.assert_close(last, whole)
    assert not correction._sums


def test_tokens_that_get_blocks_behind_all_sources_are_moved() -> None:
    """The last pass has rows behind the chunks only; what it opens is moved by those before."""
    case = Case(torch.float32)
    behind = int(torch.searchsorted(case.rows, torch.tensor(SOURCES[-1]))) + 1
    whole, last = case.run(case.correction(), behind, len(case.rows))
    assert whole is not None and last is not None
    torch.testing.assert_close(last, whole)


def test_nothing_is_moved_before_a_source_was_computed() -> None:
    case = Case(torch.float32)
    assert case.run(case.correction(), 2)[0] is None
