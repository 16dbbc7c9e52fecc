"""Selection of each chunk's first tokens: EPIC's LegoLink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cacheblend_rag.select.base import Evidence, Selector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class FirstKSelector(Selector):
    """Recompute the first tokens of every chunk, where a lone chunk has its attention sink
    (EPIC, arXiv 2410.15332). The ratio says how many in all; chunks share them evenly.
    """

    name: ClassVar[str] = "first_k"

    def score(self, evidence: Evidence) -> torch.Tensor:
        return -evidence.offset_N.float()
