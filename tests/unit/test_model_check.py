"""The model check's judgements, on numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from cacheblend_rag import model_check
from cacheblend_rag.engine import EngineInfo, ModelCheck
from cacheblend_rag.reason import Reason, Why

LAYERS, PREFILL = model_check.tolerance("float32")
NAN = math.nan
ROW = [0, 37, 0.0, 0.0]
SURE = {7: 0.0}
EVEN = {7: math.log(0.5), 8: math.log(0.5)}


def info(*checks: list[Any], **changes: Any) -> EngineInfo:
    facts: dict[str, Any] = {
        "model": "m", "vllm_version": "0", "dtype": "float32", "device": "cpu", "block_size": 32,
        "max_model_len": 8192, "max_num_batched_tokens": 2048, "vocab_size": 512,
        "extra": {"checks": list(checks) or [ROW]},
    }  # fmt: skip
    return EngineInfo(**{**facts, **changes})


@pytest.mark.parametrize("row", [ROW, [3, 37, LAYERS, 0.0], [3, 900, 0.0, LAYERS]])
def test_errors_within_the_tolerance_pass(row: list[Any]) -> None:
    report = model_check.check_layers(info(ROW, row))
    assert report.passed and report.reason is None and not report.detail
    assert [check.layer for check in report.layers] == [0, row[0]]


@pytest.mark.parametrize("bad", [1.01 * LAYERS, 1.4, math.inf, NAN])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_one_layer_that_differs_is_enough(bad: float, what: str) -> None:
    errors = [bad, 0.0] if what == "keys" else [0.0, bad]
    report = model_check.check_layers(info(ROW, [1, 37, *errors], [2, 37, 0.0, 0.0]))
    assert not report.passed and report.reason is Reason.MOVED_KEYS_DIFFER
    assert "layer 1" in report.detail and f"{bad:.3g} of {what}" in report.detail
    assert [check.ok for check in report.layers] == [True, False, True]


def test_half_precision_may_round() -> None:
    row = [0, 37, 0.1, 0.1]
    assert not model_check.check_layers(info(row)).passed
    assert model_check.check_layers(info(row, dtype="bfloat16")).passed
    assert not model_check.check_layers(info([0, 37, 0.16, 0.0], dtype="bfloat16")).passed


@pytest.mark.parametrize("bad", [1.01 * LAYERS, NAN])
def test_attention_of_another_kind_is_refused(bad: float) -> None:
    same, other = [0, LAYERS, False], [1, bad, False]
    assert model_check.check_layers(info(extra={"checks": [ROW], "attention": [same]})).passed
    report = model_check.check_layers(info(extra={"checks": [ROW], "attention": [same, other]}))
    assert not report.passed and report.reason is Reason.ATTENTION_DIFFERS
    assert "layer 1" in report.detail and f"{bad:.3g}" in report.detail


def test_a_cache_that_rounds_is_no_other_attention() -> None:
    for error, passes in ((0.1, True), (0.16, False)):
        extra = {"checks": [ROW], "attention": [[0, error, True]]}
        assert model_check.check_layers(info(extra=extra)).passed is passes


def test_a_model_refused_before_stays_refused() -> None:
    report = model_check.check_layers(info(refusal=Why(Reason.MLA, "latent")))
    assert (report.passed, report.reason, report.detail) == (False, Reason.MLA, "latent")


def test_nothing_passes_unchecked() -> None:
    with pytest.raises(AssertionError):
        model_check.check_layers(info(extra={}))


OPEN = ModelCheck(passed=True, tolerance=(LAYERS, PREFILL), max_tokens=96)


def test_the_same_distribution_passes() -> None:
    report = model_check.check_prefill(OPEN, EVEN, dict(EVEN))
    assert report.passed and report.prefill_error == 0.0 and report.max_tokens == 96
    near = {7: math.log(0.5 + 0.9 * PREFILL), 8: math.log(0.5 - 0.9 * PREFILL)}
    assert model_check.check_prefill(OPEN, EVEN, near).passed


@pytest.mark.parametrize(
    "blended",
    [
        SURE,
        {9: 0.0},
        {7: math.log(0.5 + 1.1 * PREFILL), 8: math.log(0.5 - 1.1 * PREFILL)},
        {7: NAN, 8: NAN},
        {7: math.log(0.5), 8: NAN},
        {},
    ],
)
def test_another_distribution_is_refused(blended: dict[int, float]) -> None:
    report = model_check.check_prefill(OPEN, EVEN, blended)
    assert not report.passed and report.reason is Reason.RATIO_ONE_DIFFERS
    assert "recomputing every token" in report.detail


def test_unlikely_tokens_count_as_likely_ones() -> None:
    """A random prompt's 20 likeliest tokens may have a tenth of the probability together."""
    flat = {token: math.log(0.005) for token in range(20)}
    half = replace(OPEN, tolerance=model_check.tolerance("bfloat16"))
    others = {token + 20: probability for token, probability in flat.items()}
    assert model_check.check_prefill(half, flat, dict(flat)).passed
    assert not model_check.check_prefill(half, flat, others).passed
    for same, passes in ((19, True), (10, False)):
        mixed = dict(list(flat.items())[:same] + list(others.items())[same:])
        assert model_check.check_prefill(half, flat, mixed).passed is passes


