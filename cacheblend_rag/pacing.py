"""How much of an ingestion, or of a refinement, is computed at once, so that answers do not wait
for it. Pure.

A batch is computed in parts: each layer is two, see ``engine/slices.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

IDLE_S = 0.05  # of a slice while nobody asks: as long as the first one who asks may have to wait
_SHARE = 0.5  # of a step, of a slice while somebody asks
_BUSY_S = 0.5  # as long as this after the last step, somebody asks
_LEAST_TOKENS = 256  # smaller batches cost more than they spare
_LEAST_REFINED = 16  # fewer tokens take as long
_HARDLY = 1.25  # times as long as the fewest


class Progress(NamedTuple):
    """What a worker reports after a slice.

    Attributes:
        seconds: that the slice took.
        steps: of the engine, since its start.
        step_s: seconds that one takes; 0: none is known.
    """

    seconds: float
    steps: int
    step_s: float


@dataclass
class Pace:
    """The sizes of slices and of batches, by what slices took before.

    Attributes:
        token_part_s: seconds that one part takes for one token; 0: not known.
        step_s: seconds that a step of the engine takes; 0: not known.
        own_steps: of the engine's, those that ingestions made themselves since its start.
        busy_s: seconds that ingestions took while somebody asked.
    """

    token_part_s: float = 0.0
    step_s: float = 0.0
    own_steps: int = 0
    busy_s: float = 0.0
    _steps: int = -1
    _asked_at: float = float("-inf")

    def is_busy(self, now: float) -> bool:
        """Whether somebody asks: the engine made steps that were not the ingestion's own."""
        return now < self._asked_at + _BUSY_S

    def parts(self, tokens: int, now: float, idle_s: float = IDLE_S) -> int:
        """How many parts of a batch of so many tokens come next.

        ``idle_s``: seconds of a slice while nobody asks.
        """
        if not self.token_part_s:
            return 1
        wanted = _SHARE * self.step_s if self.is_busy(now) and self.step_s else idle_s
        return max(1, int(wanted / (self.token_part_s * tokens)))

    def tokens(self, most: int) -> int:
        """Of a batch one part of which takes no longer than a slice may."""
        if not (self.token_part_s and self.step_s):
            return min(most, 2 * _LEAST_TOKENS)
        wanted = int(_SHARE * self.step_s / self.token_part_s)
        return min(most, max(_LEAST_TOKENS, wanted))

    def learn(self, progress: Progress, parts: int, tokens: int, now: float) -> None:
        """A slice of so many parts and tokens was computed."""
        took = progress.seconds / (parts * tokens)
        self.token_part_s = 0.7 * self.token_part_s + 0.3 * took if self.token_part_s else took
        self.see(progress.steps, progress.step_s, now)
        self._took(progress.seconds, now)

    def ended(self, parts: int, tokens: int, now: float) -> None:
        """The last slice of a batch was computed, of so many parts at the most."""
        self._took(self.token_part_s * parts * tokens, now)

    def _took(self, seconds: float, now: float) -> None:
        if self.is_busy(now):
            self.busy_s += seconds

    def see(self, steps: int, step_s: float, now: float) -> None:
        """So many steps were made since the engine's start, and so long takes one."""
        self.step_s = step_s or self.step_s
        others = steps - self.own_steps
        if 0 <= self._steps < others:
            self._asked_at = now
        self._steps = others


@dataclass
class RefinePace:
    """How many tokens are computed again with a step of an answer, by what they took before: as
    long as the step itself, or hardly longer than the fewest take, and no longer than ``IDLE_S``.
    So long may the first one who asks have to wait.

    Attributes:
        most: tokens of a step at most.
    """

    most: int
    _tokens: int = _LEAST_REFINED
    _least_s: float = math.inf  # that any slice took

    def tokens(self) -> int:
        """That come with the next step."""
        return min(self._tokens, self.most)

    def learn(self, tokens: int, seconds: float, step_s: float) -> None:
        """So many tokens took so long, and ``step_s`` a step without them; 0: that is not known."""
        self._least_s = min(self._least_s, seconds)
        # On a GPU a thousand tokens take hardly longer than sixteen do: the host needs as long for
        # either, and longer than for a step, which is one graph.
        wanted = min(IDLE_S, max(step_s or IDLE_S, _HARDLY * self._least_s))
        if tokens < self._tokens and seconds <= wanted:
            return  # the last ones of a request, or asked for before more were known to fit
        fitting = int(tokens * wanted / max(seconds, 1e-6))
        # A few tokens take nearly as long as one, so more of them fit than these seconds say.
        self._tokens = max(_LEAST_REFINED, min(fitting, 2 * max(tokens, _LEAST_REFINED)))
