"""The contract of an eviction policy: a number per chunk, the lowest leaves first."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

# Where attention costs as much as all matrix products of a prefill together. It depends on the
# model (6k tokens for one of 135M parameters, 57k for one of 8B); only ratios of costs matter here.
_ATTENTION_EQUALS_REST = 32_768

_USES_PER_HALF_LIFE = 10  # times the number of chunks held; 5 to 20 do equally well
_FEWEST_CHUNKS = 100  # a store not filled yet must not forget at once


class Usage(NamedTuple):
    """What a store knows of a chunk at the moment of a use."""

    heat: float  # log2 of the number of uses, each doubling every half-life: see ``warmed``
    cost: float  # of computing it again, in any unit that is the same for all chunks
    nbytes: int
    tick: int  # number of this use among all uses; no clock, so that clocks may jump


class Policy(ABC):
    """Decides from plain numbers and holds no state: stores keep that, in memory or on disk.

    A priority is set when a chunk is put or used, and stays until its next use.
    """

    name: ClassVar[str]
    refuses: ClassVar[bool]  # a new chunk stays out where it ranks below one it would push out

    @abstractmethod
    def priority(self, usage: Usage) -> float:
        """How long to keep a chunk used now, compared with others."""


def warmed(heat: float | None, age: float) -> float:
    """Heat after one more use at ``age`` half-lives; None is a chunk never seen.

    Instead of halving all counts now and then, a use counts twice as much after every half-life;
    in powers of two, so that no number ever grows large.
    """
    if heat is None:
        return age
    low, high = sorted((heat, age))
    return high + math.log2(1 + 2 ** max(low - high, -1000))


def age_step(num_chunks: int) -> float:
    """Half-lives that pass with one use of a store that holds so many chunks."""
    return 1 / (_USES_PER_HALF_LIFE * max(num_chunks, _FEWEST_CHUNKS))


def recompute_cost(num_tokens: int) -> float:
    """Work of prefilling a chunk alone, in units of one token's matrix products."""
    return num_tokens * (1 + num_tokens / _ATTENTION_EQUALS_REST)
