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
_GAP = 1.6  # steps that an answer may wait for its next token, with a slice between; 2 are allowed
_SLOWED = 1.4  # times as long as alone an interleaved step takes, until that is known
_LONG_SLICES = 2  # of a batch: its first ones also prepare for its number of tokens
_BUSY_S = 0.5  # as long as this after the last step, somebody asks
_PAUSE_EVERY, _PAUSE_STEPS = 12, 2.5  # slices; long enough for a step alone
_LEAST_TOKENS = 256  # smaller batches cost more than they spare
_LEAST_REFINED = 16  # fewer tokens take as long
_HARDLY = 1.25  # times as long as the fewest


class Progress(NamedTuple):
    """What a worker reports after a slice.

    Attributes:
        seconds: that the slice took.
        steps: of the engine, since its start.
        step_s: seconds that one takes alone; 0: none is known.
        interleaved_s: that one takes that a slice follows, without the slice; 0: as above.
    """

    seconds: float
    steps: int
    step_s: float
    interleaved_s: float = 0.0


@dataclass
class Pace:
    """The sizes of slices and of batches, by what slices took before.

    Attributes:
        token_part_s: seconds that one part takes for one token; 0: not known.
        step_s, interleaved_s: seconds that a step of the engine takes, alone and with slices; 0:
            not known.
        own_steps: of the engine's, those that ingestions made themselves since its start.
        busy_s: seconds that ingestions took while somebody asked.
    """

    token_part_s: float = 0.0
    step_s: float = 0.0
    interleaved_s: float = 0.0
    own_steps: int = 0
    busy_s: float = 0.0
    _slices: int = 0  # since a step alone was seen
    _of_batch: int = 0  # slices
    _steps: int = -1
    _asked_at: float = float("-inf")

    def is_busy(self, now: float) -> bool:
        """Whether somebody asks: the engine made steps that were not the ingestion's own."""
        return now < self._asked_at + _BUSY_S

    def asked(self, now: float) -> None:
        """Somebody asks: steps are about to come."""
        self._asked_at = now

    def begin(self) -> None:
        """A batch begins."""
        self._of_batch = 0

    def parts(self, tokens: int, now: float, idle_s: float = IDLE_S) -> int:
        """How many parts of a batch of so many tokens come next.

        ``idle_s``: seconds of a slice while nobody asks.
        """
        if not self.token_part_s or (self.is_busy(now) and self._of_batch < _LONG_SLICES):
            return 1
        wanted = self._busy_slice_s() if self.is_busy(now) else idle_s
        return max(1, int(wanted / (self.token_part_s * tokens)))

    def tokens(self, most: int) -> int:
        """Of a batch two parts of which take no longer than a slice may: they are not equal."""
        if not (self.token_part_s and self.step_s):
            return min(most, 2 * _LEAST_TOKENS)
        wanted = int(self._busy_slice_s() / (2 * self.token_part_s))
        return min(most, max(_LEAST_TOKENS, wanted))

    def pause(self, now: float) -> float:
        """Seconds to wait before the next slice. While somebody asks, a step is alone now and then:
        by how long that takes, slices are measured.
        """
        if not self.is_busy(now) or self._slices < _PAUSE_EVERY:
            return 0.0
        self._slices = 0
        return _PAUSE_STEPS * max(self.step_s, self.interleaved_s)

    def _busy_slice_s(self) -> float:
        """Seconds of a slice while somebody asks."""
        # A slice makes the step longer by more than itself, and the answer waits for that, too.
        interleaved_s = self.interleaved_s or _SLOWED * self.step_s
        step_s = min(self.step_s, interleaved_s)
        return min(_SHARE * step_s, _GAP * step_s - interleaved_s)

    def learn(self, progress: Progress, parts: int, tokens: int, now: float) -> None:
        """A slice of so many parts and tokens was computed."""
        took = progress.seconds / (parts * tokens)
        if not self.token_part_s and parts == 1:
            took *= 2  # it is the short one of a layer's two
        if not self.token_part_s:
            self.token_part_s = took
        elif self._of_batch >= _LONG_SLICES:
            self.token_part_s = 0.7 * self.token_part_s + 0.3 * took
        self._of_batch += 1
        self.interleaved_s = progress.interleaved_s or self.interleaved_s
        self._slices += 1
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
