"""Types of the arrays that chunks are found with, and what NumPy lacks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Hashes = NDArray[np.uint64]
ScalarT = TypeVar("ScalarT", bound=np.generic)


class Growing(Generic[ScalarT]):
    """An array that grows at its end; earlier ``values`` stay valid and unchanged."""

    def __init__(self, values: NDArray[ScalarT]) -> None:
        self._buffer = values
        self.values = values

    def extend(self, values: NDArray[ScalarT]) -> None:
        """Append these."""
        # Into room to spare behind what others hold, or into a larger buffer: never in its place.
        old, size = len(self.values), len(self.values) + len(values)
        if size > len(self._buffer):
            self._buffer = np.empty(size + size // 2, self.values.dtype)
            self._buffer[:old] = self.values
        self._buffer[old:size] = values
        self.values = self._buffer[:size]

    def with_value(self, index: int, value: ScalarT) -> Growing[ScalarT]:
        """A copy in which one value differs."""
        changed = self.values.copy()
        changed[index] = value
        return Growing(changed)


def as_ids(token_ids: Sequence[int] | Ids) -> Ids:
    """Token ids as an array."""
    return np.asarray(token_ids, np.int32)


def exclusive_sum(counts: Ints) -> Ints:
    """The sum of all counts before each one."""
    return np.cumsum(counts) - counts


def ranges(starts: Ints, counts: Ints) -> Ints:
    """``starts[i], starts[i] + 1, ...`` (``counts[i]`` of them) for every i, end to end."""
    shift = np.repeat(starts - exclusive_sum(counts), counts)
    return np.arange(len(shift)) + shift
