"""What a report says, word for word: it is all that a user learns of a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cacheblend_rag.plan import Kind, Plan, Segment
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.report import BlendReport, SegmentReport, make_report

PLAN = Plan(
    segments=(
        Segment(0, 16, "h", 0, Kind.EXACT),
        Segment(16, 48, "a", 0, Kind.REUSE),
        Segment(48, 52),
        Segment(52, 84, "b", 8, Kind.LEFT_TRUNCATED),
        Segment(84, 96, "c", 0, Kind.REUSE),
    ),
    question_start=96,
    ratio=0.15,
    selector="query",
    selector_options={},
)
DONE: dict[str, Any] = {
    "plan": PLAN.to_dict(),
    "recomputed": [0, 5, 0, 9, 2],
    "missing": [],
    "seconds": {"load": 0.1},
    "bytes": 7,
}
REUSED = "stored KV, keys re-rotated"
EXACT = "stored KV at its own position, after its own prefix: exact"
CUT = "stored KV of a chunk whose head is not in the prompt: twice the ratio"
FRESH = "no stored chunk covers these tokens"
QUESTION = "the question, and less than a block before it"
CACHED = "the same beginning was computed before: vLLM's prefix cache"
SLOW = "the store would have taken longer with this chunk than computing it"
UNASKED = "the store could not be asked for this chunk: computed afresh"
GONE = "the store no longer has this chunk, or it was damaged: computed afresh"


def made(why_not: Why | None = None, **engine: Any) -> BlendReport:
    return make_report(
        why_not, engine, mode="blend", tokens_total=110, ttft_s=1.0, total_s=2.0, tokenize_s=0.2
    )


def test_a_blend() -> None:
    assert made(**DONE) == BlendReport(
        mode="blend",
        blended=True,
        tokens_total=110,
        tokens_reused=16 + 27 + 23 + 10,
        tokens_recomputed=16,
        tokens_fresh=4 + 14,
        recompute_ratio=0.15,
        selector="query",
        ttft_s=1.0,
        total_s=2.0,
        stages_s={"tokenize": 0.2, "load": 0.1},
        bytes_loaded=7,
        segments=[
            SegmentReport(0, 16, "reused", 0, EXACT, "h"),
            SegmentReport(16, 48, "reused", 5, REUSED, "a"),
            SegmentReport(48, 52, "fresh", 0, FRESH),
            SegmentReport(52, 84, "reused", 9, CUT, "b"),
            SegmentReport(84, 96, "reused", 2, REUSED, "c"),
            SegmentReport(96, 110, "fresh", 0, QUESTION),
        ],
    )


def test_behind_what_vllm_has_cached() -> None:
    report = made(**DONE, prefix_cached=50)
    assert report.segments == [
        SegmentReport(0, 50, "prefix_cached", 0, CACHED),
        SegmentReport(50, 52, "fresh", 0, FRESH),
        SegmentReport(52, 84, "reused", 9, CUT, "b"),
        SegmentReport(84, 96, "reused", 2, REUSED, "c"),
        SegmentReport(96, 110, "fresh", 0, QUESTION),
    ]
    assert (report.tokens_prefix_cached, report.tokens_reused, report.tokens_fresh) == (50, 33, 16)
    assert report.reason is None and report.detail == ""


def test_chunks_that_could_not_be_had() -> None:
    report = made(**{**DONE, "missing": [1, 3, 4]}, timed_out=[3], unavailable=[4])
    assert report.blended, "the prompt prefix was there"
    assert [tuple(s)[2:] for s in report.segments] == [
        ("reused", 0, EXACT, "h"),
        ("missing", 0, GONE, "a"),
        ("fresh", 0, FRESH, ""),
        ("timed_out", 0, SLOW, "b"),
        ("timed_out", 0, UNASKED, "c"),
        ("fresh", 0, QUESTION, ""),
    ]
    assert report.missing_keys == ("a",)
    assert (report.tokens_reused, report.tokens_recomputed, report.tokens_fresh) == (16, 0, 94)


def test_nothing_of_a_plan_could_be_had() -> None:
    report = made(**{**DONE, "missing": [0, 1, 3, 4]}, timed_out=[3])
    assert (report.blended, report.reason) == (False, Reason.CHUNKS_MISSING)
    assert report.detail == "none of the 4 stored chunks could be had; see the segments"
    assert (report.tokens_fresh, report.recompute_ratio, report.selector) == (110, None, None)


def test_all_of_a_plan_was_cached() -> None:
    report = made(**DONE, prefix_cached=96)
    assert (report.blended, report.reason) == (False, Reason.PREFIX_CACHED)
    assert report.detail == "what was reused is in vLLM's prefix cache already"
    assert [s.kind for s in report.segments] == ["prefix_cached", "fresh"]
    assert (report.tokens_prefix_cached, report.tokens_fresh) == (96, 14)


@pytest.mark.parametrize("cached", [0, 30, 500])
def test_what_was_not_to_be_blended(cached: int) -> None:
    why = Why(Reason.MODE, "mode is 'off'")
    held = min(cached, 110)
    report = made(why, prefix_cached=cached, seconds={"plan": 0.5}, recomputed=[1])
    rest = SegmentReport(held, 110, "fresh", 0, "mode is 'off'")
    head = [SegmentReport(0, held, "prefix_cached", 0, CACHED)] if held else []
    assert report == BlendReport(
        mode="blend",
        blended=False,
        tokens_total=110,
        reason=Reason.MODE,
        detail="mode is 'off'",
        tokens_fresh=110 - held,
        tokens_prefix_cached=held,
        ttft_s=1.0,
        total_s=2.0,
        stages_s={"tokenize": 0.2, "plan": 0.5},
        segments=[*head, rest],
    )


def test_why_the_engine_did_not() -> None:
    report = made(reason="lora", detail="an adapter")
    assert (report.reason, report.detail) == (Reason.LORA, "an adapter")
    report = made()
    assert report.reason is Reason.NOT_REPORTED
    assert report.detail == "the engine did not say what it did"


def test_as_plain_data() -> None:
    data = made(**DONE).to_dict()
    assert data["segments"][1] == {
        "start": 16, "end": 48, "kind": "reused", "tokens_recomputed": 5, "detail": REUSED,
        "key": "a",
    }  # fmt: skip
    assert data["blended"] is True and data["stages_s"] == {"tokenize": 0.2, "load": 0.1}


@pytest.mark.parametrize(
    ("refine", "engine", "tokens", "refined", "detail"),
    [
        ("off", {}, 0, False, ""),
        ("idle", {"refined": {"tokens": 90, "exact": True, "detail": ""}}, 90, True, ""),
        ("idle", {"refined": {"tokens": 32, "exact": False, "detail": ""}}, 32, False, "ended"),
        ("idle", {"refined": {"tokens": 8, "exact": False, "detail": "no room"}}, 8, False, "room"),
        (64, {"not_refined": "on a GPU", "refined": {}}, 0, False, "GPU"),
        (64, {}, 0, False, "ended before"),
    ],
)
def test_what_was_refined(
    refine: Any, engine: dict[str, Any], tokens: int, refined: bool, detail: str
) -> None:
    report = made(**DONE | {"plan": replace(PLAN, refine=refine).to_dict()}, **engine)
    assert (report.tokens_refined, report.refined) == (tokens, refined)
    assert bool(detail) == bool(report.refine_detail) and detail in report.refine_detail
