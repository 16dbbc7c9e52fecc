"""The contract of a selector: which of the reused tokens to recompute."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch


class AskedLayers(NamedTuple):
    """What of a model's layers a question's pass goes through.

    Attributes:
        summed: numbers of the layers whose attention is summed, ascending, at least one.
        sees_from: number of the first layer at which the question sees the context.
    """

    summed: tuple[int, ...]
    sees_from: int

    @property
    def reading(self) -> range:
        """The layers whose KV of the context is read."""
        return range(self.sees_from, self.summed[-1] + 1)


class QuestionAttention(NamedTuple):
    """Asks for the attention that the question pays each token, over the reused KV.

    Attributes:
        layers: those whose attention is summed, first and last as shares of the depth.
        sees_from: the layer, as a share of the depth, at which the question begins to see the
            context: at the latest the first that is summed. In the layers below, what runs sees
            only itself, so no stored KV of theirs is needed.
    """

    layers: tuple[float, float]
    sees_from: float = 0.0

    def range(self, num_layers: int) -> range:
        """The layers to sum as numbers, at least one."""
        first = int(self.layers[0] * num_layers)
        return range(first, max(first + 1, int(self.layers[1] * num_layers)))

    def among(self, sees_all: Sequence[bool]) -> AskedLayers:
        """The same for a model whose layers see all of the context or only a window. Summed are
        those of the range that see all; where none does, the nearest one that does, the later of
        two; where no layer of the model does, the range.
        """
        wanted = self.range(len(sees_all))
        everywhere = [layer for layer, sees in enumerate(sees_all) if sees]
        summed = [layer for layer in everywhere if layer in wanted]
        if not everywhere:
            summed = list(wanted)
        elif not summed:
            far = {layer: max(wanted[0] - layer, layer - wanted[-1]) for layer in everywhere}
            summed = [min(reversed(everywhere), key=far.__getitem__)]
        return AskedLayers(tuple(summed), min(int(self.sees_from * len(sees_all)), summed[0]))


class KVDeviation(NamedTuple):
    """Asks for the squared distance between each token's fresh and its reused keys.

    Attributes:
        layer: where it is measured; all tokens are computed through the layers below.
        values: add that of the values.
    """

    layer: int
    values: bool = False


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a selector may look at. N counts the tokens of the blended region.

    Attributes:
        candidate_N: bool, the reused tokens among which to choose.
        offset_N: int64, each token's place in its chunk.
        question_N: float32, what was asked for by ``QuestionAttention``.
        deviation_N: float32, what was asked for by ``KVDeviation``.
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
    parallel group.
    """

    name: ClassVar[str]

    @property
    def evidence(self) -> QuestionAttention | KVDeviation | None:
        """What the engine has to gather, summed over ranks; None for nothing."""
        return None

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
