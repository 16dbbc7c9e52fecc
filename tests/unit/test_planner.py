"""What of a request's prompt is reused, by what the workers said and the request's own options."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Words

from cacheblend_rag.calibration import Calibration
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.costs import Costs
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import KnownChunks, News, Row
from cacheblend_rag.learn import LearnOptions
from cacheblend_rag.plan import Kind, NoPlan, Plan, PromptPrefix
from cacheblend_rag.planner import Learning, Limits, Lost, Planner, Space
from cacheblend_rag.reason import Reason, Why

words = Words(8)
PREFIX, HEAD = words(6), words(9)
A, B = words(70), words(90)
KEYS = KeySpace("f", PREFIX)
PROMPT = (*HEAD, *words(3), *A, *words(2), *B, *words(20))


def row(chunk: tuple[int, ...], space: KeySpace = KEYS) -> Row:
    return space.key(chunk), array("i", chunk).tobytes(), len(space.prefix_ids)


def planner(*messages: Any, **fields: Any) -> Planner:
    made = Planner(block_size=16)
    space = Space(name="here", keys=KEYS, **fields)
    for message in (space, Limits(), News([row(A), row(B)], whole=True), *messages):
        made.learn(0, message)
    return made


def plan(made: Planner, ids: tuple[int, ...] = PROMPT, **options: Any) -> Plan:
    found = made.plan(ids, {"space": "here", **options}).plan
    assert isinstance(found, Plan), found
    return found


def why_not(made: Planner, options: Any) -> NoPlan:
    found = made.plan(PROMPT, options).plan
    assert isinstance(found, NoPlan)
    return found


def reused(found: Plan) -> list[str]:
    return [s.key for s in found.segments if s.key]


def test_a_prompt_too_short_to_gain_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """To search it takes as long as a good part of its prefill on a GPU."""
    costs = Costs(prefill_s=1e-3, recompute_s=1e-3, load_s=0, blend_s=1.0)
    made = planner(Limits(costs=costs))
    assert plan(made, blend_if="always") and plan(made, mode="reuse")

    def searched(*args: Any, **options: Any) -> Any:
        raise AssertionError("the prompt was searched")

    monkeypatch.setattr("cacheblend_rag.locate.ChunkIndex.locate", searched)
    refused = why_not(made, {"space": "here"})
    assert refused.reason is Reason.PREFILL_AS_QUICK and "whatever is stored" in refused.detail
    long = PROMPT * 8
    for more in ((), (Learning(LearnOptions(), to_store=False),)):
        ids = PROMPT if more else long
        with pytest.raises(AssertionError, match="was searched"):
            planner(Limits(costs=costs), *more).plan(ids, {"space": "here"})


def test_a_request_has_options_of_its_own() -> None:
    made = planner()
    assert reused(plan(made)) == [KEYS.key(A), KEYS.key(B)]
    assert (plan(made).ratio, plan(made).propagation_length) == (0.15, 64)
    asked = plan(
        made,
        recompute_ratio=0.4,
        propagation_length=0,
        selector="hkvd",
        blend_if="always",
        refine=64,
    )
    assert (asked.refine, plan(made).refine) == (64, "off")
    assert (asked.ratio, asked.propagation_length, asked.selector, asked.blend_if) == (
        0.4,
        0,
        "hkvd",
        "always",
    )
    assert plan(made, mode="reuse").ratio == 0
    for mode in ("off", "full"):
        assert why_not(made, {"space": "here", "mode": mode}).reason is Reason.MODE
    found = made.plan(PROMPT, {"space": "here"})
    assert found.mode == "blend" and set(found.seconds) == {"locate", "plan"}


def test_options_that_were_read_before_are_those_of_equal_requests_only() -> None:
    made = planner()
    for _ in range(2):
        assert plan(made, refine=1).refine == 1 and plan(made, recompute_ratio=1).ratio == 1
        for wrong in ({"refine": True}, {"refine": 1.0}, {"recompute_ratio": True}):
            assert why_not(made, {"space": "here", **wrong}).reason is Reason.MALFORMED_OPTIONS
    for many in range(600):
        assert plan(made, recompute_ratio=many / 1000).ratio == many / 1000
    assert len(made._read) <= 256
    nested = {"layers": [0.25, 0.5]}  # its caller may change it
    assert plan(made, selector_options=nested).selector_options == nested
    assert not any("layers" in asked for _, asked in made._read)
    made.learn(0, Space(name="here", keys=KEYS, options={"recompute_ratio": 0.3}))
    assert plan(made).ratio == 0.3, "the space was opened anew"


def test_options_read_while_their_space_is_opened_anew_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Spaces are opened in a thread of their own."""
    made, for_call = planner(), BlendConfig.for_call

    def slow(config: BlendConfig, options: Any) -> BlendConfig:
        found = for_call(config, options)
        monkeypatch.setattr(BlendConfig, "for_call", for_call)
        made.learn(0, Space(name="here", keys=KEYS, options={"recompute_ratio": 0.3}))
        return found

    monkeypatch.setattr(BlendConfig, "for_call", slow)
    plan(made)
    assert plan(made).ratio == 0.3


