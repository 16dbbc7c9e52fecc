"""Chunks of a token, prompts of chunks only, prompts that end with the model's last position."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blending import IDS, PARTS, PREFIX, forget_prompts, words
from engines import EXACT, FULL_LOGPROBS, logprobs, selected, start_in_process
from reference import Part, Reference
from tiny import make

from cacheblend_rag import CacheBlend

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LENGTH = 512
ONE, OTHER, TWO, BLOCKS = words(1), words(1), words(2), words(64)
PROMPTS = {
    "one chunk": [Part(BLOCKS, True)],
    "the same twice": [Part(BLOCKS, True), Part(BLOCKS, True)],
    "a token, a chunk": [Part(ONE, True), Part(BLOCKS, True)],
    "tokens between": [
        Part(words(5), False), Part(TWO, True), Part(BLOCKS, True), Part(OTHER, True)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def opened(tiny_models: Path) -> Iterator[tuple[CacheBlend, Reference]]:
    path = make("llama", tiny_models / "short", max_position_embeddings=LENGTH)
    reference = Reference(path, PREFIX)
    with start_in_process(path, prefix=PREFIX, max_model_len=LENGTH) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        chunks = [ONE, OTHER, TWO, BLOCKS, *(p.ids for p in PARTS if p.stored)]
        blend.ingest(chunks, progress=False)
        yield blend, reference


@pytest.mark.parametrize("question", [1, 0])
@pytest.mark.parametrize("name", PROMPTS)
def test_short_prompts(opened: tuple[CacheBlend, Reference], name: str, question: int) -> None:
    blend, reference = opened
    prompt = tuple(t for part in PROMPTS[name] for t in part.ids) + words(question)
    full = reference.full(prompt, 4)
    for options in ({"mode": "full"}, {"recompute_ratio": 1.0}):
        forget_prompts(blend)
        result = blend.generate(prompt, **options, **FULL_LOGPROBS)
        assert list(result.token_ids) == full.tokens
        torch.testing.assert_close(logprobs(result), full.logprobs, atol=2 * EXACT, rtol=0)
    forget_prompts(blend)
    reused = blend.generate(prompt, mode="reuse", **FULL_LOGPROBS)
    assert reused.report.blended, reused.report.detail
    assert reused.report.tokens_reused > 0


@pytest.mark.parametrize("steps", [4, 1])
def test_a_prompt_that_ends_with_the_last_position(
    opened: tuple[CacheBlend, Reference], steps: int
) -> None:
    blend, reference = opened
    question = words(LENGTH - steps - len(IDS))
    asked = {**FULL_LOGPROBS, "max_tokens": steps}
    full = reference.full(IDS + question, steps)
    exact = blend.generate(IDS + question, recompute_ratio=1.0, **asked)
    assert exact.report.blended, exact.report.detail
    torch.testing.assert_close(logprobs(exact), full.logprobs, atol=2 * EXACT, rtol=0)
    forget_prompts(blend)
    some = blend.generate(IDS + question, recompute_ratio=0.2, propagation_length=0, **asked)
    rows = selected(blend, some)
    answer = reference.blend(PARTS, question, rows, steps)
    torch.testing.assert_close(logprobs(some), answer.logprobs, atol=2 * EXACT, rtol=0)
