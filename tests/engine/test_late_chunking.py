"""A chunk of a document is computed behind what stands before it there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import FLASH_DTYPE, FULL_LOGPROBS, logprobs, planned, start_in_process
from reference import Reference
from tiny import VOCAB, Words, make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import BlendConfig, CacheBlend, ConfigError, PromptError
from cacheblend_rag.engine import compat
from cacheblend_rag.plan import Kind
from cacheblend_rag.prefix import NEUTRAL_TEXT

pytestmark = pytest.mark.vllm

words = Words(47)
HEAD = 0  # the BOS token: this tokenizer has no chat template
FIRST, SECOND, THIRD = words(70), words(40), words(33)


class Letters:
    """A tokenizer of every eighth letter, so that the neutral text is short."""

    bos_token_id = HEAD

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [2 + ord(letter) % (VOCAB - 2) for letter in text[::8]]


NEUTRAL = tuple(Letters().encode(NEUTRAL_TEXT, add_special_tokens=False))
ROOM = len(NEUTRAL)


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> Path:
    return make("llama", tiny_models)


@pytest.fixture(scope="module")
def opened(model: Path) -> Iterator[CacheBlend]:
    config = BlendConfig(ingest_prefix=(), blend_if="always")
    options: dict[str, Any] = {"dtype": FLASH_DTYPE, "max_num_batched_tokens": 512}
    with start_in_process(model, config=config, **options) as engine:
        engine._tokenizer = Letters()
        yield engine


@pytest.fixture
def blend(opened: CacheBlend) -> Iterator[CacheBlend]:
    """Nothing is stored but the prompt prefix."""
    front = opened.with_config(replace(opened.config, ingest_prefix="document"))
    yield front
    front.delete_except([])


def kv(front: CacheBlend, ids: Sequence[int]) -> torch.Tensor:
    """float32 [L, 2, N, G, D] of a stored chunk."""
    store = get_kv_transfer_group().blender.store  # type: ignore[attr-defined]
    chunk = store.get(front.key(ids))
    assert chunk.base == 1 + ROOM, "every chunk starts at one position"
    assert chunk.token_ids == tuple(ids)
    return chunk.kv_L2NHD.float()


def expected(model: Path, behind: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """The same, out of one forward over all that stands before the chunk, by transformers."""
    layers = Reference(model, ()).kv([HEAD, *behind, *ids])
    both = torch.stack([torch.stack([k[0], v[0]]) for k, v in layers])
    return both[:, :, :, -len(ids) :].transpose(2, 3)


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((got - wanted).norm() / wanted.norm()) < (
        0.03 if torch.cuda.is_available() else 1e-5
    )


def test_kv_is_that_of_one_forward_over_the_document(blend: CacheBlend, model: Path) -> None:
    """Of a long, a short and no context, in one call."""
    long = words(ROOM + 30)
    blend.ingest([FIRST, SECOND, THIRD], left_context=[None, FIRST[:50], long], progress=False)
    assert close(kv(blend, FIRST), expected(model, NEUTRAL, FIRST))
    filled = [*NEUTRAL[50:], *FIRST[:50]]
    assert len(filled) == ROOM and close(kv(blend, SECOND), expected(model, filled, SECOND))
    assert not close(kv(blend, SECOND), expected(model, NEUTRAL, SECOND)), "context matters"
    assert close(kv(blend, THIRD), expected(model, long[-ROOM:], THIRD))


def test_text_before_ends_in_a_blank_line(blend: CacheBlend, model: Path) -> None:
    blend.ingest([SECOND], left_context=["What came before it. \n"], progress=False)
    ids = Letters().encode("What came before it.\n\n", add_special_tokens=False)
    assert close(kv(blend, SECOND), expected(model, [*NEUTRAL[len(ids) :], *ids], SECOND))


def test_without_a_document_all_but_the_key_is_as_with_the_neutral_text(
    opened: CacheBlend, blend: CacheBlend
) -> None:
    auto = opened.with_config(replace(opened.config, ingest_prefix=(HEAD, *NEUTRAL)))
    auto.ingest([FIRST, SECOND], progress=False)
    blend.ingest([FIRST, SECOND], left_context=[None, " \n"], progress=False)
    for ids in (FIRST, SECOND):
        assert blend.key(ids) != auto.key(ids)
        assert torch.equal(kv(blend, ids), kv(auto, ids))
    auto.delete_except([])


def test_the_first_that_was_stored_stays(blend: CacheBlend, model: Path) -> None:
    one, other = words(ROOM), words(ROOM)
    report = blend.ingest([SECOND, SECOND], left_context=[one, other], progress=False)
    assert (report.computed, report.repeated) == (1, 1)
    assert close(kv(blend, SECOND), expected(model, one, SECOND))
    assert blend.ingest([SECOND], left_context=[other], progress=False).present == 1
    assert close(kv(blend, SECOND), expected(model, one, SECOND))
    blend.forget([SECOND])
    blend.ingest([SECOND], left_context=[other], progress=False)
    assert close(kv(blend, SECOND), expected(model, other, SECOND))


def test_batches_leave_room_for_what_stands_before(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of at most 512 tokens, contexts included."""
    handle = get_kv_transfer_group().blender.handle  # type: ignore[attr-defined]
    sizes, run = [], handle.run

    def counted(step: Any, ids: Any, positions: Any) -> None:
        sizes.append(len(ids))
        run(step, ids, positions)

    monkeypatch.setattr(handle, "run", counted)
    blend.ingest([words(64) for _ in range(5)], left_context=[words(300)] * 5, progress=False)
    fitting = 512 // (ROOM + 64)
    assert 1 <= fitting < 5
    batches = [
        size // (ROOM + 64) for size in sizes if size > 1
    ]  # one token is the prompt prefix's
    assert max(batches) == fitting and sum(batches) == 5


