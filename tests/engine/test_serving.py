"""The serving engine: streams side by side, leaving early, closing, and an engine that dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import start
from tiny import VOCAB, WORDS, Words, make_with_tokenizer

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend
from cacheblend_rag.errors import (
    CacheBlendError,
    ClosedError,
    ConfigError,
    EngineDeadError,
    PromptError,
)
from cacheblend_rag.result import BlendStream

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SAMPLING: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
LONG: dict[str, Any] = {**SAMPLING, "max_tokens": 900}
ROWS = 256  # of a step
# long enough that all are under way together, however late a busy machine starts a thread
SEEN_TOGETHER: dict[str, Any] = {**SAMPLING, "max_tokens": 300}

words = Words(21)
PREFIX = words(4)
CHUNKS = [words(n) for n in (70, 100, 64, 150, 90, 120)]
PROMPTS = [
    words(5) + CHUNKS[i % 6] + words(3) + CHUNKS[(i + 2) % 6] + words(10 + i) for i in range(16)
]
EVERYTHING = words(5) + tuple(t for chunk in CHUNKS for t in chunk) + words(30)
SHORT = words(30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_with_tokenizer("llama", tmp_path_factory.mktemp("with-tokenizer"))


def serve(model: Path) -> CacheBlend:
    config = BlendConfig(ingest_prefix=PREFIX, propagation_length=0)  # see test_behaviour.py
    with pytest.MonkeyPatch.context() as patch:
        # two threads that wait for each other cost more than they save
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        blend = start(
            model,
            engine="serving",
            config=config,
            skip_tokenizer_init=False,
            max_num_batched_tokens=ROWS,
            max_num_seqs=16,
        )
    blend.ingest(CHUNKS, progress=False)
    return blend


@pytest.fixture(scope="module")
def blend(model: Path) -> Iterator[CacheBlend]:
    with serve(model) as opened:
        assert opened.model_check.passed, opened.model_check.detail
        yield opened


@pytest.fixture(scope="module")
def alone(blend: CacheBlend) -> list[BlendResult]:
    """The answer to each prompt on an idle engine."""
    results = [blend.generate(ids, **SAMPLING) for ids in PROMPTS]
    assert all(r.report.blended for r in results)
    return results


@pytest.fixture(autouse=True)
def idle(blend: CacheBlend) -> Iterator[None]:
    """No request is left behind, and no cached block."""
    if not blend._closed:
        wait_until(lambda: is_idle(blend))
    yield
    if not blend._closed:
        wait_until(lambda: is_idle(blend))


def is_idle(blend: CacheBlend) -> bool:
    """vLLM empties its prefix cache only where no request holds a block."""
    engine: Any = blend._engine
    return bool(engine._call(engine._engine.reset_prefix_cache()))


def is_idle_at_once(blend: CacheBlend) -> bool:
    """Long before what was left could have ended: the engine answers once a step at the least."""
    return any(is_idle(blend) for _ in range(20))


def wait_until(done: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def read(stream: BlendStream) -> BlendResult:
    for _ in stream:
        pass
    return stream.result


def times(stream: Any) -> list[float]:
    return [piece.at for piece in stream.pieces]


def interleaved(streams: list[Any]) -> bool:
    """Every stream was under way while every other one was."""
    return max(times(s)[0] for s in streams) < min(times(s)[-1] for s in streams)


# ---- streams side by side ------------------------------------------------------------------------


def test_text_comes_piece_by_piece(blend: CacheBlend) -> None:
    stream = blend.stream(PROMPTS[0], **SAMPLING)
    pieces = [next(stream)]
    with pytest.raises(CacheBlendError, match="read to its end"):
        _ = stream.result
    pieces += list(stream)
    assert pieces[0] and len(pieces) > 10
    assert times(stream)[0] < times(stream)[-1]
    result = stream.result
    assert "".join(pieces) == result.text
    assert result.text.split() == [WORDS[i] for i in result.token_ids if i > 2]  # none special
    assert result.report.blended and 0 < result.report.ttft_s < result.report.total_s
    assert next(stream, None) is None


def test_text_prompts_and_stop_strings(blend: CacheBlend, alone: list[BlendResult]) -> None:
    same = blend.generate(" ".join(WORDS[i] for i in PROMPTS[0]), **SAMPLING)
    assert same.prompt_token_ids == PROMPTS[0] and same.token_ids == alone[0].token_ids
    stop = WORDS[alone[0].token_ids[5]]
    cut = blend.generate(PROMPTS[0], stop=[stop], **SAMPLING)
    assert cut.finish_reason == "stop" and cut.stop_reason == stop
    assert alone[0].text.startswith(cut.text) and stop not in cut.text.split()


def test_threads_share_the_engine(blend: CacheBlend, alone: list[BlendResult]) -> None:
    streams = [blend.stream(ids, **SEEN_TOGETHER) for ids in PROMPTS[:4]]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, streams))
    assert [r.token_ids[:24] for r in results] == [r.token_ids for r in alone[:4]]
    assert interleaved(streams)


async def test_an_event_loop_interleaves_streams(
    blend: CacheBlend, alone: list[BlendResult]
) -> None:
    streams = [blend.astream(ids, **SEEN_TOGETHER) for ids in PROMPTS[:4]]

    async def read_all(stream: Any) -> str:
        return "".join([piece async for piece in stream])

    texts = await asyncio.gather(*map(read_all, streams))
    for got, one in zip(texts, alone, strict=False):
        assert got.startswith(one.text)
    assert interleaved(streams)


async def test_sixteen_at_once(blend: CacheBlend, alone: list[BlendResult]) -> None:
    results = await asyncio.gather(*(blend.agenerate(ids, **SAMPLING) for ids in PROMPTS))
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]
    assert [r.report.tokens_recomputed for r in results] == [
        r.report.tokens_recomputed for r in alone
    ]


def test_a_list_of_prompts(blend: CacheBlend, alone: list[BlendResult]) -> None:
    results = blend.generate(PROMPTS, **SAMPLING)
    assert [r.token_ids for r in results] == [r.token_ids for r in alone]


async def test_one_token_answers_have_a_whole_report(blend: CacheBlend) -> None:
    options = {**SAMPLING, "max_tokens": 1}
    results = [blend.generate(PROMPTS[0], **options), await blend.agenerate(PROMPTS[1], **options)]
    assert all(r.report.blended and r.report.bytes_loaded for r in results)


def test_a_stream_goes_on_while_another_blends(blend: CacheBlend) -> None:
    first = blend.stream(SHORT, **LONG)
    for _ in range(3):
        next(first)
    reader = threading.Thread(target=lambda: list(first))
    reader.start()
    second = blend.generate(EVERYTHING, recompute_ratio=0.5, **{**SAMPLING, "max_tokens": 1})
    ended = time.perf_counter()
    began = ended - second.report.total_s
    meanwhile = [at for at in times(first) if began < at < ended]
    first.close() if not reader.is_alive() else reader.join()
    assert second.report.blended and second.report.tokens_recomputed > 200
    assert len(meanwhile) >= (second.report.tokens_recomputed + second.report.tokens_fresh) // ROWS


# ---- leaving early -------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_a_closed_stream_is_aborted(
    blend: CacheBlend, alone: list[BlendResult], pieces: int
) -> None:
    others = [blend.stream(ids, **SAMPLING) for ids in PROMPTS[:2]]
    with blend.stream(EVERYTHING, **{**LONG, "max_tokens": 300}) as left:
        for _ in range(pieces):
            next(left)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(read, other) for other in others]
            left.close()
            results = [r.result() for r in running]
    assert is_idle_at_once(blend)
    assert len(left.pieces) <= pieces
    assert [r.token_ids for r in results] == [r.token_ids for r in alone[:2]]
    with pytest.raises(CacheBlendError):
        _ = left.result


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.1, 0.3])
async def test_a_cancelled_request_is_aborted(
    blend: CacheBlend, alone: list[BlendResult], delay: float
) -> None:
    task = asyncio.create_task(blend.agenerate(EVERYTHING, recompute_ratio=0.9, max_tokens=300))
    others = [asyncio.create_task(blend.agenerate(ids, **SAMPLING)) for ids in PROMPTS[:2]]
    await asyncio.sleep(delay)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    results = await asyncio.gather(*others)
    assert [r.token_ids for r in results] == [r.token_ids for r in alone[:2]]


async def test_leaving_an_async_stream(blend: CacheBlend) -> None:
    async with blend.astream(PROMPTS[0], **LONG) as stream:
        async for _ in stream:
            if len(stream.pieces) == 3:
                break
    assert len(stream.pieces) == 3
    await blend.agenerate(SHORT, **SAMPLING)
    assert is_idle_at_once(blend)
    # and without a word
    async for _ in blend.astream(PROMPTS[0], **LONG):
        break
    await blend.agenerate(SHORT, **SAMPLING)
    assert is_idle_at_once(blend)


def test_a_forgotten_stream_is_aborted(blend: CacheBlend) -> None:
    for _ in blend.stream(PROMPTS[0], **LONG):
        break
    blend.generate(SHORT, **SAMPLING)  # a few of its 900 steps
    assert is_idle_at_once(blend)


def test_refused_requests_leave_the_engine_alone(
    blend: CacheBlend, alone: list[BlendResult]
) -> None:
    with pytest.raises(PromptError, match="vocabulary"):
        blend.generate([PROMPTS[0], (VOCAB,) * 40], **SAMPLING)
    with pytest.raises(ConfigError, match="vLLM refused"):
        blend.generate([PROMPTS[0], PROMPTS[1]], logprobs=VOCAB + 1)
    with pytest.raises(ConfigError, match="vLLM refused"):
        list(blend.stream(PROMPTS[0], temperature=-1.0))
    assert blend.generate(PROMPTS[0], **SAMPLING).token_ids == alone[0].token_ids


# ---- the end -------------------------------------------------------------------------------------


def outcome(use: Callable[[], Any]) -> BaseException | None:
    try:
        use()
    except CacheBlendError as error:
        return error
    return None


def uses_under_way(blend: CacheBlend, pool: ThreadPoolExecutor) -> list[Any]:
    """Long requests of every kind, each past its first piece or on its way there."""
    stream = blend.stream(PROMPTS[0], **LONG)
    next(stream)
    return [
        pool.submit(outcome, use)
        for use in (
            lambda: read(stream),
            lambda: blend.generate(PROMPTS[1], **LONG),
            lambda: blend.generate(PROMPTS[2:6], **LONG),
            lambda: asyncio.run(blend.agenerate(PROMPTS[6], **LONG)),
            lambda: ingest_for_ever(blend),
        )
    ]


def ingest_for_ever(blend: CacheBlend) -> None:
    draw = Words(99)
    while True:
        blend.ingest([draw(100) for _ in range(4)], progress=False)


@pytest.mark.kill
def test_a_killed_engine(model: Path) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    pool = ThreadPoolExecutor(8)  # no `with`: it would wait for what hangs
    with serve(model) as blend:
        ours = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        running = uses_under_way(blend, pool)
        time.sleep(0.3)
        [core] = [p for p in ours if "EngineCore" in " ".join(p.cmdline())]
        core.kill()
        errors = [r.result(timeout=30) for r in running]
        assert [type(e) for e in errors] == [EngineDeadError] * len(errors)
        began = time.monotonic()
        later: list[Callable[[], Any]] = [
            lambda: blend.generate(PROMPTS[0], **SAMPLING),
            lambda: next(blend.stream(PROMPTS[0], **SAMPLING)),
            lambda: asyncio.run(blend.agenerate(PROMPTS[0], **SAMPLING)),
            lambda: blend.ingest([words(60)], progress=False),
            lambda: blend.stats(),
        ]
        for use in later:
            with pytest.raises(EngineDeadError, match="died"):
                use()
        assert time.monotonic() - began < 5
    with pytest.raises(ClosedError):
        blend.generate(PROMPTS[0])
    _, alive = psutil.wait_procs(ours, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_closing_while_requests_run(blend: CacheBlend) -> None:
    pool = ThreadPoolExecutor(8)
    running = uses_under_way(blend, pool)
    time.sleep(0.3)
    began = time.monotonic()
    for done in [pool.submit(blend.close) for _ in range(2)]:
        done.result(timeout=30)
    errors = [r.result(timeout=30) for r in running]
    assert time.monotonic() - began < 20
    assert [type(e) for e in errors] == [ClosedError] * len(errors)
    blend.close()
    blend._engine.close()
    with pytest.raises(ClosedError):
        blend.generate(PROMPTS[0])
