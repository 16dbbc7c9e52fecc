"""Requests that end in the front end, whose last output from the engine's core never comes: their
reports are those of requests that end in the core.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import start, start_in_process
from tiny import WORDS, Words, make_with_tokenizer

from cacheblend_rag import BlendConfig, BlendReport, BlendResult, CacheBlend
from cacheblend_rag.engine.blend import Blender
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SAMPLING: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}

words = Words(31)
CHUNKS = [words(n) for n in (70, 100, 64)]
PROMPT = words(5) + CHUNKS[0] + words(3) + CHUNKS[1] + words(2) + CHUNKS[2] + words(20)

Ask = Callable[..., BlendResult]


def generate(blend: CacheBlend, **options: Any) -> BlendResult:
    return blend.generate(PROMPT, **options)


def stream(blend: CacheBlend, **options: Any) -> BlendResult:
    asked = blend.stream(PROMPT, **options)
    for _ in asked:
        pass
    return asked.result


def agenerate(blend: CacheBlend, **options: Any) -> BlendResult:
    return asyncio.run(blend.agenerate(PROMPT, **options))


@pytest.fixture(scope="module", params=["serving", "batch"])
def blend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = make_with_tokenizer("llama", tmp_path_factory.mktemp("model"))
    begin: Any = start if request.param == "serving" else start_in_process
    store = str(tmp_path_factory.mktemp("store"))
    config = BlendConfig(ingest_prefix=words(4), blend_if="always", store=store)
    with begin(model, engine=request.param, config=config, skip_tokenizer_init=False) as opened:
        assert opened.model_check.passed, opened.model_check.detail
        yield opened


@pytest.fixture(autouse=True)
def all_stored(blend: CacheBlend) -> None:
    blend.ingest(CHUNKS, progress=False)
    reset(blend)


def reset(blend: CacheBlend) -> None:
    engine: Any = blend._engine
    if hasattr(engine, "_llm"):
        assert engine._llm.llm_engine.reset_prefix_cache()
    else:
        while not engine._call(engine._engine.reset_prefix_cache()):  # an abort is under way
            pass


def stops(blend: CacheBlend, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options that end an answer at its token ``number``: in the front end, and in the core."""
    token = blend.generate(PROMPT, mode="full", **SAMPLING, recompute_ratio=1.0).token_ids[number]
    return (
        {**SAMPLING, "recompute_ratio": 1.0, "stop": [WORDS[token]]},
        {**SAMPLING, "recompute_ratio": 1.0, "stop_token_ids": [token]},
    )


def figures(report: BlendReport) -> dict[str, Any]:
    """All that does not depend on the clock."""
    data = report.to_dict()
    data["stages_s"] = sorted(data["stages_s"])
    return {name: value for name, value in data.items() if name not in ("ttft_s", "total_s")}


@pytest.mark.parametrize("number", [0, 5])
@pytest.mark.parametrize("ask", [generate, stream, agenerate])
def test_a_stop_string_leaves_the_report_whole(blend: CacheBlend, ask: Ask, number: int) -> None:
    by_string, by_token = stops(blend, number)
    reset(blend)
    wanted = ask(blend, **by_token)
    reset(blend)
    got = ask(blend, **by_string)
    assert (got.finish_reason, got.stop_reason) == ("stop", by_string["stop"][0])
    assert got.report.blended and got.report.bytes_loaded and got.report.stages_s["load"] >= 0
    assert figures(got.report) == figures(wanted.report)
    again = ask(blend, **by_string)  # vLLM's own cache has it now
    assert again.report.reason is Reason.PREFIX_CACHED and again.report.detail
    assert figures(again.report) == figures(ask(blend, **by_token).report)


def lose(blend: CacheBlend, key: str) -> None:
    """Nobody notices."""
    [file] = Path(blend.config.store).rglob(f"{key}.safetensors")
    file.unlink()


def test_a_missing_chunk_is_noticed(blend: CacheBlend) -> None:
    by_string, by_token = stops(blend, 3)
    lost = blend.key(CHUNKS[1])
    reports = []
    for options in (by_token, by_string):
        blend.ingest(CHUNKS, progress=False)
        lose(blend, lost)
        reset(blend)
        reports.append(blend.generate(PROMPT, **options).report)
        assert reports[-1].missing_keys == (lost,)
        deadline = time.monotonic() + 3  # the engine's listing follows the store
        while lost in blend.stored():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert figures(reports[0]) == figures(reports[1])


def test_with_all_chunks_missing_nothing_was_blended(blend: CacheBlend) -> None:
    for options in stops(blend, 3):
        blend.ingest(CHUNKS, progress=False)
        for chunk in CHUNKS:
            lose(blend, blend.key(chunk))
        reset(blend)
        report = blend.generate(PROMPT, **options).report
        assert not report.blended and report.reason is Reason.CHUNKS_MISSING and report.detail
        assert report.tokens_fresh == len(PROMPT) and report.recompute_ratio is None
        assert set(report.missing_keys) == {blend.key(chunk) for chunk in CHUNKS}
        deadline = time.monotonic() + 3
        while len(blend.stored()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_refusal_is_told(blend: CacheBlend) -> None:
    by_string, by_token = stops(blend, 3)
    reports = []
    for options in (by_token, by_string):
        reset(blend)
        reports.append(blend.generate(PROMPT, prompt_logprobs=1, **options).report)
    assert reports[1].reason is Reason.PROMPT_LOGPROBS and not reports[1].blended
    assert figures(reports[0]) == figures(reports[1])


@pytest.mark.parametrize("blend", ["batch"], indirect=True)  # its worker is in this process
def test_a_failure_is_told(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    by_string, by_token = stops(blend, 3)
    monkeypatch.setattr(Blender, "choose", broken)
    reports = []
    for options in (by_token, by_string):
        reset(blend)
        reports.append(blend.generate(PROMPT, **options).report)
    assert reports[1].reason is Reason.BLEND_FAILED and "on purpose" in reports[1].detail
    assert figures(reports[0]) == figures(reports[1])


def test_a_prompt_without_chunks_counts_its_cached_tokens(blend: CacheBlend) -> None:
    by_string, _ = stops(blend, 3)
    reset(blend)
    first, second = (blend.generate(PROMPT, **{**by_string, "mode": "off"}) for _ in range(2))
    assert first.report.tokens_prefix_cached == 0 < second.report.tokens_prefix_cached


def test_a_stream_left_early_leaves_nothing_behind(blend: CacheBlend) -> None:
    options = {**SAMPLING, "max_tokens": 400, "stop": ["no such word"]}
    for pieces in (0, 1, 3):
        with blend.stream(PROMPT, **options) as asked:
            for _ in range(pieces):
                next(asked)
        reset(blend)  # vLLM empties its prefix cache only where no request holds a block
