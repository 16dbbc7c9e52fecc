"""A selector of one's own: what it asks for is gathered, what it chooses is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from engines import selected, start_in_process
from tiny import Words, make

from cacheblend_rag import CacheBlend
from cacheblend_rag.engine.executor import Region
from cacheblend_rag.select import (
    SELECTORS,
    AskedLayers,
    Evidence,
    KVDeviation,
    QuestionAttention,
    Selector,
)

pytestmark = pytest.mark.vllm

words = Words(51)
PREFIX = words(4)
CHUNKS = [words(size) for size in (70, 90)]
PROMPT = words(9) + CHUNKS[1] + CHUNKS[0] + words(40)


@dataclass(frozen=True, kw_only=True)
class Asked(Selector):
    """What the question looks at in early layers."""

    name: ClassVar[str] = "asked"

    @property
    def evidence(self) -> QuestionAttention:
        return QuestionAttention((0.0, 0.5))

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.question_N is not None and evidence.deviation_N is None
        return evidence.question_N


@dataclass(frozen=True, kw_only=True)
class Deviating(Selector):
    """What deviates in a layer that its option names."""

    name: ClassVar[str] = "deviating"
    at: int = 2

    @property
    def evidence(self) -> KVDeviation:
        return KVDeviation(self.at, values=True)

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.deviation_N is not None and evidence.question_N is None
        return evidence.deviation_N


@dataclass(frozen=True, kw_only=True)
class Last(Selector):
    """The last tokens of chunks; needs no evidence."""

    name: ClassVar[str] = "last"

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.question_N is None and evidence.deviation_N is None
        return evidence.offset_N.float()


@pytest.fixture(scope="module")
def blend(tiny_models: Path) -> Iterator[CacheBlend]:
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Asked, Deviating, Last):
            patch.setitem(SELECTORS, kind.name, kind)
        with start_in_process(make("llama", tiny_models), prefix=PREFIX) as opened:
            opened.ingest(CHUNKS, progress=False)
            yield opened


def chosen(blend: CacheBlend, selector: str, **options: object) -> list[int]:
    core = blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    assert core.scheduler.reset_prefix_cache()
    result = blend.generate(
        PROMPT,
        selector=selector,
        selector_options=options,
        recompute_ratio=0.2,
        max_tokens=2,
        temperature=0.0,
    )
    assert result.report.blended, result.report.detail
    assert result.report.selector == selector and result.report.tokens_recomputed > 20
    return selected(blend, result)


def test_it_gets_the_attention_it_asks_for(blend: CacheBlend) -> None:
    same = {"window": 1, "first_share": 0.0}
    asked = chosen(blend, "asked")
    assert asked == chosen(blend, "query", layers=(0.0, 0.5), **same)
    assert asked != chosen(blend, "query", layers=(0.5, 1.0), **same)


def test_it_gets_the_deviation_it_asks_for(blend: CacheBlend) -> None:
    one, three = (chosen(blend, "deviating", at=layer) for layer in (1, 3))
    assert one == chosen(blend, "hkvd", check_layer=1, deviation="kv") != three
    assert three == chosen(blend, "hkvd", check_layer=3, deviation="kv")


def test_it_may_need_no_evidence(blend: CacheBlend) -> None:
    first, last = set(chosen(blend, "first_k")), set(chosen(blend, "last"))
    assert 9 in first - last and 98 in last - first  # the first chunk is at [9, 99)


@pytest.mark.parametrize(
    ("asked", "glue", "sees_from", "along"),
    [
        (90, [40, 41], 2, [0, 1, 2, 3, 40, 41]),
        (90, [2, 40], 2, [0, 1, 2, 3, 40]),
        (3, [], 1, [0, 1, 2]),
        (90, [2, 40], 0, [2, 40]),  # all of it is seen in the paged cache
    ],
)
def test_a_prompts_first_tokens_run_along_where_the_context_is_seen_late(
    asked: int, glue: list[int], sees_from: int, along: list[int]
) -> None:
    region: Any = SimpleNamespace(asked=asked)
    found = Region.along(region, np.array(glue, dtype=np.int64), AskedLayers((4,), sees_from))
    assert found.tolist() == along
