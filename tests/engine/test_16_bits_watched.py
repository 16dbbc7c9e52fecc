"""Refinement and the shadow in 16 bits, as GPUs run them: as near to exact as rounding lets be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EAGER_AND_COMPILED, FULL_LOGPROBS, logprobs, start_in_process
from refining import ASK, CHUNKS, PREFIX, PROMPT, kv_of, reset
from shadows import SAMPLING, computed, forced
from tiny import Words, make

from cacheblend_rag import BlendConfig, CacheBlend

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]

words = Words(43)
FURTHER = words(20)


@pytest.fixture(scope="module", params=EAGER_AND_COMPILED)
def watched(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[CacheBlend]:
    """An engine that shadows all."""
    config = BlendConfig(ingest_prefix=PREFIX, blend_if="always", recompute_ratio=0.05, shadow=1.0)
    options: dict[str, Any] = {"dtype": "bfloat16", "block_size": 64}  # that all kernels take
    if request.param == "compiled":
        options["enforce_eager"] = False
    with start_in_process(make("llama", tiny_models), config=config, **options) as opened:
        opened.ingest(CHUNKS, progress=False)
        yield opened


@pytest.fixture(autouse=True)
def nothing_cached(watched: CacheBlend) -> None:
    reset(watched)


def quiet(watched: CacheBlend) -> CacheBlend:
    """The same engine, where nothing is drawn to be shadowed: such an answer is not refined."""
    return watched.with_config(
        BlendConfig(ingest_prefix=PREFIX, blend_if="always", recompute_ratio=0.05)
    )


def off(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The mean distance of two lists of tensors, over the mean size of the second."""
    apart = sum(
        float((a.float() - b.float()).abs().mean()) for a, b in zip(one, other, strict=True)
    )
    return apart / sum(float(b.float().abs().mean()) for b in other)


def test_refined_kv_is_a_plain_prefills_but_for_rounding(
    watched: CacheBlend, record_property: Any
) -> None:
    blend = quiet(watched)
    refined = blend.generate(PROMPT, refine=64, max_tokens=70, **ASK)
    assert refined.report.blended and refined.report.refined, refined.report
    whole = PROMPT + tuple(refined.token_ids)
    ours = kv_of(blend, whole)
    second = blend.generate(whole + FURTHER, **FULL_LOGPROBS)
    assert second.report.tokens_prefix_cached >= len(ours[0]) * 64
    reset(blend)
    # in two parts, or in one: rounding differs
    blend.generate(whole[:130], mode="off", max_tokens=1)
    blend.generate(whole, mode="off", max_tokens=1)
    parts = kv_of(blend, whole)[: len(ours)]
    reset(blend)
    blend.generate(whole, mode="off", max_tokens=1)
    plain = [kv[: len(ours[0])] for kv in kv_of(blend, whole)]
    rounding, far = off([kv[: len(ours[0])] for kv in parts], plain), off(ours, plain)
    reset(blend)
    exact = blend.generate(whole + FURTHER, mode="full", **FULL_LOGPROBS)
    turn = off([logprobs(second)[0]], [logprobs(exact)[0]])
    reset(blend)
    left = blend.generate(PROMPT, max_tokens=2, **ASK)
    assert left.report.blended
    approximate = blend.generate(whole + FURTHER, **FULL_LOGPROBS)
    unlike = off([logprobs(approximate)[0]], [logprobs(exact)[0]])
    record_property("KV, refined and rounding", f"{far:.1e}, {rounding:.1e}")
    record_property("next turn, refined and not", f"{turn:.1e}, {unlike:.1e}")
    assert far < max(3 * rounding, 0.02)
    assert turn < unlike / 3


def test_a_shadow_is_that_of_an_exact_run_but_for_rounding(watched: CacheBlend) -> None:
    result = watched.generate(PROMPT, **SAMPLING)
    assert result.report.blended
    found = computed(watched, result)
    exact, blended = forced(watched, PROMPT, result.token_ids), logprobs(result)
    kl = (exact.exp() * (exact - blended)).sum(-1).mean().item()
    assert found.state == "done" and found.tokens == len(result.token_ids)
    assert found.kl == pytest.approx(kl, rel=0.1) and kl > 0.01
