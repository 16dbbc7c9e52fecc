"""An engine that computes wrongly fails the check, and then serves as vLLM alone does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import FULL_LOGPROBS, PlainAnswer, logprobs, plain_engine, start_in_process
from tiny import Words, make

from cacheblend_rag.engine import attention, selfcheck
from cacheblend_rag.engine.rope import Rerotator, RotationDelta
from cacheblend_rag.engine.runner import StepTensors
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_process")]

words = Words(41)
PREFIX, CHUNK = words(4), words(70)
PROMPT = words(9) + CHUNK + words(40)


@pytest.fixture(scope="module")
def plain(tiny_models: Path) -> Iterator[PlainAnswer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        with plain_engine(make("llama", tiny_models)) as answer:
            found = answer(PROMPT)
    return found


def turns_one_position_too_far(patch: pytest.MonkeyPatch) -> None:
    delta = Rerotator.delta

    def too_far(self: Rerotator, old_N: torch.Tensor, new_N: torch.Tensor) -> RotationDelta:
        return delta(self, old_N, (new_N + 1).clamp_max(self.positions - 1))

    patch.setattr(Rerotator, "delta", too_far)


def turns_into_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rerotator, "apply", lambda self, k, delta, layers: torch.full_like(k, torch.nan))


def looks_ahead(patch: pytest.MonkeyPatch) -> None:
    metadata = functools.partial(attention.CommonAttentionMetadata)
    patch.setattr(
        attention,
        "CommonAttentionMetadata",
        lambda **known: metadata(**{**known, "causal": False}),
    )


def looks_at_the_wrong_place(patch: pytest.MonkeyPatch) -> None:
    slots = attention.PagedCache.slots

    def next_one(self: Any, blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return slots(self, blocks, positions).roll(1)

    patch.setattr(attention.PagedCache, "slots", next_one)


def takes_rows_for_another_requests(patch: pytest.MonkeyPatch) -> None:
    for kind in StepTensors.__subclasses__():
        order = kind.order
        patch.setattr(kind, "order", lambda self, counts, order=order: order(self, counts)[::-1])


def leaves_rows_the_tokens_that_vllm_takes_them_for(patch: pytest.MonkeyPatch) -> None:
    for kind in StepTensors.__subclasses__():
        ids = kind._ids.fget  # type: ignore[attr-defined]
        patch.setattr(kind, "_ids", property(lambda self, ids=ids: ids(self).clone()))


def leaves_rows_where_vllm_takes_them_to_be(patch: pytest.MonkeyPatch) -> None:
    for kind in StepTensors.__subclasses__():
        positions = kind.positions
        patch.setattr(
            kind, "positions", lambda self, n, positions=positions: positions(self, n).clone()
        )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (turns_one_position_too_far, Reason.MOVED_KEYS_DIFFER),
        (turns_into_nothing, Reason.MOVED_KEYS_DIFFER),
        (looks_ahead, Reason.ATTENTION_DIFFERS),
        (looks_at_the_wrong_place, Reason.ATTENTION_DIFFERS),
        (takes_rows_for_another_requests, Reason.RATIO_ONE_DIFFERS),
        (leaves_rows_the_tokens_that_vllm_takes_them_for, Reason.RATIO_ONE_DIFFERS),
        (leaves_rows_where_vllm_takes_them_to_be, Reason.RATIO_ONE_DIFFERS),
    ],
)
def test_what_is_wrong_is_refused(
    fault: Callable[[pytest.MonkeyPatch], None],
    reason: Reason,
    plain: PlainAnswer,
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with start_in_process(make("llama", tiny_models), prefix=PREFIX) as blend:
        assert not blend.model_check.passed and blend.model_check.reason is reason, (
            blend.model_check.detail
        )
        assert blend.ingest([CHUNK], progress=False).computed == 0
        result = blend.generate(PROMPT, **FULL_LOGPROBS)
        assert not result.report.blended and result.report.reason is reason
        assert result.report.detail == blend.model_check.detail
    assert result.token_ids == plain.tokens
    torch.testing.assert_close(logprobs(result), plain.logprobs, atol=0, rtol=0)


def test_layers_that_get_one_anothers_table_are_refused(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearest = selfcheck.nearest

    def next_ones(errors_TL: Any) -> list[int]:
        right = nearest(errors_TL)
        assert sorted(set(right)) == [0, 1], "there are two tables in use"
        return right[1:] + right[:1]

    monkeypatch.setattr(selfcheck, "nearest", next_ones)
    with start_in_process(make("gemma3", tiny_models), prefix=PREFIX) as blend:
        assert not blend.model_check.passed and blend.model_check.reason is Reason.MOVED_KEYS_DIFFER
        assert {c.layer for c in blend.model_check.layers if not c.ok} == {0, 1}
        assert blend.ingest([CHUNK], progress=False).computed == 0
        result = blend.generate(PROMPT, **FULL_LOGPROBS)
        assert not result.report.blended and result.report.reason is Reason.MOVED_KEYS_DIFFER


def test_attention_without_the_models_sinks_is_refused(
    tiny_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = attention.own_options
    monkeypatch.setattr(attention, "own_options", lambda layer: {**own(layer), "sinks_H": None})
    with start_in_process(make("gpt_oss", tiny_models), prefix=PREFIX) as blend:
        assert not blend.model_check.passed and blend.model_check.reason is Reason.ATTENTION_DIFFERS
        assert blend.ingest([CHUNK], progress=False).computed == 0
