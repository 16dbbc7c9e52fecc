"""Least recently used first: the baseline."""

from __future__ import annotations

from typing import ClassVar

from cacheblend_rag.store.evict.base import Policy, Usage


class LRU(Policy):
    """Keeps what was used last. A burst of new chunks flushes it."""

    name: ClassVar[str] = "lru"
    refuses: ClassVar[bool] = False

    def priority(self, usage: Usage) -> float:
        return float(usage.tick)
