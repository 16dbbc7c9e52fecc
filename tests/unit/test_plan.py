"""What is reused and why: plain data in, plain data out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cacheblend_rag import BlendConfig
from cacheblend_rag.locate import Match
from cacheblend_rag.plan import Head, Kind, NoPlan, Plan, Segment, make_plan
from cacheblend_rag.reason import Reason
from cacheblend_rag.report import make_report

IDS = tuple(range(1000, 1300))


def plan(
    matches: list[Match],
    *,
    prefix: tuple[int, ...] | None = (),
    ids: tuple[int, ...] = IDS,
    **options: Any,
) -> Plan | NoPlan:
    return make_plan(ids, matches, BlendConfig(**options), prefix_ids=prefix, block_size=16)


def match(start: int, end: int, key: str = "k", offset: int = 0) -> Match:
    return Match(start, end, key, offset, offset + end - start)


def test_segments_are_contiguous_and_end_on_a_block() -> None:
    made = plan([match(10, 60, "a"), match(60, 100, "b"), match(110, 205, "c")])
    assert isinstance(made, Plan)
    assert made.segments == (
        Segment(0, 10),
        Segment(10, 60, "a", 0, Kind.REUSE),
        Segment(60, 100, "b", 0, Kind.REUSE),
        Segment(100, 110),
        Segment(110, 192, "c", 0, Kind.REUSE),
    )
    assert made.end == 192 and made.question_start == 205


def test_one_token_is_left_to_vllm() -> None:
    made = plan([match(0, 320)], ids=tuple(range(320)))
    assert isinstance(made, Plan) and made.end == 304


@pytest.mark.parametrize(
    ("matches", "options", "reason", "detail"),
    [
        ([], {}, Reason.NO_CHUNK_FOUND, "no stored chunk"),
        ([match(0, 100)], {"mode": "off"}, Reason.MODE, "'off'"),
        ([match(0, 100)], {"mode": "full"}, Reason.MODE, "'full'"),
        ([match(0, 15)], {}, Reason.NO_WHOLE_BLOCK, "no block"),
    ],
)
def test_no_plan_says_why(
    matches: list[Match], options: dict[str, Any], reason: Reason, detail: str
) -> None:
    made = plan(matches, **options)
    assert isinstance(made, NoPlan) and made.reason is reason and detail in made.detail


def test_exact_only_behind_its_own_prefix_at_its_own_place() -> None:
    prefix = IDS[:20]

    def kind(m: Match, p: tuple[int, ...] | None) -> Kind:
        made = plan([m], prefix=p)
        assert isinstance(made, Plan)
        return made.segments[-1].kind

    assert kind(match(20, 100), prefix) is Kind.EXACT
    assert kind(match(20, 100), (1, *prefix[1:])) is Kind.REUSE
    assert kind(match(30, 100), prefix) is Kind.REUSE
    assert kind(match(20, 100, offset=4), prefix) is Kind.REUSE
    assert kind(match(20, 100, offset=40), prefix) is Kind.HEAD_CUT
    assert kind(match(0, 100), ()) is Kind.EXACT
    for start in (0, 20):  # each chunk has a prefix of its own: it may be any
        assert kind(match(start, 100), None) is Kind.REUSE
    assert kind(match(20, 100, offset=40), None) is Kind.HEAD_CUT


def test_the_stored_head_is_exact_where_the_prompt_starts_with_it() -> None:
    def made(ids: tuple[int, ...], start: int = 20) -> tuple[Segment, ...]:
        plan = make_plan(
            IDS,
            [match(start, 100)],
            BlendConfig(),
            prefix_ids=(1, 2),
            block_size=16,
            head=Head("h", ids),
        )
        assert isinstance(plan, Plan)
        return plan.segments

    reused = Segment(20, 96, "k", 0, Kind.REUSE)
    exact = Segment(0, 12, "h", 0, Kind.EXACT)
    assert made(IDS[:12]) == (exact, Segment(12, 20), reused)
    assert made(IDS[:20]) == (Segment(0, 20, "h", 0, Kind.EXACT), reused)
    assert made((7, *IDS[1:12])) == (Segment(0, 20), reused)
    assert made(IDS[:30]) == (Segment(0, 20), reused), "a head that reaches into a chunk"
    assert made(IDS[:12], start=0) == (Segment(0, 96, "k", 0, Kind.REUSE),)


def test_params_survive_json_and_reject_what_is_malformed() -> None:
    made = plan([match(10, 100)], recompute_ratio=0.3, selector_options={"layers": (0.2, 0.5)})
    assert isinstance(made, Plan)
    params = json.loads(json.dumps(made.to_params()))
    again = Plan.from_params(params)
    assert again is not None and again.segments == made.segments
    assert again.settings == made.settings
    assert Plan.from_params({}) is None and Plan.from_params(None) is None
    for name, value in [
        ("format", 99),
        ("segments", [[5, 10, "", 0, 0]]),
        ("segments", []),
        ("segments", [[0, 10, "", 0, 9]]),
        ("segments", [[0, 10, ""]]),
        ("ratio", 2.0),
        ("ratio", None),
        ("question_start", 3),
        ("selector", "best"),
    ]:
        broken = json.loads(json.dumps(params))
        broken["cacheblend"][name] = value
        with pytest.raises(ValueError, match=r"plan|selector"):
            Plan.from_params(broken)


def test_settings_tell_apart_what_gives_other_kv() -> None:
    def settings(ids: tuple[int, ...] = IDS, **options: Any) -> str:
        made = plan([match(10, 100)], ids=ids, **options)
        assert isinstance(made, Plan)
        return made.settings

    assert settings() == settings(when="always") == settings((*IDS[:-1], 7))
    assert settings() != settings(recompute_ratio=0.2)
    assert settings() != settings(selector="hkvd")
    assert settings() != settings(selector_options={"window": 33})
    assert settings() != settings(reach=0)


def test_question_is_what_follows_the_last_chunk() -> None:
    made = plan([match(10, 100)])
    assert isinstance(made, Plan) and made.question_ids(IDS) == IDS[100:]


def test_question_before_the_chunks_runs_in_front_of_the_tail() -> None:
    made = plan([match(40, 297)])
    assert isinstance(made, Plan) and made.question_ids(IDS) == IDS[:40] + IDS[297:]
    only_chunks = plan([match(0, 300)])
    assert isinstance(only_chunks, Plan) and only_chunks.question_ids(IDS) == IDS[-8:]


def test_report_counts_every_token_once() -> None:
    made = plan([match(10, 60, "a"), match(60, 205, "b")])
    assert isinstance(made, Plan)
    engine = {"recomputed": [0, 5, 0], "missing": [2], "seconds": {"load": 0.1}, "bytes": 7}
    for cached in (0, 16, 64):
        report = make_report(
            made,
            {**engine, "prefix_cached": cached},
            mode="blend",
            tokens_total=300,
            ttft_s=1.0,
            total_s=2.0,
            stages_s={"plan": 0.2},
        )
        kinds = report.tokens_reused, report.tokens_recomputed, report.tokens_fresh
        assert sum(kinds) + report.tokens_prefix_cached == 300
        assert [s.start for s in report.segments[1:]] == [s.end for s in report.segments[:-1]]
        assert report.segments[0].start == 0 and report.segments[-1].end == 300
        assert report.missing_keys == ("b",) and report.stages_s == {"plan": 0.2, "load": 0.1}
        assert json.dumps(report.to_dict())


def test_a_chunk_that_came_too_late_is_not_forgotten() -> None:
    made = plan([match(10, 60, "a"), match(60, 205, "b")])
    engine = {"recomputed": [0, 5, 0], "missing": [1, 2], "late": [2], "seconds": {}, "bytes": 0}
    report = make_report(
        made, engine, mode="blend", tokens_total=300, ttft_s=1.0, total_s=2.0, stages_s={}
    )
    assert [s.kind for s in report.segments] == ["fresh", "missing", "late", "fresh"]
    assert "longer" in report.segments[2].detail
    assert report.missing_keys == ("a",)
    assert report.tokens_fresh == 300
