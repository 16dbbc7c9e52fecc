"""Which ratio keeps the share of changed answers at a target: ``recompute_ratio="auto"``. Pure.

For each template it keeps a count of changed answers beyond those allowed. Every shadowed answer
adds 1 if it was changed, and takes away the target. At ``UP`` the ratio goes a step up, and ``UP``
is taken from the count; at ``-DOWN`` it goes a step down, and ``DOWN`` is added. So a step down
takes ``DOWN / target`` unchanged answers at least. Whatever the traffic does, the changed answers
among those that count exceed the allowed ones by ``UP`` times the steps of the ladder and one at
most. That is the argument of adaptive conformal inference (Gibbs and Candes, 2021), for a ladder.
An answer counts if it was shadowed and is known before the next step is made.

Above the last step blending is off: every answer is exact then. It is tried again after as many
requests as would have brought the count down, and after each trial in vain twice as many.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

LADDER = (0.05, 0.10, 0.15, 0.20, 0.30, 0.50)  # 1 would cost what is exact without blending
UP, DOWN = 0.9, 1.5  # changed answers, more and fewer than allowed
_DOUBT = 0.2  # of the count: from here on, more is drawn
_MOST_TEMPLATES = 1024
_MOST_DOUBLED = 6  # 64 times as long until the next trial, at most


class Aim(NamedTuple):
    """What is to be kept, and by which means.

    Attributes:
        changed_allowed: share of answers that may differ from an exact prefill's.
        share: of blended requests that are shadowed; most_share: while evidence is short.
        least, most: bounds of the ratio.
    """

    changed_allowed: float
    share: float
    most_share: float
    least: float = LADDER[0]
    most: float = LADDER[-1]

    @property
    def ladder(self) -> tuple[float, ...]:
        """The ratios within the bounds; the upper bound itself where none is."""
        return tuple(r for r in LADDER if self.least <= r <= self.most) or (self.most,)


class Decision(NamedTuple):
    """For one request.

    Attributes:
        ratio: None: it is not blended.
        share: by which it is drawn to be shadowed.
    """

    ratio: float | None
    share: float


@dataclass(slots=True)
class _Template:
    """What is known of one.

    Attributes:
        step: of the ladder; its length: off.
        aim: of its last request.
        excess: changed answers beyond those allowed, less what steps took.
        searching: no step was taken back yet, so the right one is not known.
        moved: the last step: 1 up, -1 down, 0 none.
        in_vain: times that blending was turned off since the highest ratio was good enough.
    """

    step: int
    aim: Aim
    excess: float = 0.0
    searching: bool = True
    moved: int = 0
    in_vain: int = 0


class Controller:
    """Of all templates of an engine; those asked for the longest ago are forgotten."""

    def __init__(self, most_templates: int = _MOST_TEMPLATES) -> None:
        self._most = most_templates
        self._templates: OrderedDict[str, _Template] = OrderedDict()

    def decide(self, template: str, start: float, aim: Aim) -> Decision:
        """The ratio of the next request of a template, whose first one is at ``start`` or the next
        step above.
        """
        known, ladder = self._of(template, start, aim), aim.ladder
        most = max(aim.share, aim.most_share)
        if known.step == len(ladder):
            # An exact answer is known to be unchanged, and costs no shadow.
            known.excess -= aim.changed_allowed * most
            if known.excess > -DOWN * 2 ** (min(known.in_vain, _MOST_DOUBLED + 1) - 1):
                return Decision(None, 0.0)
            self._move(known, -1)
            known.excess = 0.0
        doubted = known.searching or known.excess > _DOUBT
        return Decision(ladder[known.step], most if doubted else aim.share)

    def learn(self, template: str, ratio: float, changed: bool) -> None:
        """An answer that was blended at ``ratio`` was shadowed."""
        known = self._templates.get(template)
        ladder = () if known is None else known.aim.ladder
        # Answers from before the last step tell nothing of this one.
        if known is None or known.step >= len(ladder) or ratio != ladder[known.step]:
            return
        known.excess += changed - known.aim.changed_allowed
        if known.excess >= UP:
            known.excess -= UP
            self._move(known, 1)
            if known.step == len(ladder):
                known.excess, known.in_vain = 0.0, known.in_vain + 1
        elif known.excess <= -DOWN:
            if known.step == len(ladder) - 1:
                known.in_vain = 0
            if known.step:
                known.excess += DOWN
                self._move(known, -1)
            else:  # nothing is lower: what was spared does not count against what comes
                known.excess, known.searching = 0.0, False

    def _of(self, template: str, start: float, aim: Aim) -> _Template:
        known, ladder = self._templates.get(template), aim.ladder
        if known is None:
            step = next((i for i, r in enumerate(ladder) if r >= start), len(ladder) - 1)
            known = self._templates[template] = _Template(step, aim)
            while len(self._templates) > self._most:
                self._templates.popitem(last=False)
        self._templates.move_to_end(template)
        known.step, known.aim = min(known.step, len(ladder)), aim
        return known

    def _move(self, known: _Template, by: int) -> None:
        # Taking a step back is the way round a target that lies between two steps. A second one in
        # the same direction is a search.
        known.searching = known.moved in (0, by)
        known.step, known.moved = known.step + by, by
