"""What the C library keeps of the memory that a worker on a CPU gave back."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

_EVERY_S = 60.0  # it takes some milliseconds, in which no step runs


class Heap:
    """Has free memory given back to the system, once a minute.

    Arrays of a step lie between others that stay. glibc keeps the gaps that they leave, and finds
    no room in them for the larger arrays of the next one: a worker grows by hundreds of megabytes
    that nothing uses.

    Args:
        trim: glibc's ``malloc_trim``; None: another C library's heap is left alone.
        clock: seconds, forward only.
    """

    def __init__(
        self,
        trim: Callable[[int], int] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trim, self._clock, self._next_s = trim, clock, clock() + _EVERY_S

    @classmethod
    def of(cls, device: str) -> Heap:
        """That of a worker whose model is on such a device: on a GPU, its heap is small."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device == "cpu" else None
        return cls(trim)

    def request_ended(self) -> None:
        """A request has: there is something to give back, and one stream less that waits for it."""
        if self._trim is not None and self._clock() >= self._next_s:
            self._trim(0)
            self._next_s = self._clock() + _EVERY_S
