"""Refinement: what was blended is computed again while the answer is generated, and is a full
prefill's in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EAGER_AND_COMPILED, EXACT, logprobs, start_in_process
from refining import ASK, BLOCK, CHUNKS, PREFIX, PROMPT, kv_of, reset
from tiny import Words, make

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine.attention import PagedPass
from cacheblend_rag.engine.refiner import Refiner
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]


words = Words(42)


@pytest.fixture(scope="module", params=EAGER_AND_COMPILED)
def blend(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[CacheBlend]:
    config = BlendConfig(ingest_prefix=PREFIX, propagation_length=0)
    options: dict[str, Any] = {
        "block_size": BLOCK, "max_num_batched_tokens": 64, "max_num_seqs": 8
    }  # fmt: skip
    if request.param == "compiled":
        options["enforce_eager"] = False
    with start_in_process(make("llama", tiny_models), config=config, **options) as opened:
        assert opened.model_check.passed, opened.model_check.detail
        opened.ingest(CHUNKS, progress=False)
        yield opened


@pytest.fixture(autouse=True)
def nothing_cached(request: pytest.FixtureRequest) -> None:
    if "blend" in request.fixturenames:
        reset(request.getfixturevalue("blend"))


@pytest.mark.parametrize("refine", [32, "idle", 1000])
def test_the_kv_becomes_a_full_prefills(blend: CacheBlend, refine: Any) -> None:
    result = blend.generate(PROMPT, refine=refine, max_tokens=70, **ASK)
    report = result.report
    assert report.blended and report.tokens_reused and report.refined, report
    assert len(PROMPT) - 9 <= report.tokens_refined < len(PROMPT) + 70 and not report.refine_detail
    whole = PROMPT + tuple(result.token_ids)
    ours = kv_of(blend, whole)
    assert len(ours[0]) == (len(whole) - 1) // BLOCK
    reset(blend)
    blend.generate(whole, mode="off", max_tokens=1)
    theirs = kv_of(blend, whole)
    for mine, full in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, full[: len(mine)], atol=EXACT, rtol=0)


def test_without_it_the_kv_stays_as_it_was_blended(blend: CacheBlend) -> None:
    report = blend.generate(PROMPT, max_tokens=70, **ASK).report
    assert (report.tokens_refined, report.refined, report.refine_detail) == (0, False, "")
    assert len(kv_of(blend, PROMPT)[0]) == 0


def test_a_follow_up_is_a_plain_engines(blend: CacheBlend) -> None:
    first = blend.generate(PROMPT, refine="idle", max_tokens=70, **ASK)
    assert first.report.refined
    further = PROMPT + tuple(first.token_ids) + words(20)
    for options in ({}, {"mode": "off"}):
        second = blend.generate(further, max_tokens=20, **ASK, **options)
        assert not second.report.blended
        found = second.report.tokens_prefix_cached
        assert found >= (len(PROMPT) + 70 - 1) // BLOCK * BLOCK
        plain = blend.generate(further, mode="full", max_tokens=20, **ASK)
        assert second.token_ids == plain.token_ids
        torch.testing.assert_close(logprobs(second), logprobs(plain), atol=EXACT, rtol=0)


@pytest.mark.parametrize("mode", ["full", "blend"])
def test_who_comes_meanwhile_is_answered_as_alone(
    blend: CacheBlend, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed again while another request is there, and all of it afterwards."""
    other = words(40) + CHUNKS[2] + CHUNKS[0] + words(20)
    alone = blend.generate(other, mode=mode, max_tokens=12, **ASK)
    reset(blend)
    blend.generate(words(70), mode="off", max_tokens=1)  # other blocks for what follows
    engine: Any = blend._engine
    core, at = engine._llm.llm_engine, []
    run = Refiner.run

    def noting(self: Refiner, refine: Any, *args: Any) -> None:
        at.append(core.get_num_unfinished_requests())
        run(self, refine, *args)

    monkeypatch.setattr(Refiner, "run", noting)
    one = blend._prepare(PROMPT, {"refine": 16, "max_tokens": 120, **ASK}).request
    two = blend._prepare(other, {"mode": mode, "max_tokens": 12, **ASK}).request
    engine._add(core, "one", one)
    said: dict[str, tuple[int, ...]] = {"one": (), "two": ()}
    before = 0
    while core.has_unfinished_requests():
        for output in core.step():
            said[output.request_id] += tuple(output.outputs[0].token_ids)
        if len(said["one"]) == 6 and not before:
            before = len(at)
            engine._add(core, "two", two)
    assert 0 < before < len(at) and set(at) == {1}
    assert said["two"] == alone.token_ids
    whole = PROMPT + said["one"]
    ours = kv_of(blend, whole)
    assert len(ours[0]) == (len(whole) - 1) // BLOCK
    reset(blend)
    blend.generate(whole, mode="off", max_tokens=1)
    for mine, full in zip(ours, kv_of(blend, whole), strict=True):
        torch.testing.assert_close(mine, full[: len(mine)], atol=EXACT, rtol=0)


def test_an_answer_that_ends_first_leaves_nothing_to_others(blend: CacheBlend) -> None:
    report = blend.generate(PROMPT, refine=32, max_tokens=6, **ASK).report
    assert 0 < report.tokens_refined < len(PROMPT) and not report.refined
    assert "ended before" in report.refine_detail
    assert len(kv_of(blend, PROMPT)[0]) == 0
    again = blend.generate(PROMPT, refine=32, max_tokens=6, **ASK).report
    assert again.reason == Reason.PREFIX_CACHED and not again.tokens_refined


def test_what_cannot_be_refined_says_why(blend: CacheBlend) -> None:
    options = {"refine": "idle", "recompute_ratio": 1.0, "blend_if": "always"}
    whole = blend.generate(PROMPT, max_tokens=20, **options).report
    assert whole.blended and "nothing to refine" in whole.refine_detail
    assert not whole.refined and not whole.tokens_refined
    other = words(9) + CHUNKS[3] + CHUNKS[0] + CHUNKS[1] + words(25)  # of which nothing is noted
    assert blend.generate(other[:180], max_tokens=4, **ASK).report.blended
    report = blend.generate(other, refine="idle", max_tokens=70, **ASK).report
    assert report.tokens_prefix_cached == 160
    assert report.blended and "an earlier blend" in report.refine_detail, report
    assert len(kv_of(blend, other)[0]) == 0


def test_a_failure_leaves_the_answer_and_is_reported(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, calls = PagedPass.attend, []

    def fail(self: PagedPass, index: int, *args: Any) -> None:
        calls.append(index)
        if len(calls) > 9:  # four layers a slice: in the third
            raise RuntimeError("on purpose")
        attend(self, index, *args)

    monkeypatch.setattr(PagedPass, "attend", fail)
    result = blend.generate(PROMPT, refine=32, max_tokens=40, **ASK)
    assert len(result.token_ids) == 40 and len(calls) == 10
    assert result.report.tokens_refined == 64 and not result.report.refined
    assert "on purpose" in result.report.refine_detail
    assert len(kv_of(blend, PROMPT)[0]) == 0
