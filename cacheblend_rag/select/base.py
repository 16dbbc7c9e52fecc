"""The contract of a selector: which of the reused tokens to recompute."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    import torch

EvidenceKind = Literal["none", "question", "deviation"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a selector may look at. N counts the tokens of the blended region.

    Attributes:
        candidate_N: bool, the reused tokens among which to choose.
        offset_N: int64, each token's place in its chunk.
        question_N: float32, attention the question paid to each token (evidence ``question``).
        deviation_N: float32, KV deviation at the check layer (evidence ``deviation``).
        ids_N: int64 token ids.
        budget: how many tokens may be chosen.
    """

    candidate_N: torch.Tensor
    offset_N: torch.Tensor
    ids_N: torch.Tensor
    question_N: torch.Tensor | None = None
    deviation_N: torch.Tensor | None = None
    budget: int = 0


@dataclass(frozen=True, kw_only=True)
class Selector(ABC):
    """Scores tokens; the highest scored are recomputed.

    A selector is a frozen value: the same evidence gives the same scores on every rank of a tensor
    parallel group. The engine gathers the evidence that ``evidence`` names (summed over ranks).
    """

    name: ClassVar[str]
    evidence: ClassVar[EvidenceKind] = "none"

    @abstractmethod
    def score(self, evidence: Evidence) -> torch.Tensor:
        """float32 [N]; only the candidates' scores count."""

    def choose(self, evidence: Evidence, score_N: torch.Tensor) -> torch.Tensor:
        """int64, the places of the tokens to recompute: the best candidates, as many as the budget
        allows, the best first. A selector that is content with fewer may wait for the device.
        """
        best = score_N.masked_fill(~evidence.candidate_N, -math.inf).topk(evidence.budget)
        return best.indices

    def budget(self, ratio: float, candidates: float) -> int:
        """How many tokens to recompute of (weighted) ``candidates``."""
        return math.ceil(ratio * candidates - 1e-9)

    def validate(self) -> None:  # noqa: B027 - most have nothing to check
        """Raise ValueError for parameters that make no sense."""
