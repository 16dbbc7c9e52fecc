"""Learning from traffic: what is found, against a slow twin; how much is learnt, and from whom."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Words

from cacheblend_rag import BlendConfig, ConfigError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.learn import Budget, Learner, LearnOptions, Prompt, Repeats
from cacheblend_rag.learn.learner import MOST_TOKENS, pieces
from cacheblend_rag.learn.repeats import SHARED, WINDOW, sampled
from cacheblend_rag.locate import window_hashes

LEAST = 40
Stretches = list[tuple[int, int]]
words = Words(5)
KEYS = KeySpace("f", (1, 2, 3))


class Twin:
    """What ``Repeats`` promises, by looking everywhere."""

    def __init__(self, most_tokens: int, ttl_s: float) -> None:
        self.most_tokens, self.ttl_s = most_tokens, ttl_s
        self.prompts: list[tuple[str, list[int], float]] = []

    def feed(self, owner: str, ids: list[int], covered: Stretches, now: float) -> Stretches:
        self.prompts = [p for p in self.prompts if p[2] >= now - self.ttl_s]
        taken = {i for start, end in covered for i in range(start, end)}
        found, done = [], 0
        for place in places(ids):
            if place < done or taken.intersection(range(place, place + WINDOW)):
                continue
            if (hit := self.latest(owner, ids[place : place + WINDOW])) is None:
                continue
            other, there = hit
            head = len(list(itertools.takewhile(lambda p: p[0] == p[1], zip(ids, other))))  # noqa: B905
            if place == there and place < head:
                done = head
                continue
            left, right, shift = place, place, there - place
            while right < len(ids) and right not in taken and right + shift < len(other):
                if ids[right] != other[right + shift]:
                    break
                right += 1
            while left > done and left - 1 not in taken and left - 1 + shift >= 0:
                if ids[left - 1] != other[left - 1 + shift]:
                    break
                left -= 1
            done = right
            if right - left >= LEAST:
                found.append((left, right))
        self.prompts.append((owner, ids, now))
        while sum(len(p[1]) for p in self.prompts) > self.most_tokens:
            self.prompts.pop(0)
        return found

    def latest(self, owner: str, window: list[int]) -> tuple[list[int], int] | None:
        """The last place of a window that is sampled there, in the newest prompt that has one."""
        for whose, ids, _ in reversed(self.prompts):
            if whose == owner:
                for there in reversed(places(ids)):
                    if ids[there : there + WINDOW] == window:
                        return ids, there
        return None


def places(ids: Sequence[int]) -> list[int]:
    return sampled(window_hashes(np.asarray(ids, np.int32))).tolist()


def repeats(most_tokens: int = 10**6, ttl_s: float = 100.0) -> Repeats:
    return Repeats(LEAST, most_tokens, ttl_s)


def feed(found: Repeats, ids: Sequence[int], *covered: tuple[int, int], **at: Any) -> Stretches:
    given = np.asarray(ids, np.int32)
    return found.feed(at.get("owner", ""), given, covered, at.get("now", 0.0))


TEXTS = [words(n) for n in (45, 60, 80, 33, 20, 7)] + [(3,) * 70, (4, 5) * 40]


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[str, list[int], Stretches, float]]:
    found, now = [], 0.0
    for _ in range(draw(st.integers(1, 7))):
        parts = draw(st.lists(st.sampled_from(range(len(TEXTS))), max_size=5))
        ids: list[int] = []
        for part in parts:
            low = draw(st.sampled_from([0, 0, 0, 5]))
            ids += [*TEXTS[part][low:], *draw(st.lists(st.integers(0, 9), max_size=3))]
        ends = sorted(draw(st.sets(st.integers(0, len(ids)), max_size=4)))
        covered = [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False)]
        now += draw(st.sampled_from([0.0, 1.0, 8.0]))
        found.append((draw(st.sampled_from("ab")), ids, covered, now))
    return found


@settings(max_examples=300, deadline=None)
@given(traffic(), st.sampled_from([150, 400, 10**6]), st.sampled_from([5.0, 100.0]))
def test_it_finds_what_a_slow_twin_finds(
    prompts: list[tuple[str, list[int], Stretches, float]], most_tokens: int, ttl_s: float
) -> None:
    fast, twin = repeats(most_tokens, ttl_s), Twin(most_tokens, ttl_s)
    for owner, ids, covered, now in prompts:
        expected = twin.feed(owner, ids, covered, now)
        assert feed(fast, ids, *covered, owner=owner, now=now) == expected
        assert fast.tokens <= most_tokens


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(SHARED, 200), st.integers(0, 50), st.integers(1, 50))
def test_equal_stretches_share_a_window(seed: int, size: int, before: int, between: int) -> None:
    """Wherever they stand: so a text that came before is always found."""
    draw = np.random.default_rng(seed)
    text = draw.integers(0, 10**6, size)
    prompts = [
        np.concatenate(
            [draw.integers(10**6, 2 * 10**6, n), text, draw.integers(2 * 10**6, 10**8, 9)]
        )
        for n in (before, before + between)
    ]
    found = repeats()
    found._least = 1
    assert feed(found, prompts[0].tolist()) == []
    assert feed(found, prompts[1].tolist()) == [(before + between, before + between + size)]


def test_a_text_is_found_on_second_sight_in_any_order() -> None:
    found, texts = repeats(), [words(n) for n in (90, 50, 70)]
    assert feed(found, (*words(9), *texts[0], *texts[1], *texts[2])) == []
    second = (*words(4), *texts[2], *words(2), *texts[1], *words(3), *texts[0], *words(5))
    assert feed(found, second) == [(4, 74), (76, 126), (129, 219)]


def test_a_common_beginning_is_left_to_the_prefix_cache() -> None:
    found, head, text = repeats(), words(200), words(60)
    feed(found, (*head, *text, *words(9)))
    assert feed(found, (*head, *text, *words(30))) == []
    assert feed(found, (*head, *words(5), *text)) == [(205, 265)]


def test_what_chunks_serve_is_not_found_again() -> None:
    found, text = repeats(), words(200)
    feed(found, (*words(3), *text))
    again = (*words(8), *text)
    assert feed(found, again, (8, 208)) == []
    assert feed(found, again, (58, 118), now=1.0) == []  # now it is a common beginning
    assert feed(found, (*words(4), *text), (54, 114)) == [(4, 54), (114, 204)]


def test_the_work_is_bounded_for_any_text() -> None:
    found, start = repeats(), time.perf_counter()
    for n in range(4):
        feed(found, [n] * n + [7] * 100_000)
        feed(found, [n] * n + [7, 8, 9] * 33_000)
    assert time.perf_counter() - start < 30, "quadratic work would take hours"
    assert found.windows <= found.tokens


def test_memory_is_bounded() -> None:
    found = repeats(most_tokens=5_000)
    for _ in range(300):
        feed(found, words(300))
    assert found.tokens <= 5_000 and found.windows <= 3 * 5_000 // 4


def learner(**options: Any) -> Learner:
    return Learner(LearnOptions(min_tokens=LEAST, **options))


def observe(
    made: Learner, ids: Sequence[int], now: float = 0.0, *, owner: str = "", worth: bool = True
) -> list[list[int]]:
    prompt = Prompt(owner, np.asarray(ids, np.int32), (), KEYS, False, False, lambda found: worth)
    spans = made.observe(prompt, now)
    for span in spans:
        assert span.key == KEYS.key(span.token_ids) and tuple(span.prefix_ids) == KEYS.prefix_ids
    return [list(span.token_ids) for span in spans]


def test_nothing_is_learnt_for_another_owner() -> None:
    made, text = learner(), words(90)
    assert observe(made, (1, *text), owner="a") == []
    assert observe(made, (2, 2, *text), owner="b") == []
    assert observe(made, (3, 3, 3, *text), owner="a") == [list(text)]


def test_what_is_not_worth_it_is_not_learnt() -> None:
    made, text = learner(), words(90)
    observe(made, (1, *text))
    assert observe(made, (2, 2, *text), worth=False) == []
    assert observe(made, (3, 3, 3, *text)) == [list(text)]


def test_what_was_named_is_named_again_where_it_did_not_come_to_be() -> None:
    made, text = learner(), words(90)
    named = [observe(made, (*range(n), *text), 25.0 * n) for n in range(1, 6)]
    assert named == [[], [list(text)], [], [], [list(text)]]


def test_a_prompt_is_forgotten() -> None:
    made, text = learner(ttl_s=10.0), words(90)
    assert observe(made, (1, *text), 0.0) == []
    assert observe(made, (2, 2, *text), 10.5) == []
    assert observe(made, (3, 3, 3, *text), 20.5) == [list(text)]


@given(st.lists(st.integers(1, 5 * MOST_TOKENS), max_size=3))
def test_a_long_repeat_becomes_several_chunks(sizes: list[int]) -> None:
    ends = list(itertools.accumulate(size + 3 for size in sizes))
    found = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    cut = list(pieces(found))
    assert [i for a, b in cut for i in range(a, b)] == [i for a, b in found for i in range(a, b)]
    for (start, end), size in zip(found, sizes, strict=True):
        own = [b - a for a, b in cut if start <= a < end]
        assert max(own) <= MOST_TOKENS and max(own) - min(own) <= 1, (own, size)


def test_a_budget_is_a_share_of_the_time() -> None:
    budget, spent = Budget(0.1, 0.0), 0.0
    for tick in range(1, 10_001):
        if budget.allows(tick / 100):
            budget.spend(0.3)
            spent += 0.3
    assert 9.9 <= spent <= 10.4
    assert not Budget(0.0, 0.0).allows(100.0)
    idle = Budget(0.1, 0.0)
    assert idle.allows(1000.0)
    idle.spend(2.5)
    assert not idle.allows(1004.0) and idle.allows(1006.0), "2 s were saved up, not 100"


@pytest.mark.parametrize(
    "options",
    [
        {"ttl_s": 0},
        {"ttl_s": "1h"},
        {"share": 1.5},
        {"share": True},
        {"min_tokens": 31},
        {"remember_tokens": 0},
        {"capacity": "much"},
        {"ttl": 3},
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        BlendConfig(learn="memory", learn_options=options)
