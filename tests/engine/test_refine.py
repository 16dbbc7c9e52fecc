"""Refinement: what was blended is computed again while the answer is generated, and is a full
prefill's in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import untried
from engines import EAGER_AND_COMPILED, EXACT, logprobs, start_in_process
from tiny import Words, make

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine.attention import PagedPass
from cacheblend_rag.engine.hashes import cached
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]


@pytest.fixture(scope="module", autouse=True)
def untried_on_a_gpu() -> None:
    untried.skip("refinement")


BLOCK = 32
words = Words(41)
PREFIX = words(4)
CHUNKS = [words(n) for n in (70, 100, 64, 90)]
PROMPT = words(9) + CHUNKS[0] + words(3) + CHUNKS[1] + CHUNKS[2] + words(2) + CHUNKS[3] + words(25)
ASK: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "logprobs": -1}


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


def core(blend: CacheBlend) -> Any:
    return blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]


def reset(blend: CacheBlend) -> None:
    scheduler = core(blend).scheduler
    if not scheduler.reset_prefix_cache():  # a step that was scheduled ahead holds blocks
        core(blend).step()
        assert scheduler.reset_prefix_cache()


def kv_of(blend: CacheBlend, ids: tuple[int, ...]) -> list[torch.Tensor]:
    """What the blocks hold that a plain request with these tokens finds, layer by layer."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    pool, hasher = (
        core(blend).scheduler.kv_cache_manager.block_pool,
        core(blend).request_block_hasher,
    )
    plain = Request("plain", list(ids), SamplingParams(), None, block_hasher=hasher)
    found = plain.block_hashes[: cached(pool, plain.block_hashes)]
    blocks = torch.tensor(
        [pool.get_cached_block(h, [0])[0].block_id for h in found], dtype=torch.int64
    )
    held = []
    for layer in connector().rows.handle.layers:
        at = list(layer.kv_cache.shape).index(pool.num_gpu_blocks)
        held.append(layer.kv_cache.index_select(at, blocks).movedim(at, 0).clone())
    return held


def connector() -> Any:
    """The worker's side of it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


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


def test_an_answer_that_ends_first_leaves_nothing_to_others(blend: CacheBlend) -> None:
    report = blend.generate(PROMPT, refine=32, max_tokens=6, **ASK).report
    assert 0 < report.tokens_refined < len(PROMPT) and not report.refined
    assert "ended before" in report.refine_detail
    assert len(kv_of(blend, PROMPT)[0]) == 0
    again = blend.generate(PROMPT, refine=32, max_tokens=6, **ASK).report
    assert again.reason == Reason.PREFIX_CACHED and not again.tokens_refined


def test_what_cannot_be_refined_says_why(blend: CacheBlend) -> None:
    whole = blend.generate(PROMPT, refine="idle", recompute_ratio=1.0, max_tokens=20).report
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
