"""The shadow where a prompt takes several steps, and beside an engine in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import EXACT, logprobs, start, start_in_process
from shadows import CHUNKS, CONFIG, PROMPT, SAMPLING, computed, forced
from tiny import Words, make

from cacheblend_rag import CacheBlend

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

words = Words(12)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def narrow(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[CacheBlend]:
    """An engine whose steps have 64 tokens."""
    model = make(request.param, tiny_models)
    options: dict[str, Any] = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    with start_in_process(model, config=CONFIG, **options) as opened:
        opened.ingest(CHUNKS, progress=False)
        yield opened


def test_a_blend_of_several_steps_among_others(narrow: CacheBlend) -> None:
    prompts = [words(150), PROMPT, words(200)]
    _, result, _ = narrow.generate(prompts, recompute_ratio=0.3, **SAMPLING)
    assert result.report.blended
    assert result.report.tokens_recomputed + result.report.tokens_fresh > 64
    found = computed(narrow, result)
    exact, blended = forced(narrow, PROMPT, result.token_ids), logprobs(result)
    kl = (exact.exp() * (exact - blended)).nansum(-1).mean().item()
    same = exact.argmax(-1) == blended.argmax(-1)
    assert found.kl == pytest.approx(kl, rel=1e-3, abs=EXACT) and found.tokens == 12
    assert found.changed == (not bool(same.all()))


def test_an_answer_of_one_token(narrow: CacheBlend) -> None:
    options: dict[str, Any] = {**SAMPLING, "max_tokens": 1}
    found = computed(narrow, narrow.generate(PROMPT, recompute_ratio=0.2, **options))
    assert (found.state, found.tokens) == ("done", 1)
    assert found.changed == found.first_changed


def test_in_processes_of_its_own(tiny_models: Path) -> None:
    """The draw, the slices and what is found travel between processes; many ask at once."""
    with start(make("llama", tiny_models), config=CONFIG, engine="serving") as blend:
        blend.ingest(CHUNKS, progress=False)
        prompts = [(*words(20), *(t for c in CHUNKS for t in c), *words(16)) for _ in range(6)]

        async def ask() -> list[Any]:
            return await asyncio.gather(*(blend.agenerate(p, **SAMPLING) for p in prompts))

        results = asyncio.run(ask())
        assert all(result.report.blended for result in results)
        found = [computed(blend, result) for result in results]
        assert {report.state for report in found} == {"done"}
        for result, report in zip(results[:2], found[:2], strict=True):
            exact = forced(blend, result.prompt_token_ids, result.token_ids)
            blended = logprobs(result)
            kl = (exact.exp() * (exact - blended)).sum(-1).mean().item()
            assert report.kl == pytest.approx(kl, rel=1e-3, abs=EXACT)
