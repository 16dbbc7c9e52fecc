"""How much of an ingestion is computed at once."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from cacheblend_rag.engine import worker_state
from cacheblend_rag.engine.worker_state import StepTimer
from cacheblend_rag.pacing import IDLE_S, Pace, Progress, RefinePace

PART_S = 0.004  # of 100 tokens
STEP_S = 0.030


def paced(*steps: int, own: int = 0) -> Pace:
    """One that saw these counts of steps, a slice of two parts and 100 tokens each time."""
    pace = Pace(own_steps=own)
    for now, count in enumerate(steps):
        pace.learn(Progress(2 * PART_S, count, STEP_S), 2, 100, now / 100)
    return pace


def test_the_first_slice_is_the_smallest() -> None:
    assert Pace().parts(2000, 0.0) == 1 and Pace().tokens(8192) == 512
    pace = Pace()
    pace.learn(Progress(PART_S, 7, STEP_S), 1, 100, 0.0)
    assert pace.parts(100, 0.0) == int(IDLE_S / (2 * PART_S)), "the next one may take longer"


def test_while_nobody_asks_a_slice_takes_as_long_as_one_may_wait() -> None:
    assert paced(7, 7, 7).parts(100, 0.03) == int(IDLE_S / PART_S)


def test_busy_slice_s_it_takes_half_a_step() -> None:
    busy = paced(7, 8, 9)
    busy.interleaved_s = STEP_S
    assert busy.is_busy(0.03) and busy.parts(100, 0.03) == 3  # 12 ms of 15
    assert busy.parts(10_000, 0.03) == 1
    assert busy.parts(100, 1.0) == int(IDLE_S / PART_S), "they ended"


def beside(interleaved_s: float, step_s: float = STEP_S) -> Pace:
    """One whose steps take so long beside a slice."""
    pace = Pace()
    for now, steps in enumerate((7, 8)):
        pace.learn(Progress(2 * PART_S, steps, step_s, interleaved_s), 2, 100, now / 100)
    return pace


@pytest.mark.parametrize(
    ("interleaved_s", "parts"),
    [
        (STEP_S, 3),  # 12 ms of 15
        (1.3 * STEP_S, 2),  # 8 ms of 9
        (1.5 * STEP_S, 1),  # 3 ms
        (2.0 * STEP_S, 1),  # it has to go on all the same
        (0.5 * STEP_S, 1),  # those alone were of more requests: 4 ms of 7.5
    ],
)
def test_what_a_slice_costs_a_step_is_taken_off_the_slice(interleaved_s: float, parts: int) -> None:
    assert beside(interleaved_s).parts(100, 0.02) == parts


def test_the_first_slices_of_a_batch_are_the_smallest() -> None:
    """Programs for its number of tokens are made in them, which others do not wait for again."""
    pace = beside(STEP_S)
    pace.begin()
    for steps in (9, 10):
        assert pace.parts(100, 0.02) == 1
        pace.learn(Progress(9 * PART_S, steps, STEP_S, STEP_S), 1, 100, 0.02)
    assert pace.parts(100, 0.02) == 3, "nor are the others measured by them"
    pace.begin()
    assert pace.parts(100, 9.0) > 3, "nobody asks"


def test_a_batch_has_fewer_tokens_where_steps_are_slowed() -> None:
    slowed, alike = beside(15 * STEP_S, 10 * STEP_S), beside(10 * STEP_S, 10 * STEP_S)
    assert slowed.tokens(8192) < alike.tokens(8192)


def test_who_asks_is_known_before_a_step_is() -> None:
    pace = paced(7, 7, 7)
    assert not pace.is_busy(0.03)
    pace.asked(0.03)
    assert pace.is_busy(0.03) and pace.parts(100, 0.03) == 1  # 4 ms of 6


def test_a_step_has_nothing_beside_it_now_and_then() -> None:
    pace, pauses = Pace(), list[float]()
    for count in range(40):
        pace.learn(Progress(PART_S, count, STEP_S, 2 * STEP_S), 1, 100, count / 100)
        pauses.append(pace.pause(count / 100))
    assert [n for n, pause in enumerate(pauses) if pause] == [11, 23, 35]
    assert max(pauses) == pytest.approx(2.5 * 2 * STEP_S)
    for _ in range(20):
        pace.learn(Progress(PART_S, 39, STEP_S), 1, 100, 9.0)
        assert not pace.pause(9.0), "nobody asks"


def simulated(
    step_s: float, slowed: float, handing_s: float, chunk: int, steps: int = 400
) -> Iterator[float]:
    """Gaps of an answer beside an ingestion, with the product's pace and timer: a step takes
    ``slowed`` times as long beside slices, and handing one over ``handing_s``.
    """
    draw, timer, pace, now = random.Random(0), StepTimer(), Pace(), 0.0
    worker_state.time.perf_counter = lambda: now  # type: ignore[attr-defined]
    for _ in range(9):
        timer.step_begins()
        now += step_s
    paused_until, part = 0.0, 0
    pace.asked(now)  # as the process does that passes a request on
    for _ in range(steps):
        timer.step_begins()
        begun = now
        is_alone = now < paused_until
        now += step_s * draw.uniform(0.95, 1.05) * (1 if is_alone else slowed)
        if not is_alone:
            if pause := pace.pause(now):
                paused_until = now + pause
            else:
                tokens = min(chunk, pace.tokens(8192)) if chunk < 512 else chunk
                parts = pace.parts(tokens, now)
                # Behind the attention comes a part of twice its size.
                took = sum(1e-5 * tokens * (1 + (part + n) % 2) * 2 / 3 for n in range(parts))
                part += parts
                timer.exclude(took)
                now += took + handing_s
                pace.learn(Progress(took, **timer.to_plain()), parts, tokens, now)
        yield now - begun


@pytest.mark.parametrize(
    ("step_s", "slowed", "handing_s"),
    [(0.042, 1.0, 0.002), (0.042, 1.2, 0.005), (0.1, 1.3, 0.01), (0.03, 1.0, 0.01)],
)
def test_no_answer_waits_for_more_than_two_steps(
    monkeypatch: pytest.MonkeyPatch, step_s: float, slowed: float, handing_s: float
) -> None:
    """A slice was half of a step that it had made longer itself; that was 2.1 steps in all."""
    monkeypatch.setattr(worker_state.time, "perf_counter", None)  # put back when this ends
    gaps = list(simulated(step_s, slowed, handing_s, 512))
    assert max(gaps) < 2 * step_s, max(gaps) / step_s
    assert sum(gaps) > 1.1 * step_s * len(gaps), "something was computed meanwhile"


def test_steps_are_timed_alone_and_interleaved_something(monkeypatch: pytest.MonkeyPatch) -> None:
    now, timer = 0.0, StepTimer()
    monkeypatch.setattr(worker_state.time, "perf_counter", lambda: now)
    assert timer.to_plain() == {"steps": 0, "step_s": 0, "interleaved_s": 0}
    for took, aside in ((5.0, 0.0), (0.25, 0.0), (0.5, 0.125), (0.25, 0.0), (0.5, 0.125)):
        timer.step_begins()
        now += took
        if aside:
            timer.exclude(aside)
    timer.step_begins()
    assert timer.to_plain() == {"steps": 6, "step_s": 0.25, "interleaved_s": 0.375}


def test_its_own_steps_are_no_answers() -> None:
    pace = Pace()
    for count in range(5):
        pace.own_steps = count
        pace.learn(Progress(PART_S, 7 + count, STEP_S), 1, 100, 0.0)
    assert not pace.is_busy(0.0)


def test_a_part_of_a_batch_takes_no_longer_than_a_slice() -> None:
    long = Pace(token_part_s=PART_S / 100, step_s=10 * STEP_S)
    assert 740 <= long.tokens(8192) <= 750, "two parts are the slice of an unknown slow-down"
    assert paced(1).tokens(8192) == 256
    assert long.tokens(300) == 300
    slow = Pace(token_part_s=1.0, step_s=STEP_S)
    assert slow.tokens(8192) == 256


def test_what_is_taken_busy_slice_s_is_counted() -> None:
    assert paced(7, 7, 7).busy_s == 0
    busy = paced(7, 8, 9)
    assert busy.busy_s == pytest.approx(2 * 2 * PART_S)
    busy.ended(3, 100, 0.03)
    assert busy.busy_s == pytest.approx(7 * PART_S)
    busy.ended(3, 100, 1.0)
    assert busy.busy_s == pytest.approx(7 * PART_S), "they ended"


def test_steps_are_seen_between_slices() -> None:
    pace = paced(7)
    pace.see(7, 0.0, 1.0)
    assert not pace.is_busy(1.0) and pace.step_s == STEP_S
    pace.see(8, 0.0, 2.0)
    assert pace.is_busy(2.0) and not pace.is_busy(3.0)


@pytest.mark.parametrize(
    ("seconds", "step_s", "tokens"),
    [
        (0.010, 0.015, 60),  # as long as a step
        (0.010, 0.400, 80),  # not more than twice as many at once
        (0.100, 0.400, 20),  # no longer than one may wait
        (0.100, 0.0, 20),  # a step's time is not known
        (9.000, 0.015, 16),  # fewer take as long
        (0.0, 0.015, 80),  # too short to be measured
    ],
)
def test_a_slice_of_refinement(seconds: float, step_s: float, tokens: int) -> None:
    pace = RefinePace(1000)
    assert pace.tokens() == 16
    pace.learn(40, seconds, step_s)
    assert pace.tokens() == tokens
    few = RefinePace(12)
    few.learn(40, seconds, step_s)
    assert few.tokens() == 12


def test_slices_grow_where_many_tokens_take_as_long_as_few() -> None:
    """As on a GPU, whose host needs as long for either."""
    pace, sizes = RefinePace(8192), list[int]()
    for _ in range(40):
        sizes.append(pace.tokens())
        pace.learn(sizes[-1], 0.012 + sizes[-1] * 5e-6, 0.003)
    assert sum(sizes[:20]) > 1400
    assert all(0.014 < 0.012 + size * 5e-6 < 0.016 for size in sizes[-10:])


def test_short_slices_do_not_make_the_next_ones_shorter() -> None:
    pace = RefinePace(1000)
    for tokens, seconds in ((16, 0.01), (32, 0.012), (64, 0.014)):
        assert pace.tokens() == tokens
        pace.learn(tokens, seconds, 0.2)
    assert pace.tokens() == 128
    pace.learn(1, 0.009, 0.2)  # a request's last token
    assert pace.tokens() == 128
    pace.learn(100, 0.1, 0.2)  # but these were too slow
    assert pace.tokens() == 50
