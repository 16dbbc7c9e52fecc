"""Recompute nothing: naive reuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cacheblend_rag.select.base import Evidence, Selector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class NoneSelector(Selector):
    """Recompute no reused token, whatever the ratio."""

    name: ClassVar[str] = "none"

    def score(self, evidence: Evidence) -> torch.Tensor:
        return evidence.candidate_N.float()

    def budget(self, ratio: float, candidates: float) -> int:
        return 0
