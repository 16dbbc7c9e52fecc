"""What requests teach, and whose prompts are searched for it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tiny import Words

from cacheblend_rag.costs import Costs
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import KnownChunks, News, Row
from cacheblend_rag.learn import LearnOptions
from cacheblend_rag.locate import Match
from cacheblend_rag.planner import Expected, Learning, Limits, Planner, Space, _between
from cacheblend_rag.salts import tenant_salt

words = Words(11)
KEYS = KeySpace("f", words(6), "team")
A, B = words(90), words(70)
PROMPT = (*words(5), *A, *words(3), *B, *words(20))
WHERE = ((5, 95), (98, 168))


def planner(*messages: Any, to_store: bool = False) -> Planner:
    made = Planner(block_size=16)
    space = Space(name="here", keys=KEYS, default=True)
    for message in (space, Limits(), Learning(LearnOptions(), to_store), *messages):
        made.learn(0, message)
    return made


def row(keys: KeySpace, ids: Sequence[int]) -> Row:
    return keys.key(ids), array("i", ids).tobytes(), len(keys.prefix_ids)


def found(made: Planner, salt: str | None = None) -> list[tuple[int, int]]:
    return [(m.start, m.end) for m in made.plan(PROMPT, {}, salt=salt).matches or ()]


def test_what_a_salt_teaches_is_found_with_that_salt_only() -> None:
    made = planner()
    prompt = made.prompt(PROMPT, {}, "mine", ())
    assert prompt.is_salted and prompt.keys.key(A) != KEYS.key(A)
    made.learn(0, Expected(prompt.owner, [prompt.keys.key(A)]))
    assert not found(made, "mine"), "it is not stored yet"
    made.learn(0, News([row(prompt.keys, A)]))
    assert found(made, "mine") == [WHERE[0]]
    for other in (None, "", "yours", tenant_salt("here", None), tenant_salt("here", "mine")):
        assert not found(made, other)
        assert made.prompt(PROMPT, {}, other, ()).owner != prompt.owner
    made.learn(0, News([row(KEYS, B)]))
    assert found(made, "mine") == list(WHERE), "beside what is ingested"
    assert found(made) == [WHERE[1]]
    made.learn(0, News([], [prompt.keys.key(A)]))
    assert found(made, "mine") == [WHERE[1]] and not made.known._salted


def test_a_tenants_own_salt_is_none_of_its_clients() -> None:
    made = planner(to_store=True)
    for salt in (None, tenant_salt("here", None)):
        prompt = made.prompt(PROMPT, {}, salt, ())
        assert not prompt.is_salted and prompt.to_store and prompt.keys == KEYS
    assert not made.prompt(PROMPT, {}, "mine", ()).to_store, "a salt is not kept"
    assert not planner().prompt(PROMPT, {}, None, ()).to_store


def test_tenants_teach_one_another_nothing() -> None:
    made = planner(Space(name="there", keys=KEYS._replace(namespace="other")))
    here, there = (made.prompt(PROMPT, {"space": name}, None, ()) for name in ("here", "there"))
    assert here.owner != there.owner and here.keys.key(A) != there.keys.key(A)


def test_a_chunk_without_its_head_does_not_cover() -> None:
    matches = [Match(5, 95, "a", 0, 90), Match(98, 168, "b", 40, 110)]
    assert planner().prompt(PROMPT, {}, None, matches).covered == [(5, 95)]
    matches = [Match(9, 95, "a", 8, 94)]
    assert planner().prompt(PROMPT, {}, None, matches).covered == [(9, 95)]


def test_what_is_not_quicker_is_not_worth_it() -> None:
    slow = Costs(prefill_s=1e-6, recompute_s=1e-6, load_s=1e-6, blend_s=1.0)
    quick = Costs(prefill_s=1e-3, recompute_s=1e-3, load_s=1e-6, blend_s=1e-3)
    for costs, worth in ((slow, False), (quick, True), (None, True)):
        prompt = planner(Limits(costs=costs)).prompt(PROMPT, {}, None, ())
        assert prompt.is_worth_it(WHERE) is worth
    assert (
        planner(Limits(costs=slow))
        .prompt(PROMPT, {"blend_if": "always"}, None, ())
        .is_worth_it(WHERE)
    )


def test_requests_that_ask_for_no_blend_have_no_matches() -> None:
    made = planner()
    for options in ({"mode": "off"}, {"mode": "full"}, {"unknown": 1}):
        assert made.plan(PROMPT, options).matches is None
    assert made.plan(PROMPT, {}, "1/adapter/x").matches is None
    assert made.plan(PROMPT, {}).matches == []


def test_a_whole_listing_and_many_names() -> None:
    known, keys = KnownChunks(), KEYS._replace(namespace="salted")
    known.open("here", KEYS)
    known.expect("o", [keys.key(A), keys.key(B)])
    known.learn(0, News([row(keys, A)], whole=True))
    index = known.salted("o")
    assert index is not None and len(index) == 1
    known.learn(0, News([row(keys, B)], whole=True))
    index = known.salted("o")
    assert index is not None and index.keys() == {keys.key(B)}
    known.learn(0, News([row(keys, A)]))
    assert len(index) == 1, "it went, and nobody announced it anew"
    known.expect("o", [f"{n:064x}" for n in range(20_000)])
    assert len(known._expected) == 10_000


spans = st.lists(st.integers(0, 400), max_size=8, unique=True).map(
    lambda ends: [Match(a, b, "k", 3, 500) for a, b in zip(*[iter(sorted(ends))] * 2, strict=False)]
)


@given(spans, spans)
def test_others_fill_the_gaps(matches: list[Match], others: list[Match]) -> None:
    both = _between(matches, others, 32)
    taken = {i for m in matches for i in range(m.start, m.end)}
    for m in both:
        if m in matches:
            continue
        assert m.end - m.start >= 32 and not taken.intersection(range(m.start, m.end))
        whole = [o for o in others if o.start <= m.start and m.end <= o.end]
        assert len(whole) == 1 and m.offset - m.start == whole[0].offset - whole[0].start
    assert sorted(both) == both and set(matches) <= set(both)
    left = {i for o in others for i in range(o.start, o.end)} - taken
    filled = {i for m in both for i in range(m.start, m.end)} - taken
    assert filled <= left
    for i in left - filled:  # a stretch of fewer tokens
        run = [
            j for j in range(i - 32, i + 33) if all(k in left for k in range(min(i, j), max(i, j)))
        ]
        assert len(run) <= 64
