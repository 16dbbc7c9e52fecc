"""Random selection: the floor every other selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cacheblend_rag.select.base import Evidence, Selector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class RandomSelector(Selector):
    """Recompute tokens at random; ``seed`` makes it repeatable on every rank."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def score(self, evidence: Evidence) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(evidence.ids_N), generator=generator).to(evidence.ids_N.device)
