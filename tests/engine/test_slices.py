"""Ingestion in slices computes what it computes at once, whatever runs between two slices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import EXACT, FULL_LOGPROBS, logprobs, start_in_process
from tiny import Words, make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine.slices import SlicedIngestor
from cacheblend_rag.errors import EngineError

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]

words = Words(41)
PREFIX = words(6)
CHUNKS = [words(n) for n in (70, 33, 90)]
CONTEXTS = [words(5), words(5), words(5)]
KEYS = [f"{n:064x}" for n in range(3)]
QUESTION = words(60)


@pytest.fixture(scope="module")
def blend(tiny_models: Path) -> Iterator[CacheBlend]:
    config = BlendConfig(ingest_prefix=PREFIX, blend_if="always")
    with start_in_process(make("llama", tiny_models), config=config) as opened:
        yield opened


def worker_state() -> Any:
    return get_kv_transfer_group().worker_state  # type: ignore[attr-defined]


@pytest.fixture
def sliced(blend: CacheBlend) -> SlicedIngestor:
    """One that has computed no prefix yet."""
    return SlicedIngestor(worker_state().parts[0], worker_state().heads)


@pytest.mark.parametrize("parts", [1, 3, 1000])
@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["alone", "behind"])
def test_bit_for_bit(
    blend: CacheBlend, sliced: SlicedIngestor, parts: int, prefix: tuple[int, ...]
) -> None:
    blend.generate(QUESTION, **FULL_LOGPROBS)
    before = logprobs(blend.generate(QUESTION, mode="full", **FULL_LOGPROBS))
    sliced.begin("a", KEYS, CHUNKS, prefix, CONTEXTS)
    count = 1
    while not sliced.go_on("a", parts):
        count += 1
        assert sliced.seconds > 0
        # a step of the engine's, and a blend's own passes, in between
        between = blend.generate(QUESTION, mode="full", **FULL_LOGPROBS)
        assert (logprobs(between) - before).abs().max() <= EXACT
    keys, computed = sliced.take()
    at_once = worker_state().ingestor.compute(CHUNKS, prefix, CONTEXTS)
    # of a pass of four layers there are seven parts: nothing is computed behind the last attention
    assert keys == KEYS and count == -(-(14 if prefix else 7) // parts)
    for one, other in zip(computed, at_once, strict=True):
        assert one.token_ids == other.token_ids and one.base == other.base
        assert torch.equal(one.kv_L2NHD, other.kv_L2NHD)


def test_one_that_is_dropped_leaves_nothing_behind(sliced: SlicedIngestor) -> None:
    sliced.begin("a", KEYS, CHUNKS, PREFIX, CONTEXTS)
    assert not sliced.go_on("a", 2)  # within the prefix
    sliced.begin("b", KEYS[:1], CHUNKS[:1], PREFIX, CONTEXTS[:1])
    with pytest.raises(EngineError, match="another ingestion took the place"):
        sliced.go_on("a", 1)
    assert sliced.go_on("b", 1000)
    keys, [computed] = sliced.take()
    [expected] = worker_state().ingestor.compute(CHUNKS[:1], PREFIX, CONTEXTS[:1])
    assert keys == KEYS[:1] and torch.equal(computed.kv_L2NHD, expected.kv_L2NHD)
    with pytest.raises(EngineError, match="begin it again"):
        sliced.go_on("b", 1)


def test_what_fails_is_raised_and_the_next_one_works(
    sliced: SlicedIngestor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cacheblend_rag.engine.ingest._Host.copy", lambda *_: 1 / 0)
        sliced.begin("a", KEYS, CHUNKS, PREFIX, CONTEXTS)
        while not sliced.go_on("a", 3):
            pass
        with pytest.raises(ZeroDivisionError):
            sliced.take()
    sliced.begin("b", KEYS, CHUNKS, PREFIX, CONTEXTS)
    assert sliced.go_on("b", 1000) and len(sliced.take()[1]) == 3


def test_by_rpc_as_at_once(blend: CacheBlend) -> None:
    """What a server's endpoints do: stored, and found in prompts."""
    chunk = words(80)
    key = blend.key(chunk)
    begun = blend.engine.rpc("cacheblend_ingest_begin", "n", [key], [list(chunk)], PREFIX, [[]])
    assert begun == [None]
    [said] = blend.engine.rpc("cacheblend_ingest_go_on", "n", 1)
    assert said["seconds"] > 0 and said["steps"] > 0 and said["step_s"] >= 0
    [(nbytes, refused)] = blend.engine.rpc("cacheblend_ingest_go_on", "n", 100)
    assert nbytes > 0 and refused == {}
    assert blend.generate((*words(4), *chunk, *words(20)), max_tokens=1).report.blended


def test_documents_tell_their_chunks(blend: CacheBlend) -> None:
    keys = blend.ingest([words(40), words(50)], documents=["d", "d"], progress=False).keys
    assert blend.engine.rpc("cacheblend_document_keys", "d") == [sorted(keys)]
    space = blend.key_space.to_plain()
    [page] = blend.engine.rpc("cacheblend_page", space, "", 1, "d")
    [rest] = blend.engine.rpc("cacheblend_page", space, page[0], 9, "d")
    assert [*page, *rest] == sorted(keys)
    other = blend.key_space._replace(namespace="other").to_plain()
    assert blend.engine.rpc("cacheblend_page", other, "", 9, None) == [[]]
    assert blend.engine.rpc("cacheblend_owned", other, list(keys)) == [[]]
    assert blend.engine.rpc("cacheblend_owned", space, [keys[0], "f" * 64]) == [[keys[0]]]
    assert blend.engine.rpc("cacheblend_count", space)[0] >= 2
