"""When a blend is worth its fixed costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chunks import key_of
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.costs import Costs
from cacheblend_rag.locate import Match
from cacheblend_rag.plan import Kind, NoPlan, Plan, Segment, make_plan
from cacheblend_rag.reason import Reason

# an 8B model on an H100: what `cacheblend_costs` measured there, rounded
H100 = Costs(prefill_s=24e-6, recompute_s=22e-6, load_s=2.6e-6, blend_s=14e-3)


def plan(num_chunks: int, costs: Costs | None, **options: object) -> Plan | NoPlan:
    size = 1024
    ids = list(range(num_chunks * size + 32))
    key = "0" * 64
    matches = [Match(i * size, (i + 1) * size, key, 0, size) for i in range(num_chunks)]
    config = BlendConfig(ingest_prefix="none").for_call(options)
    return make_plan(ids, matches, config, prefix_ids=(9, 9), block_size=16, costs=costs)


def test_long_contexts_are_blended_and_short_ones_are_not() -> None:
    costs = H100._replace(blend_s=25e-3)
    assert isinstance(plan(6, costs), Plan)
    refused = plan(1, costs)
    assert isinstance(refused, NoPlan) and refused.reason is Reason.PREFILL_AS_QUICK


def test_copying_runs_beside_computing() -> None:
    """The longer of the two counts, not both."""
    made = slow_plan(0.5)  # half of 6,144 tokens is computed, all are copied
    costs = Costs(prefill_s=1e-3, recompute_s=1e-3, load_s=0.5e-3, blend_s=0.25)
    assert costs.blend(made) == pytest.approx(0.25 + 3.072)
    assert costs._replace(load_s=1e-3).blend(made) == pytest.approx(0.25 + 6.144)
    assert costs._replace(load_s=0.1e-3).blend(made) == pytest.approx(0.25 + 3.072)


@pytest.mark.parametrize(("share", "is_worth_it"), [(0.5, True), (0.8, True), (0.9, False)])
def test_a_blend_has_to_be_predicted_clearly_quicker(share: float, is_worth_it: bool) -> None:
    """Predictions of short prompts are off by a seventh: less than that is no gain to count on,
    while a blend that is predicted a fifth quicker is one.
    """
    made = slow_plan(0.0)
    costs = Costs(prefill_s=1e-3, recompute_s=1e-3, load_s=0, blend_s=share * 6.144)
    assert (costs.refusal(made) is None) == is_worth_it


def test_what_grows_with_the_context_is_corrected_by_the_token() -> None:
    """Without kernels, a blend that is slow for a short prompt is slower for a long one."""
    made, long = plan(1, None, recompute_ratio=0.15), plan(6, None, recompute_ratio=0.15)
    assert isinstance(made, Plan) and isinstance(long, Plan)
    costs = Costs(prefill_s=1e-5, recompute_s=1e-5, load_s=0, blend_s=0, context_s=1e-5)
    assert costs.refusal(long), "until it is measured"
    slow = costs.corrected(made, plain_s=0.012, blended_s=0.03)
    assert slow.blend(made) - slow.prefill(made) == pytest.approx(0.018)
    assert slow.refusal(long) and slow.too_short(long.end)
    quick = costs.corrected(made, plain_s=0.03, blended_s=0.012)
    assert quick.blend_s == 0 and quick.refusal(long) is None


@given(
    blend_s=st.floats(0, 0.1),
    prefill_s=st.floats(1e-6, 1e-4),
    num_chunks=st.integers(1, 8),
    behind=st.integers(0, 999),
)
def test_what_is_too_short_has_no_plan_that_is_worth_it(
    blend_s: float, prefill_s: float, num_chunks: int, behind: int
) -> None:
    made = plan(num_chunks, None, recompute_ratio=0.0)
    assert isinstance(made, Plan)
    costs = Costs(prefill_s=prefill_s, recompute_s=prefill_s, load_s=0, blend_s=blend_s)
    too_short = costs.too_short(made.end + behind)
    assert too_short is None or costs.refusal(made) is not None
    # and a prompt of nothing but what is reused at once is searched where a plan is worth it
    assert (costs.too_short(made.end) is None) == (costs.blend_s < 0.85 * prefill_s * made.end)


def test_a_refusal_says_what_was_predicted() -> None:
    costs = Costs(prefill_s=1e-3, recompute_s=1e-3, load_s=0, blend_s=6.144)
    refusal = costs.refusal(slow_plan(0.25))
    assert refusal is not None and refusal.detail == (
        "a plain prefill is as quick here: 6144.0 ms predicted for 6144 tokens, a blend 7680.0 ms "
        "(blend_if='always' blends all the same)"
    )


def test_fresh_tokens_are_computed() -> None:
    segments = (Segment(0, 1024), Segment(1024, 2048, "k", 0, Kind.REUSE))
    made = replace(slow_plan(0.0), segments=segments)
    costs = Costs(prefill_s=1e-3, recompute_s=1e-3, load_s=0, blend_s=0)
    assert costs.blend(made) == pytest.approx(1.024)


def test_a_chunk_that_stands_twice_is_fetched_once() -> None:
    twice = (Segment(0, 100, "k", 0, Kind.REUSE), Segment(100, 150, "k", 0, Kind.REUSE))
    made = replace(slow_plan(0.0), segments=twice)
    costs = Costs(prefill_s=1.0, recompute_s=1.0, load_s=0, blend_s=0)
    assert costs.too_slow(made, {"k": 149.0}) == set()
    assert costs.too_slow(made, {"k": 150.0}) == {"k"}  # as quick to compute, which is exact


def test_slow_loading_refuses_what_fast_loading_does_not() -> None:
    assert isinstance(plan(6, H100._replace(load_s=30e-6)), NoPlan)
    assert isinstance(plan(6, H100._replace(load_s=10e-6)), Plan)


def test_a_high_ratio_is_not_worth_it() -> None:
    assert isinstance(plan(6, H100, recompute_ratio=1.0), NoPlan)
    assert isinstance(plan(6, H100, recompute_ratio=0.3), Plan)


def test_without_measurements_or_when_asked_for_everything_is_blended() -> None:
    slow = H100._replace(blend_s=9.0)
    assert isinstance(plan(1, None), Plan)
    assert isinstance(plan(6, slow, blend_if="always"), Plan)
    assert isinstance(plan(6, slow, mode="reuse"), Plan)  # a baseline, asked for by name
    assert isinstance(plan(6, slow), NoPlan)


def test_costs_are_corrected_by_what_a_request_took() -> None:
    made = plan(2, None)
    assert isinstance(made, Plan)
    costs = H100.corrected(made, plain_s=0.040, blended_s=0.038)
    assert costs.blend(made) - costs.prefill(made) == pytest.approx(-0.002)
    assert costs._replace(blend_s=0) == H100._replace(blend_s=0)
    assert H100.corrected(made, plain_s=9.0, blended_s=0.0).blend_s == 0


# --- chunks that are not in memory ----------------------------------------------------------------

KV_BYTES = 131_072  # a token of an 8B model in bfloat16


def fetch_s(num_chunks: int, bandwidth: float) -> dict[str, float]:
    return {key_of(i): 1024 * KV_BYTES / bandwidth for i in range(num_chunks)}


def slow_plan(ratio: float = 0.15) -> Plan:
    """Six chunks, each under a key of its own."""
    segments = tuple(Segment(i * 1024, (i + 1) * 1024, key_of(i), 0, Kind.REUSE) for i in range(6))
    return Plan(
        segments=segments,
        question_start=6 * 1024,
        ratio=ratio,
        selector="query",
        selector_options={},
    )


def test_a_store_slower_than_a_prefill_is_refused_with_the_reason() -> None:
    slow = fetch_s(6, 0.5e9)  # 268 ms a chunk that a prefill computes in 25 ms
    assert H100.refusal(slow_plan()) is None
    assert H100.too_slow(slow_plan(), slow) == slow.keys()
    refusal = H100.refusal(slow_plan(), slow)
    assert refusal is not None and refusal.reason is Reason.PREFILL_AS_QUICK
    assert "6 chunks are not in memory, fetching them takes 1611 ms" in refusal.detail
    assert "147.5 ms predicted" in refusal.detail


def test_a_fast_store_is_worth_it() -> None:
    fast = fetch_s(6, 20e9)  # 6.7 ms a chunk
    assert H100.refusal(slow_plan(), fast) is None
    assert H100.too_slow(slow_plan(), fast) == set()


def test_fetching_adds_to_what_a_blend_costs() -> None:
    near_the_edge = fetch_s(6, 7.1e9)  # 19 ms a chunk, less than it takes to compute
    assert H100.too_slow(slow_plan(), near_the_edge) == set()
    refusal = H100.refusal(slow_plan(), near_the_edge)
    assert refusal is not None and "fetching them takes" in refusal.detail


def test_only_what_is_far_is_computed() -> None:
    one = dict(list(fetch_s(6, 0.5e9).items())[:1])
    assert H100.too_slow(slow_plan(), one) == one.keys()
    assert H100.refusal(slow_plan(), one) is None  # five chunks in memory are still worth it


def test_the_more_is_recomputed_the_less_is_worth_fetching() -> None:
    chunks = fetch_s(6, 10e9)
    assert H100.too_slow(slow_plan(0.1), chunks) == set()
    assert H100.too_slow(slow_plan(0.9), chunks) == chunks.keys()
    assert H100.too_slow(slow_plan(1.0), chunks) == chunks.keys()


def test_a_plan_tells_the_engine_whether_costs_matter() -> None:
    asked: list[tuple[dict[str, object], str]] = [
        ({}, "faster"),
        ({"blend_if": "always"}, "always"),
        ({"mode": "reuse"}, "always"),
    ]
    for options, expected in asked:
        made = plan(6, None, **options)
        assert isinstance(made, Plan)
        assert made.blend_if == expected
        assert Plan.from_dict(made.to_dict()) == made
    one, other = plan(6, None), plan(6, None, blend_if="always")
    assert isinstance(one, Plan) and isinstance(other, Plan)
    assert one.settings == other.settings  # the same KV
