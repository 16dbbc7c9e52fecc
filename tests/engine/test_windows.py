"""Models with sliding windows, on prompts longer than the window.

Where all layers have the same window, vLLM gives what lies before it the null block, which nobody
may write: then a blend covers the prompt's first tokens, and vLLM computes the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engines import FULL_LOGPROBS, logprobs, selected, start_in_process
from reference import Part, Reference
from tiny import Words, make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import BlendResult, CacheBlend
from cacheblend_rag.config import PROPAGATION_LENGTH
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]

# On a GPU, kernels round by batch shape
EXACT = 1e-3 if torch.cuda.is_available() else 1e-4
WINDOW = 96
UNIFORM = ("mistral", "starcoder2", "phi3")  # the others have layers without a window too
words = Words(7)
PREFIX = words(4)
A, B, C, D = (words(size) for size in (50, 37, 130, 90))
QUESTION = words(40)
PARTS = [
    Part(words(9), False), Part(C, True), Part(A, True),
    Part(words(3), False), Part(D, True), Part(B, True),
]  # fmt: skip
LONG = tuple(itertools.chain(*(p.ids for p in PARTS), QUESTION))
BEYOND = words(43) + B + QUESTION  # than the window, by less than a block
WITHIN = words(3) + A + QUESTION


class Family(NamedTuple):
    """An engine that has stored the chunks, and its model."""

    blend: CacheBlend
    reference: Reference
    uniform: bool

    @property
    def longest(self) -> int:
        """Tokens that a blend of a long prompt covers."""
        block = self.blend.info.block_size
        whole = len(LONG) - len(QUESTION)
        return (WINDOW + block - 2 if self.uniform else whole) // block * block


@pytest.fixture(scope="module", params=[*UNIFORM, "gemma2"])
def family(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[Family]:
    path = make(request.param, tiny_models / "windows", sliding_window=WINDOW)
    reference = Reference(path, PREFIX)  # first: an engine's start changes transformers' classes
    with start_in_process(path, prefix=PREFIX) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        blend.ingest([A, B, C, D], progress=False)
        yield Family(blend, reference, request.param in UNIFORM)


@pytest.fixture(autouse=True)
def nothing_cached(family: Family) -> None:
    """No test is answered from what an earlier one left in vLLM's prefix cache."""
    core = family.blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    assert core.scheduler.reset_prefix_cache()


@pytest.fixture
def null_block(family: Family) -> Iterator[None]:
    """The test leaves alone what is in block 0."""
    layers = get_kv_transfer_group().blender.handle.layers  # type: ignore[attr-defined]
    before = [layer.kv_cache[0].clone() for layer in layers]
    yield
    assert all(torch.equal(layer.kv_cache[0], b) for layer, b in zip(layers, before, strict=True))


@pytest.mark.parametrize("prompt", [WITHIN, BEYOND, LONG], ids=["within", "beyond", "long"])
def test_ratio_1_equals_a_full_prefill(
    family: Family, null_block: None, prompt: tuple[int, ...]
) -> None:
    plain = family.blend.generate(prompt, mode="full", **FULL_LOGPROBS)
    options = {"recompute_ratio": 1.0, **FULL_LOGPROBS}
    exact = family.blend.generate(prompt, **options)
    assert exact.report.blended, exact.report.detail
    assert exact.token_ids == plain.token_ids
    torch.testing.assert_close(logprobs(exact), logprobs(plain), atol=EXACT, rtol=0)
    # what vLLM kept of it is exact too, where the window has moved on meanwhile
    again = family.blend.generate(prompt, **options)
    assert again.report.reason is Reason.PREFIX_CACHED
    torch.testing.assert_close(logprobs(again), logprobs(plain), atol=EXACT, rtol=0)


def test_a_long_prompt_blends_as_the_reference(family: Family, null_block: None) -> None:
    blend, reference = family.blend, family.reference
    parts, rest = cut(family.longest)
    fresh = [i for i, stored in enumerate(p.stored for p in parts for _ in p.ids) if not stored]
    naive = blend.generate(LONG, mode="reuse", **FULL_LOGPROBS)
    assert naive.report.tokens_reused == family.longest - len(fresh)
    agree(naive, reference, parts, rest, selected(blend, naive))
    for selector in ("query", "hkvd"):
        some = blend.generate(LONG, recompute_ratio=0.3, selector=selector, **FULL_LOGPROBS)
        rows = selected(blend, some)
        assert set(fresh) < set(rows)
        agree(some, reference, parts, rest, rows, PROPAGATION_LENGTH)


def agree(
    result: BlendResult,
    reference: Reference,
    parts: list[Part],
    rest: tuple[int, ...],
    rows: list[int],
    propagation_length: int = 0,
) -> None:
    assert result.report.blended, result.report.detail
    answer = reference.blend(parts, rest, rows, 4, propagation_length)
    assert list(result.token_ids) == answer.tokens
    torch.testing.assert_close(logprobs(result), answer.logprobs, atol=2 * EXACT, rtol=0)


def cut(end: int) -> tuple[list[Part], tuple[int, ...]]:
    """The parts of the long prompt up to ``end``, and the tokens behind it."""
    parts, at = [], 0
    for part in PARTS:
        parts.append(Part(part.ids[: max(0, end - at)], part.stored))
        at += len(part.ids)
    return [p for p in parts if p.ids], LONG[end:]


def test_the_gate_says_how_far_blends_reach(family: Family) -> None:
    block = family.blend.info.block_size
    assert family.blend.info.window == WINDOW
    assert family.blend.model_check.max_tokens == (WINDOW + block - 2 if family.uniform else None)


def test_a_prompt_whose_chunks_lie_behind_the_window_says_so(family: Family) -> None:
    prompt = words(200) + C + QUESTION
    report = family.blend.generate(prompt, mode="reuse", **FULL_LOGPROBS).report
    assert report.blended is not family.uniform
    if family.uniform:
        assert report.reason is Reason.SLIDING_WINDOW
