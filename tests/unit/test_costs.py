"""When a blend is worth its fixed costs."""

from __future__ import annotations

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.costs import Costs
from cacheblend_rag.locate import Match
from cacheblend_rag.plan import NoPlan, Plan, make_plan

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
    assert isinstance(refused, NoPlan) and "plain prefill" in refused.reason


def test_slow_loading_refuses_what_fast_loading_does_not() -> None:
    assert isinstance(plan(6, H100._replace(load_s=30e-6)), NoPlan)
    assert isinstance(plan(6, H100._replace(load_s=10e-6)), Plan)


def test_a_high_ratio_is_not_worth_it() -> None:
    assert isinstance(plan(6, H100, recompute_ratio=1.0), NoPlan)
    assert isinstance(plan(6, H100, recompute_ratio=0.3), Plan)


def test_without_measurements_or_when_asked_for_everything_is_blended() -> None:
    slow = H100._replace(blend_s=9.0)
    assert isinstance(plan(1, None), Plan)
    assert isinstance(plan(6, slow, when="always"), Plan)
    assert isinstance(plan(6, slow, mode="reuse"), Plan)  # a baseline, asked for by name
    assert isinstance(plan(6, slow), NoPlan)
