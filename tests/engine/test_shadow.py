"""What the shadow finds is what an exact, teacher-forced run of vLLM's own says, and nobody else
notices it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EXACT, FULL_LOGPROBS, logprobs, start_in_process
from tiny import Words, make

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend
from cacheblend_rag.shadow.report import ShadowReport

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]

words = Words(11)
PREFIX, CHUNKS = words(4), [words(70), words(64), words(90)]
PROMPT = (*words(40), *(t for chunk in CHUNKS for t in chunk), *words(20))
SAMPLING: dict[str, Any] = {**FULL_LOGPROBS, "max_tokens": 12}
CONFIG = BlendConfig(ingest_prefix=PREFIX, blend_if="always", recompute_ratio=0.05, shadow=1.0)


@pytest.fixture(scope="module")
def blend(tiny_models: Path) -> Iterator[CacheBlend]:
    with start_in_process(make("llama", tiny_models), config=CONFIG) as opened:
        opened.ingest(CHUNKS, progress=False)
        yield opened


def computed(blend: CacheBlend, result: BlendResult) -> ShadowReport:
    """The shadow of an answer, once it is there."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        found = blend.shadow(result)
        assert found is not None
        if found.state != "waiting":
            return found
        time.sleep(0.05)
    raise AssertionError("the answer was never computed again")


def forced(blend: CacheBlend, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """[tokens, vocab] log-probabilities of vLLM's own prefills behind each token of the answer."""
    options: dict[str, Any] = {**SAMPLING, "max_tokens": 1, "mode": "full"}
    prompts = [(*prompt, *answer[:n]) for n in range(len(answer))]
    return torch.cat([logprobs(r) for r in blend.generate(prompts, **options)])


def test_the_figures_are_those_of_an_exact_run_forced_to_say_the_answer(blend: CacheBlend) -> None:
    # others have rows in the same steps
    _, result, _ = blend.generate([words(33), PROMPT, words(50)], **SAMPLING)
    assert result.report.blended and result.report.shadow is not None
    assert result.report.shadow.state == "waiting"
    found = computed(blend, result)
    exact, blended = forced(blend, PROMPT, result.token_ids), logprobs(result)
    kl = (exact.exp() * (exact - blended)).sum(-1).mean().item()
    same = exact.argmax(-1) == blended.argmax(-1)
    chosen = exact.argmax(-1) == torch.tensor(result.token_ids)
    assert kl > 100 * EXACT and not same.all()  # the model is such that blending shows
    assert found == ShadowReport(
        state="done",
        template=found.template,
        tokens=12,
        kl=pytest.approx(kl, rel=1e-3, abs=EXACT),
        agreement=pytest.approx(chosen.float().mean().item()),
        changed=True,
        first_changed=not bool(same[0]),
    )


def test_an_answer_at_ratio_one_is_unchanged(blend: CacheBlend) -> None:
    found = computed(blend, blend.generate(PROMPT, recompute_ratio=1.0, **SAMPLING))
    assert found.kl == pytest.approx(0, abs=EXACT) and found.agreement == 1
    assert found.changed is False and found.first_changed is False


def test_exact_answers_meanwhile_are_those_without_a_shadow(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shadow stands still in the middle of its forward while others are answered."""
    exact = blend.generate(PROMPT, mode="full", **SAMPLING)
    shadows = blend._shadows
    assert shadows is not None
    monkeypatch.setattr(shadows, "wake", lambda: None)  # this test goes on slice by slice
    result = blend.generate(PROMPT, recompute_ratio=0.1, **SAMPLING)
    steps = blend.engine.rpc("cacheblend_shadow", 1, -1)[0]
    assert steps["waiting"] == 1 and steps["seconds"] == 0
    begun = blend.engine.rpc("cacheblend_shadow", 3, steps["steps"])[0]
    assert begun["waiting"] == 1 and begun["done"] is None
    again = blend.generate(PROMPT, mode="full", **SAMPLING)
    assert again.token_ids == exact.token_ids
    assert torch.equal(logprobs(again), logprobs(exact))
    # the engine made steps meanwhile, so nothing is computed until it was seen to rest
    refused = blend.engine.rpc("cacheblend_shadow", 1000, begun["steps"])[0]
    assert refused["waiting"] == 1 and refused["seconds"] == 0 and refused["done"] is None
    done = blend.engine.rpc("cacheblend_shadow", 1000, refused["steps"])[0]
    assert done["waiting"] == 0 and done["done"][:1] == [""]
    found = blend.shadow(result)
    assert found is not None and found.state == "done"
    # it is in vLLM's own cache now, and no blend begins
    other = blend.generate(PROMPT, recompute_ratio=0.1, **SAMPLING)
    assert other.report.shadow is None


def test_requests_that_are_not_blended_have_no_shadow(blend: CacheBlend) -> None:
    result = blend.generate(PROMPT, mode="full", **SAMPLING)
    assert result.report.shadow is None and blend.shadow(result) is None
    assert blend.generate(words(50), **SAMPLING).report.shadow is None