def test_a_space_serves_requests_of_its_own_adapter() -> None:
    options = {"space": "here"}
    for own, asked in (("", "1/x/at"), ("1/x/at", ""), ("1/x/at", "2/y/at")):
        made = planner(adapter=own)
        refused = made.plan(PROMPT, options, asked).plan
        assert isinstance(refused, NoPlan) and refused.reason is Reason.LORA
        assert isinstance(made.plan(PROMPT, options, own).plan, Plan)


def test_the_options_of_a_space_are_those_of_its_requests() -> None:
    made = planner(options={"recompute_ratio": 0.3, "mode": "reuse"})
    assert plan(made).ratio == 0
    assert plan(made, mode="blend").ratio == 0.3
    long = planner(options={"min_chunk_tokens": 80})
    assert reused(plan(long)) == [KEYS.key(B)]


def test_auto_is_what_was_calibrated() -> None:
    found = Calibration(
        fingerprint="f",
        version="0",
        ratio=0.07,
        selector="hkvd",
        changed_allowed=0.1,
        changed=0.1,
        mean_ratio=0.07,
        questions=9,
    )
    made = planner(calibration=found)
    assert (plan(made, recompute_ratio="auto").ratio, plan(made).ratio) == (0.07, 0.15)
    assert plan(planner(), recompute_ratio="auto").ratio == 0.5


REFUSED: list[Any] = [
    {"space": "there"},
    {"space": None},
    {"space": ["here"]},
    {"space": "here", "segments": [[0, 32, "k", 0, 1]]},
    {"space": "here", "recompute_ratio": 1.5},
    {"space": "here", "recompute_ratio": None},
    {"space": "here", "selector": {}},
    {"space": "here", "selector_options": {"colour": 1}},
    {"space": "here", "selector_options": None},
    {"space": "here", "propagation_length": -1},
    {"space": "here", "propagation_length": 2**40},
    {"space": "here", "blend_if": "sometimes"},
    *({"space": "here", "refine": wish} for wish in (0, -3, 2**40, True, 8.0, None, "now", [])),
    {"space": "here", "mode": 3},
    {},
    [],
    "blend",
]


@pytest.mark.parametrize("options", REFUSED, ids=repr)
def test_what_is_not_ours_is_refused(options: Any) -> None:
    found = why_not(planner(), options)
    assert found.reason is Reason.MALFORMED_OPTIONS and found.detail


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = [
    "mode",
    "recompute_ratio",
    "selector",
    "selector_options",
    "propagation_length",
    "blend_if",
    "refine",
    "space",
    "x",
]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_whatever_a_client_sends(options: dict[str, Any]) -> None:
    found = SERVER.plan(PROMPT, options).plan
    if isinstance(found, Plan):
        assert 0 <= found.ratio <= 1 and found.propagation_length >= 0
        assert found.refine in ("off", "idle") or int(found.refine) > 0
    else:
        assert found.reason in (Reason.MALFORMED_OPTIONS, Reason.MODE)