@pytest.mark.parametrize("left_context", [None, FIRST])
def test_no_segment_is_exact(blend: CacheBlend, left_context: tuple[int, ...] | None) -> None:
    """Not even behind the very tokens that stand before it in the prompt: nobody looks."""
    blend.ingest([SECOND], left_context=[left_context], progress=False)
    behind = NEUTRAL if left_context is None else (*NEUTRAL[len(left_context) :], *left_context)
    plan = planned(blend, (HEAD, *behind, *SECOND, *words(20)))
    assert [s.kind for s in plan.segments if s.key] == [Kind.REUSE]


def test_ratio_one_is_a_full_prefill(blend: CacheBlend) -> None:
    blend.ingest([FIRST, SECOND, THIRD], left_context=[None, FIRST, words(300)], progress=False)
    ids = (*words(9), *THIRD, *words(3), *FIRST, *SECOND, *words(30))
    full = blend.generate(ids, mode="full", **FULL_LOGPROBS)
    exact = blend.generate(ids, recompute_ratio=1.0, **FULL_LOGPROBS)
    assert exact.report.blended and full.token_ids == exact.token_ids
    bound = 0.2 if torch.cuda.is_available() else 1e-3
    assert (logprobs(full) - logprobs(exact)).abs().max() < bound
    reused = blend.generate(ids, mode="reuse", **FULL_LOGPROBS)
    assert reused.report.blended and (logprobs(full) - logprobs(reused)).abs().max() > bound


def test_what_is_refused(opened: CacheBlend, blend: CacheBlend, model: Path) -> None:
    with pytest.raises(ConfigError, match="ingest_prefix='document'"):
        opened.ingest([FIRST], left_context=[SECOND], progress=False)
    with pytest.raises(PromptError, match="1 texts for 2 chunks"):
        blend.ingest([FIRST, SECOND], left_context=[SECOND], progress=False)
    with pytest.raises(PromptError, match="vocabulary"):
        blend.ingest([FIRST], left_context=[(VOCAB,)], progress=False)
    opened._tokenizer = None
    try:
        with pytest.raises(ConfigError, match="needs a tokenizer"):
            opened.with_config(replace(opened.config, ingest_prefix="document"))
    finally:
        opened._tokenizer = Letters()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
def test_flash_attention_agrees_with_plain_torch(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, left_context = [FIRST, SECOND, THIRD], [FIRST[:50], FIRST, words(300)]
    blend.ingest(chunks, left_context=left_context, progress=False)
    quick = [kv(blend, chunk) for chunk in chunks]
    blend.forget(chunks)
    monkeypatch.setattr(compat, "flash_attention", lambda layer: None)
    blend.ingest(chunks, left_context=left_context, progress=False)
    for got, chunk in zip(quick, chunks, strict=True):
        wanted = kv(blend, chunk)
        assert (got - wanted).norm() / wanted.norm() < 0.02
