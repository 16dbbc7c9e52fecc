"""Which chunks leave a full store first: a policy by its name."""

from __future__ import annotations

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store.evict.base import Policy, Usage, age_step, recompute_cost, warmed
from cacheblend_rag.store.evict.gdsf import GDSF
from cacheblend_rag.store.evict.gdsf_strict import StrictGDSF
from cacheblend_rag.store.evict.lru import LRU
from cacheblend_rag.store.evict.ranking import Ranking

__all__ = [
    "GDSF",
    "LRU",
    "POLICIES",
    "Policy",
    "Ranking",
    "StrictGDSF",
    "Usage",
    "age_step",
    "create_policy",
    "recompute_cost",
    "warmed",
]

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (GDSF(), StrictGDSF(), LRU())}


def create_policy(name: str) -> Policy:
    """The policy of that name.

    Raises:
        StoreError: there is none.
    """
    if name not in POLICIES:
        raise StoreError(f"{name!r} is no eviction policy. There are: {', '.join(POLICIES)}.")
    return POLICIES[name]
