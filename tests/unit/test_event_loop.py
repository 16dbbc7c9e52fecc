"""Asking from an event loop, which goes on meanwhile; and what users may do beside a call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm")
from fake_engine import fake_blend, sent

from cacheblend_rag import (
    BlendConfig,
    CacheBlend,
    ClosedError,
    ConfigError,
    PromptError,
)

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40


@pytest.fixture
def blend(monkeypatch: pytest.MonkeyPatch) -> CacheBlend:
    return fake_blend(monkeypatch)


class Held:
    """Tokenising waits until it is let go."""

    def __init__(self, blend: CacheBlend, patch: pytest.MonkeyPatch) -> None:
        self.go, self.threads = threading.Event(), set[int]()
        prepare = blend._prepare_split

        def slowly(*args: Any) -> Any:
            self.threads.add(threading.get_ident())
            assert self.go.wait(10)
            return prepare(*args)

        patch.setattr(blend, "_prepare_split", slowly)


@pytest.fixture
def held(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(blend, monkeypatch)
    yield made
    made.go.set()


async def test_what_is_closed_while_its_prompt_is_prepared_never_runs(
    blend: CacheBlend, held: Held
) -> None:
    stream = blend.astream(TEXT)
    first = asyncio.ensure_future(anext(stream, "nothing"))
    await asyncio.sleep(0.05)
    assert held.threads
    await stream.aclose()
    held.go.set()
    assert await first == "nothing" and await anext(stream, None) is None
    assert sent(blend) == []


async def test_the_loop_goes_on_while_prompts_are_prepared(blend: CacheBlend, held: Held) -> None:
    asked = [asyncio.create_task(blend.agenerate(f"{TEXT} {i}?")) for i in range(16)]
    for _ in range(100):
        await asyncio.sleep(0)
    assert not any(task.done() for task in asked)  # and we are here
    held.go.set()
    results = await asyncio.gather(*asked)
    assert threading.get_ident() not in held.threads and len(held.threads) == 1
    assert [r.prompt_token_ids for r in results] == [
        blend.tokenize(f"{TEXT} {i}?") for i in range(16)
    ]


async def test_who_leaves_while_prompts_are_prepared_leaves_nothing(
    blend: CacheBlend, held: Held
) -> None:
    asked = [asyncio.create_task(blend.agenerate(f"{TEXT} {i}?")) for i in range(8)]
    stream = blend.astream(TEXT)
    await asyncio.sleep(0)
    for task in asked:
        task.cancel()
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in done)
    await stream.aclose()
    assert [piece async for piece in stream] == []
    held.go.set()
    assert (await blend.agenerate("another")).text
    assert len(sent(blend)) == 1  # none of those that were left


async def test_the_prompt_is_what_it_was_when_asked(blend: CacheBlend, held: Held) -> None:
    messages = [{"role": "user", "content": "What is a tide?"}]
    ids = list(blend.tokenize("What is a ship?"))
    wanted = [blend.tokenize(messages), tuple(ids)]
    streams = [blend.astream(messages), blend.astream(ids)]
    messages[0]["content"] = "something else"
    ids.clear()
    held.go.set()
    for stream, want in zip(streams, wanted, strict=True):
        assert "".join([piece async for piece in stream])
        assert stream.result.prompt_token_ids == want


async def test_wrong_options_are_refused_at_once_and_wrong_prompts_when_read(
    blend: CacheBlend,
) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        blend.astream("text", temperatur=1.0)
    for bad in ("", [1, 2.5], "word " * 9000):
        with pytest.raises(PromptError):
            await blend.agenerate(bad)
    front = blend.with_config(BlendConfig(min_chunk_tokens=64))
    blend.close()
    with pytest.raises(ClosedError):
        await blend.agenerate("text")
    with pytest.raises(ClosedError):
        await front.agenerate("text")


async def test_times_count_from_when_it_was_asked(blend: CacheBlend) -> None:
    report = (await blend.agenerate(TEXT)).report
    prepared = sum(report.stages_s[stage] for stage in ("tokenize", "locate", "plan"))
    assert 0 < prepared <= report.ttft_s <= report.total_s < 60


def test_who_truncates_with_our_tokenizer_cuts_no_prompt(blend: CacheBlend) -> None:
    whole, done = blend.tokenize(TEXT), threading.Event()
    key = blend.key(TEXT)

    def trim() -> None:
        while not done.is_set():
            blend.tokenizer(TEXT, truncation=True, max_length=64)
            blend.tokenizer([TEXT, "a"], padding=True)

    with ThreadPoolExecutor(1) as pool:
        trimming = pool.submit(trim)
        got = [blend.tokenize(TEXT) for _ in range(50)]
        keys = [blend.key(TEXT) for _ in range(50)]
        done.set()
        trimming.result(10)
    assert set(got) == {whole} and set(keys) == {key}


def test_what_is_set_on_the_tokenizer_stays_there(blend: CacheBlend) -> None:
    whole = blend.tokenize(TEXT)
    for handed_out in (blend.tokenizer, blend.with_config(BlendConfig()).tokenizer):
        handed_out.add_tokens(["quick brown fox"])
        handed_out.chat_template = "nothing"
        handed_out._tokenizer.enable_truncation(5)
    assert blend.tokenize(TEXT) == whole
    assert len(blend.tokenize([{"role": "user", "content": TEXT}])) > len(whole)
    assert blend.tokenizer is blend.tokenizer


def test_the_ingest_prefix_is_whole_numbers_too() -> None:
    for bad in (b"bytes", [1.5], [True]):
        with pytest.raises(ConfigError, match="ingest_prefix"):
            BlendConfig(ingest_prefix=bad)  # type: ignore[arg-type]
