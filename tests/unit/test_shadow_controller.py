"""The controller keeps its promise, whatever the answers turn out to be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag.shadow.controller import DOWN, LADDER, UP, Aim, Controller

AIM = Aim(changed_allowed=0.05, share=0.1, most_share=0.4)


def ratio(controller: Controller, template: str = "t", aim: Aim = AIM) -> float | None:
    return controller.decide(template, 0.15, aim).ratio


def feed(controller: Controller, outcomes: str, template: str = "t", aim: Aim = AIM) -> None:
    """Answers at the ratio that was chosen: ``x`` for a changed one."""
    for outcome in outcomes:
        chosen = ratio(controller, template, aim)
        assert chosen is not None
        controller.learn(template, chosen, outcome == "x")


@pytest.mark.parametrize(
    ("start", "first"), [(0.0, 0.05), (0.05, 0.05), (0.12, 0.15), (0.15, 0.15), (0.9, 0.5)]
)
def test_it_begins_at_the_calibrated_ratio_or_the_next_step_above(
    start: float, first: float
) -> None:
    assert Controller().decide("t", start, AIM).ratio == first


def test_a_changed_answer_goes_up_and_as_many_unchanged_as_outweigh_it_go_down() -> None:
    controller = Controller()
    feed(controller, "x")
    assert ratio(controller) == 0.20
    feed(controller, "." * 30)  # 0.05 are left of the first
    assert ratio(controller) == 0.20
    feed(controller, ".")
    assert ratio(controller) == 0.15


def test_between_two_steps_nothing_moves() -> None:
    """Hysteresis: as many as allowed, well spread, leave the ratio where it is."""
    controller = Controller()
    feed(controller, "." * 10)
    for _ in range(20):
        feed(controller, "x" + "." * 19)
        assert ratio(controller) == 0.15


def test_answers_at_another_ratio_than_the_one_in_force_do_not_count() -> None:
    controller = Controller()
    assert ratio(controller) == 0.15
    for other in (0.05, 0.1, 0.2, 0.5):
        for changed in (True, False):
            for _ in range(40):
                controller.learn("t", other, changed)
    assert ratio(controller) == 0.15
    feed(controller, "x")
    assert ratio(controller) == 0.20


def test_where_no_ratio_is_good_enough_blending_is_off_and_tried_again_ever_less_often() -> None:
    controller, waited = Controller(), []
    for _ in range(9):
        while (chosen := ratio(controller)) is not None:
            controller.learn("t", chosen, True)
        waited.append(1)
        while ratio(controller) is None:
            waited[-1] += 1
    expected = DOWN / (AIM.changed_allowed * AIM.most_share)  # 75 requests
    assert waited == pytest.approx([expected * 2 ** min(n, 6) for n in range(9)], abs=2)


def test_blending_that_is_good_again_stays_on() -> None:
    controller = Controller()
    while (chosen := ratio(controller)) is not None:
        controller.learn("t", chosen, True)
    while ratio(controller) is None:
        pass
    assert ratio(controller) == 0.5
    feed(controller, "." * 30)
    assert ratio(controller) == 0.3


def test_more_is_drawn_while_evidence_is_short_or_speaks_against_the_ratio() -> None:
    controller = Controller()
    assert controller.decide("t", 0.15, AIM).share == AIM.most_share  # nothing is known
    feed(controller, "x")
    assert controller.decide("t", 0.15, AIM).share == AIM.most_share
    feed(controller, "." * 31)
    assert ratio(controller) == 0.15  # a step taken back: the target lies between these two
    assert controller.decide("t", 0.15, AIM).share == AIM.share
    feed(controller, "." * 10 + "x")
    assert controller.decide("t", 0.15, AIM).share == AIM.most_share


def test_a_share_above_the_most_is_kept() -> None:
    assert Controller().decide("t", 0.15, Aim(0.05, 0.9, 0.2)).share == 0.9


def test_bounds_hold() -> None:
    aim = Aim(0.05, 1.0, 1.0, least=0.1, most=0.2)
    controller = Controller()
    feed(controller, "." * 500, aim=aim)
    assert ratio(controller, aim=aim) == 0.1
    controller = Controller()
    feed(controller, "x", aim=aim)
    assert ratio(controller, aim=aim) == 0.2
    feed(controller, "x", aim=aim)
    assert ratio(controller, aim=aim) is None
    assert Aim(0.05, 1.0, 1.0, least=0.21, most=0.24).ladder == (0.24,)


def test_templates_do_not_mix_and_the_least_used_ones_are_forgotten() -> None:
    controller = Controller(most_templates=2)
    feed(controller, "x", "a")
    assert ratio(controller, "b") == 0.15 and ratio(controller, "a") == 0.20
    ratio(controller, "c")  # b is the one that was asked for the longest ago
    assert ratio(controller, "a") == 0.20
    controller.learn("b", 0.5, True)  # not known any more
    assert ratio(controller, "b") == 0.15


@settings(max_examples=100, deadline=None)
@given(
    outcomes=st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]), max_size=12),
    allowed=st.sampled_from([0.01, 0.05, 0.2]),
    seed=st.randoms(use_true_random=False),
)
def test_the_excess_is_bounded_whatever_the_traffic_does(
    outcomes: list[float], allowed: float, seed: object
) -> None:
    """Difficulty that changes at will: the bound in the module's docstring."""
    random = seed
    aim, controller = Aim(allowed, 1.0, 1.0), Controller()
    excess, exact = 0.0, 0
    for difficulty in outcomes:
        for _ in range(60):
            chosen = controller.decide("t", 0.15, aim).ratio
            if chosen is None:
                exact += 1
                continue
            changed = random.random() < difficulty * (1 - chosen)  # type: ignore[attr-defined]
            excess += changed - allowed
            controller.learn("t", chosen, changed)
    # exact answers are unchanged: those allowed among them were not used
    assert excess - allowed * exact <= UP * len(LADDER) + 1
