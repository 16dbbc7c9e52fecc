"""Greedy dual size frequency (Cherkasova 1998): uses times recompute cost, per byte, with ageing.

The original ages by adding the last victim's priority to every new one, which lets a chunk seen
once outrank all that were not used lately. Uses that lose half their weight in a half-life forget
as well, and come closer to what perfect knowledge of popularity reaches (docs/store.md).
"""

from __future__ import annotations

import math
from typing import ClassVar

from cacheblend_rag.store.evict.base import Policy, Usage


class GDSF(Policy):
    """Keeps what saves most work per byte. Chunks seen once push out one another, not warm ones."""

    name: ClassVar[str] = "gdsf"
    refuses: ClassVar[bool] = False

    def priority(self, usage: Usage) -> float:
        return usage.heat + math.log2(usage.cost / usage.nbytes)
