"""What is reused and why: plain data in, plain data out."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag import BlendConfig, locate
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.locate import Match
from cacheblend_rag.plan import Kind, NoPlan, Plan, PromptPrefix, Segment, make_plan
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
    made = plan([match(0, 321)], ids=tuple(range(321)))
    assert isinstance(made, Plan) and made.end == 320


def test_all_that_is_found_counts_as_found() -> None:
    """Also what a plan leaves to vLLM: the part of a block at its end."""
    made = plan([match(10, 60, "a"), match(60, 100, "b"), match(110, 205, "c")])
    assert isinstance(made, Plan) and made.end == 192
    found = [made.found_from(start) for start in (0, 10, 59, 100, 105, 192, 204, 205, 300)]
    assert found == [185, 185, 136, 95, 95, 13, 1, 0, 0]
    made = plan([match(0, 100), match(195, 200)])
    assert isinstance(made, Plan) and made.segments[-1].kind is Kind.FRESH
    assert made.found_from(0) == 100 and made.found_from(100) == 0


@pytest.mark.parametrize(
    ("longest", "end", "question_start"),
    [(None, 192, 205), (200, 192, 205), (192, 192, 205), (191, 176, 176), (100, 96, 96)],
)
def test_a_window_bounds_what_a_blend_covers(
    longest: int | None, end: int, question_start: int
) -> None:
    """What lies behind the bound asks, as it would be hidden behind a window otherwise."""
    made = make_plan(
        IDS, [match(10, 205)], BlendConfig(), prefix_ids=(), block_size=16, longest=longest
    )
    assert isinstance(made, Plan)
    assert (made.end, made.question_start) == (end, question_start)


def test_chunks_behind_a_window_are_not_blended() -> None:
    made = make_plan(IDS, [match(96, 205)], BlendConfig(), prefix_ids=(), block_size=16, longest=96)
    assert made == NoPlan(
        Reason.SLIDING_WINDOW,
        "a sliding window bounds a blend to 96 tokens, which hold no stored chunk",
    )


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
    assert kind(match(20, 100, offset=40), prefix) is Kind.LEFT_TRUNCATED
    assert kind(match(0, 100), ()) is Kind.EXACT
    for start in (0, 20):  # each chunk has a prefix of its own: it may be any
        assert kind(match(start, 100), None) is Kind.REUSE
    assert kind(match(20, 100, offset=40), None) is Kind.LEFT_TRUNCATED


def test_a_head_cut_by_no_more_than_a_tokeniser_seam_is_no_cut() -> None:
    """The index finds a chunk of which 8 tokens at an end differ: by then it is the same chunk."""

    def kind(offset: int) -> Kind:
        made = plan([match(20, 100, offset=offset)])
        assert isinstance(made, Plan)
        return made.segments[-1].kind

    assert kind(locate.ANCHOR_MARGIN) is Kind.REUSE
    assert kind(locate.ANCHOR_MARGIN + 1) is Kind.LEFT_TRUNCATED


def test_every_option_of_a_request_reaches_its_plan() -> None:
    made = plan(
        [match(0, 100)],
        recompute_ratio=0.4,
        selector="query",
        selector_options={"layers": (0.2, 0.5)},
        propagation_length=7,
        blend_if="always",
    )
    assert isinstance(made, Plan)
    assert (made.ratio, made.selector, made.propagation_length, made.blend_if) == (
        0.4,
        "query",
        7,
        "always",
    )
    assert made.selector_options == {"layers": (0.2, 0.5)}
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == replace(
        made, selector_options={"layers": [0.2, 0.5]}
    )
    reuse = plan([match(0, 100)], mode="reuse", recompute_ratio=0.4, blend_if="faster")
    assert isinstance(reuse, Plan) and (reuse.ratio, reuse.blend_if) == (0.0, "always")


def test_the_stored_head_is_exact_where_the_prompt_starts_with_it() -> None:
    def made(ids: tuple[int, ...], start: int = 20) -> tuple[Segment, ...]:
        plan = make_plan(
            IDS,
            [match(start, 100)],
            BlendConfig(),
            prefix_ids=(1, 2),
            block_size=16,
            prompt_prefix=PromptPrefix("h", ids),
        )
        assert isinstance(plan, Plan)
        return plan.segments

    reused = Segment(20, 96, "k", 0, Kind.REUSE)
    exact = Segment(0, 12, "h", 0, Kind.EXACT)
    assert made(IDS[:12]) == (exact, Segment(12, 20), reused)
    assert made(IDS[:20]) == (Segment(0, 20, "h", 0, Kind.EXACT), reused)
    assert made((7, *IDS[1:12])) == (Segment(0, 20), reused)
    assert made(IDS[:30]) == (Segment(0, 20), reused), "a prompt prefix that reaches into a chunk"
    assert made(IDS[:12], start=0) == (Segment(0, 96, "k", 0, Kind.REUSE),)


def test_a_plan_survives_json() -> None:
    made = plan([match(10, 100)], recompute_ratio=0.3, selector_options={"layers": (0.2, 0.5)})
    assert isinstance(made, Plan)
    again = Plan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.segments == made.segments
    assert again.settings == made.settings


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_matches_make_a_plan_of_whole_blocks(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 400))
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=12)))
    pairs = [pair for pair in pairwise(cuts) if data.draw(st.booleans())]
    matches = [match(a, b, str(a), data.draw(st.integers(0, 20))) for a, b in pairs]
    block_size = data.draw(st.sampled_from([1, 16, 32]))
    made = make_plan(
        tuple(range(size)), matches, BlendConfig(), prefix_ids=(), block_size=block_size
    )
    if isinstance(made, NoPlan):
        return
    assert made.end % block_size == 0 and made.end < size
    assert [s.start for s in made.segments] == [0, *(s.end for s in made.segments[:-1])]
    served = {(s.start, s.key, s.offset) for s in made.segments if s.key}
    assert served == {(m.start, m.key, m.offset) for m in matches if m.start < made.end}
    assert Plan.from_dict(made.to_dict()) == made


def test_the_ends_of_ranges_belong_to_them() -> None:
    made = plan([match(0, 100)], recompute_ratio=1.0, propagation_length=0)
    assert isinstance(made, Plan)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_settings_tell_apart_what_gives_other_kv() -> None:
    def settings_of(ids: tuple[int, ...] = IDS, **options: Any) -> str:
        made = plan([match(10, 100)], ids=ids, **options)
        assert isinstance(made, Plan)
        return made.settings

    assert settings_of() == settings_of(blend_if="always") == settings_of((*IDS[:-1], 7))
    assert settings_of() != settings_of(recompute_ratio=0.2)
    assert settings_of() != settings_of(selector="hkvd")
    assert settings_of() != settings_of(selector_options={"window": 33})
    assert settings_of() != settings_of(propagation_length=0)
    made = plan([match(10, 100)])
    assert isinstance(made, Plan) and replace(made, space="another").settings != made.settings


def test_question_is_what_follows_the_last_chunk() -> None:
    made = plan([match(10, 100)])
    assert isinstance(made, Plan) and made.question_ids(IDS) == IDS[100:]


@pytest.mark.parametrize(
    ("asked", "used"), [(8, 8), (300, 300), (512, 512), (513, 512), (900, 512)]
)
def test_a_long_question_asks_with_its_last_tokens(asked: int, used: int) -> None:
    """The question's attention is computed beside the prompt: 512 rows bound what that costs, and
    are more than people ask in; what comes last is what is asked.
    """
    ids = tuple(range(1000 + asked))
    made = plan([match(0, 1000)], ids=ids)
    assert isinstance(made, Plan) and made.question_ids(ids) == ids[-used:]


@pytest.mark.parametrize(("tail", "asks"), [(7, "before"), (8, "after")])
def test_a_template_s_tail_is_no_question(tail: int, asks: str) -> None:
    """Chat templates close a message with up to 7 tokens; 8 tokens can be a question."""
    ids = IDS[: 100 + tail]
    made = plan([match(40, 100)], ids=ids)
    assert isinstance(made, Plan)
    assert made.question_ids(ids) == (IDS[:40] if asks == "before" else ()) + ids[100:]


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
            None,
            {**engine, "plan": made.to_dict(), "prefix_cached": cached},
            mode="blend",
            tokens_total=300,
            ttft_s=1.0,
            total_s=2.0,
            tokenize_s=0.2,
        )
        kinds = report.tokens_reused, report.tokens_recomputed, report.tokens_fresh
        assert sum(kinds) + report.tokens_prefix_cached == 300
        assert [s.start for s in report.segments[1:]] == [s.end for s in report.segments[:-1]]
        assert report.segments[0].start == 0 and report.segments[-1].end == 300
        assert report.missing_keys == ("b",) and report.stages_s == {"tokenize": 0.2, "load": 0.1}
        assert json.dumps(report.to_dict())


def test_a_chunk_that_came_too_late_is_not_forgotten() -> None:
    made = plan([match(10, 60, "a"), match(60, 205, "b")])
    engine: dict[str, object] = {
        "recomputed": [0, 5, 0],
        "missing": [1, 2],
        "timed_out": [2],
        "seconds": {},
        "bytes": 0,
    }
    assert isinstance(made, Plan)
    engine["plan"] = made.to_dict()
    report = make_report(
        None, engine, mode="blend", tokens_total=300, ttft_s=1.0, total_s=2.0, tokenize_s=0
    )
    assert [s.kind for s in report.segments] == ["fresh", "missing", "timed_out", "fresh"]
    assert "longer" in report.segments[2].detail
    assert report.missing_keys == ("a",)
    assert report.tokens_fresh == 300


def test_a_prompt_prefix_has_a_key_of_its_own() -> None:
    """It stands behind nothing, whatever chunks are computed behind."""
    one, other = KeySpace("ab", (1, 2)), KeySpace("ab", (3,), by_document=True)
    assert one.prompt_prefix_key(IDS) == other.prompt_prefix_key(IDS) != one.key(IDS)
    assert KeySpace("ab", (1, 2), "tenant").prompt_prefix_key(IDS) != one.prompt_prefix_key(IDS)
    assert KeySpace("cd", (1, 2)).prompt_prefix_key(IDS) != one.prompt_prefix_key(IDS)
