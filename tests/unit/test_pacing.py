"""How much of an ingestion is computed at once."""

from __future__ import annotations

import pytest

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


def test_while_nobody_asks_a_slice_takes_as_long_as_one_may_wait() -> None:
    assert paced(7, 7, 7).parts(100, 0.03) == int(IDLE_S / PART_S)


def test_beside_answers_it_takes_half_a_step() -> None:
    busy = paced(7, 8, 9)
    assert busy.is_busy(0.03) and busy.parts(100, 0.03) == 3  # 12 ms of 15
    assert busy.parts(10_000, 0.03) == 1
    assert busy.parts(100, 1.0) == int(IDLE_S / PART_S), "they ended"


def test_its_own_steps_are_no_answers() -> None:
    pace = Pace()
    for count in range(5):
        pace.own_steps = count
        pace.learn(Progress(PART_S, 7 + count, STEP_S), 1, 100, 0.0)
    assert not pace.is_busy(0.0)


def test_a_part_of_a_batch_takes_no_longer_than_a_slice() -> None:
    assert 373 <= paced(1).tokens(8192) <= 375
    assert paced(1).tokens(300) == 300
    slow = Pace(token_part_s=1.0, step_s=STEP_S)
    assert slow.tokens(8192) == 256


def test_what_is_taken_beside_answers_is_counted() -> None:
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