SERVER = planner(default=True)


def test_requests_without_options_are_planned_where_a_space_is_the_default() -> None:
    assert not planner().plans_all
    assert SERVER.plans_all
    assert isinstance(SERVER.plan(PROMPT, {}).plan, Plan)


def test_spaces_know_their_own_chunks() -> None:
    other = KeySpace("f", PREFIX, "another tenant")
    made = planner(Space(name="there", keys=other), News([row(A, other)]))
    assert reused(plan(made, space="there")) == [other.key(A)]
    assert reused(plan(made)) == [KEYS.key(A), KEYS.key(B)]
    assert plan(made, space="there").settings != plan(made).settings


def test_what_went_is_not_reused() -> None:
    made = planner(News([], [KEYS.key(A)]))
    assert reused(plan(made)) == [KEYS.key(B)]
    made.learn(0, Lost([KEYS.key(B)]))
    assert why_not(made, {"space": "here"}).reason is Reason.NO_CHUNK_FOUND
    made.learn(0, News([row(A), row(B)]))
    assert reused(plan(made)) == [KEYS.key(A), KEYS.key(B)]
    made.learn(0, News([row(B)], whole=True))
    assert reused(plan(made)) == [KEYS.key(B)]


def test_a_lost_head_is_not_looked_for() -> None:
    made = planner(prompt_prefix=PromptPrefix("h" * 64, HEAD))
    assert plan(made).segments[0].kind is Kind.EXACT
    made.learn(0, Lost(["h" * 64]))
    assert plan(made).segments[0].kind is Kind.FRESH


def test_limits() -> None:
    made = planner(Limits(longest=100))
    assert plan(made).end <= 100
    assert plan(bounded(), recompute_ratio=0.2).end <= 64
    slow = Costs(prefill_s=1e-9, recompute_s=1.0, load_s=1.0, blend_s=1.0)
    made.learn(0, Limits(costs=slow))
    assert why_not(made, {"space": "here"}).reason is Reason.PREFILL_AS_QUICK
    assert plan(made, blend_if="always").blend_if == "always"
    made.learn(0, Limits(proving=True))
    assert made.plan(PROMPT, {"space": "here"}).proves
    made.learn(0, Limits(why_not=Why(Reason.ROWS_DIFFER, "broken")))
    assert why_not(made, {"space": "here"}) == (Reason.ROWS_DIFFER, "broken")


def bounded() -> Planner:
    made = Planner(block_size=16, longest=64)
    ids = PROMPT[len(HEAD) :]
    space = KeySpace("f", PREFIX)
    early = ids[3:50]
    for message in (Space(name="here", keys=space), Limits(longest=200), News([row(early)])):
        made.learn(0, message)
    return made


def test_before_the_store_is_open_nothing_is_blended() -> None:
    assert why_not(Planner(16), {"space": "here"}).reason is Reason.NOT_READY


def test_a_space_travels() -> None:
    space = Space(
        name="s",
        keys=KEYS,
        prompt_prefix=PromptPrefix("h", HEAD),
        options={"propagation_length": 3},
    )
    assert Space.from_plain(space.to_plain()) == space
    assert pickle.loads(pickle.dumps(space)) == space  # with the metadata of a step


def test_a_chunk_is_known_where_all_ranks_have_it() -> None:
    known = KnownChunks()
    known.open("here", KEYS)
    index = known.index("here")
    known.learn(0, News([row(A), row(B)], whole=True))
    known.learn(1, News([row(B)], whole=True))
    assert index.keys() == {KEYS.key(B)}
    known.learn(1, News([row(A)]))
    assert index.keys() == {KEYS.key(A), KEYS.key(B)}
    known.learn(0, News([], [KEYS.key(B)]))
    assert index.keys() == {KEYS.key(A)}
