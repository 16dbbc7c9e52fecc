"""A prompt of several chunks, and what every family must do with it."""

from __future__ import annotations

from typing import Any

import torch
from engines import EXACT, FULL_LOGPROBS, logprobs, selected
from reference import Answer, Part, Reference
from tiny import Words

from cacheblend_rag import BlendResult, CacheBlend
from cacheblend_rag.config import PROPAGATION_LENGTH

words = Words(1)
PREFIX, HEAD, GLUE, QUESTION = words(4), words(9), words(3), words(40)
A, B, C = words(37), words(50), words(130)


def layout(block_size: int = 32) -> list[Part]:
    """Head, chunks with and without glue, one of them twice; ends on a block."""
    parts = [Part(HEAD, False), Part(C, True), Part(A, True), Part(GLUE, False), Part(B, True)]
    parts.append(Part(A, True))
    short = -sum(len(p.ids) for p in parts) % block_size
    last = words(32 + short)
    return [*parts, Part(last, True)]


PARTS = layout()
IDS = tuple(t for p in PARTS for t in p.ids)
PROMPT = IDS + QUESTION


def blends_as_the_reference(blend: CacheBlend, reference: Reference) -> str:
    """Ratio 1 equals a full prefill, ratio 0 naive reuse, and those between them the reference.

    Returns:
        How far log-probabilities are off at ratio 1, at most.
    """
    plain = blend.generate(PROMPT, mode="full", **FULL_LOGPROBS)
    exact = blend.generate(PROMPT, recompute_ratio=1.0, **FULL_LOGPROBS)
    assert exact.report.blended, exact.report.detail
    assert exact.report.tokens_reused == 0
    assert exact.token_ids == plain.token_ids
    torch.testing.assert_close(logprobs(exact), logprobs(plain), atol=EXACT, rtol=0)

    naive = blend.generate(PROMPT, mode="reuse", **FULL_LOGPROBS)
    assert naive.report.blended, naive.report.detail
    assert naive.report.tokens_recomputed == 0
    fresh = [
        i for i, is_stored in enumerate(p.stored for p in PARTS for _ in p.ids) if not is_stored
    ]
    assert selected(blend, naive) == fresh
    agree(naive, reference.blend(PARTS, QUESTION, fresh, 4))
    assert (logprobs(naive) - logprobs(plain)).abs().max() > 1e-2, "reuse must differ from full"

    for selector in ("query", "hkvd"):
        some = blend.generate(PROMPT, recompute_ratio=0.2, selector=selector, **FULL_LOGPROBS)
        rows = selected(blend, some)
        assert set(fresh) < set(rows) and 0 < some.report.tokens_recomputed < 0.25 * len(IDS)
        agree(
            some, reference.blend(PARTS, QUESTION, rows, 4, propagation_length=PROPAGATION_LENGTH)
        )
    return f"{float((logprobs(exact) - logprobs(plain)).abs().max()):.0e}"


def agree(result: BlendResult, answer: Answer) -> None:
    """The same tokens, and log-probabilities but for rounding."""
    assert list(result.token_ids) == answer.tokens
    torch.testing.assert_close(logprobs(result), answer.logprobs, atol=2 * EXACT, rtol=0)


def forget_prompts(blend: CacheBlend) -> None:
    """Nothing is answered from what an earlier request left in the prefix cache of an engine of
    this process.
    """
    core: Any = blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    assert core.scheduler.reset_prefix_cache()