@pytest.mark.parametrize("nothing", [{}, {7: NAN}])
def test_two_answers_that_say_nothing_are_not_alike(nothing: dict[int, float]) -> None:
    assert not model_check.check_prefill(OPEN, nothing, dict(nothing)).passed


def test_a_probe_that_was_not_blended_proves_nothing() -> None:
    report = model_check.check_prefill(OPEN, EVEN, EVEN, "the store was slow")
    assert not report.passed and report.reason is Reason.PROBE_NOT_BLENDED
    assert report.detail.endswith("by the engine: the store was slow")


# ---- sliding windows -----------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize(("device", "window"), [("cpu", 64), ("cpu", 1024), ("cuda", 4096)])
def test_the_probe_is_longer_than_a_window(device: str, window: int, block_size: int) -> None:
    engine = info(device=device, window=window, block_size=block_size, max_model_len=32768)
    probe = model_check.probe(engine)
    assert probe is not None
    blocks = (len(probe.ids) - len(probe.question)) // block_size
    assert blocks * block_size > window + 1, "what is blended must be, too"
    assert all(probe.ids[s : s + len(probe.chunk)] == probe.chunk for s in probe.starts)
    assert model_check.within_what_was_proved(OPEN, engine, len(probe.ids)) == OPEN


def test_what_no_probe_was_long_enough_for_is_not_blended() -> None:
    engine = info(window=4096, max_model_len=8192)
    probe = model_check.probe(engine)
    assert probe is not None and len(probe.ids) < 200, "on a CPU this would take minutes"
    proved = model_check.within_what_was_proved(
        replace(OPEN, max_tokens=None), engine, len(probe.ids)
    )
    assert proved.max_tokens == 4096
    proved = model_check.within_what_was_proved(
        replace(OPEN, max_tokens=500), engine, len(probe.ids)
    )
    assert proved.max_tokens == 500
    short = info(window=4096, max_model_len=4096)  # no prompt is longer
    assert model_check.within_what_was_proved(OPEN, short, len(probe.ids)) == OPEN


def test_the_probe_fits_the_context() -> None:
    for longest in (126, 127, 400, 1000):
        engine = info(window=512, max_model_len=longest)
        probe = model_check.probe(engine)
        assert (probe is None) is (longest < 126)
        assert probe is None or len(probe.ids) < longest
    assert model_check.probe(info(max_model_len=125)) is None


# ---- what costs are measured on ------------------------------------------------------------------


def test_prompts_to_time_share_a_chunk_and_nothing_behind_it() -> None:
    engine = info(max_model_len=2000, block_size=16, vocab_size=1000)
    prompts = model_check.timing_ids(engine, 3)
    assert [[len(part) for part in parts] for parts in prompts] == [[32, 1024, 32]] * 3
    assert len({parts[:2] for parts in prompts}) == 1 and len({parts[2] for parts in prompts}) == 3
    assert prompts == model_check.timing_ids(engine, 3), "the same at every start"
    ids = [token for parts in prompts for part in parts for token in part]
    assert min(ids) in range(100, 110) and max(ids) in range(890, 900), "no special tokens"


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"max_model_len": 1000}, 1000 - 3 * 32 - 64),
        ({"max_model_len": 416}, 256),
        ({"max_num_batched_tokens": 300}, 300),
    ],
)
def test_the_chunk_to_time_fits(changes: dict[str, Any], size: int) -> None:
    [(_, chunk, _)] = model_check.timing_ids(info(**changes), 1)
    assert len(chunk) == size


def test_where_no_chunk_fits_nothing_is_timed() -> None:
    assert model_check.timing_ids(info(max_model_len=415), 1) == []
    assert model_check.timing_ids(info(max_num_batched_tokens=255), 1) == []


def test_words_of_the_smallest_vocabulary() -> None:
    [parts] = model_check.timing_ids(info(vocab_size=3), 1)
    assert {token for part in parts for token in part} == {0, 1}
