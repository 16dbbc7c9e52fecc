"""How much of the engine's time goes into what was not asked for."""

from __future__ import annotations

_MOST_S = 2.0  # that is saved up


class Budget:
    """A share of the time that goes by, saved up for 2 s at most.

    Args:
        share: of the time, 0 to 1.
        now: seconds of any clock that goes forward.
    """

    def __init__(self, share: float, now: float) -> None:
        self._share, self._left, self._at = share, 0.0, now

    def allows(self, now: float) -> bool:
        """Whether something is left."""
        self._left = min(_MOST_S, self._left + self._share * max(0.0, now - self._at))
        self._at = max(self._at, now)
        return self._left > 0

    def spend(self, seconds: float) -> None:
        """So much was taken; it may be more than there was."""
        self._left -= seconds
