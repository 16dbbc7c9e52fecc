"""Selection by the question's attention: the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cacheblend_rag.select.base import Evidence, EvidenceKind, Selector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class QuerySelector(Selector):
    """Recompute what the question looks at, and its neighbours.

    The question's tokens run over the reused KV once, up to the last of ``layers``; the attention
    they pay each context token is summed over those layers, all heads and all question tokens, then
    averaged over ``window`` neighbours. At equal ratio this keeps answers closer to a full prefill
    than KV deviation does (docs/architecture.md says where that was measured).

    Attributes:
        layers: first and last layer as shares of the depth; middle to late layers carry the signal.
        window: odd number of neighbouring tokens that share their attention.
    """

    name: ClassVar[str] = "query"
    evidence: ClassVar[EvidenceKind] = "question"
    layers: tuple[float, float] = (1 / 3, 3 / 4)
    window: int = 9

    def validate(self) -> None:
        low, high = self.layers
        if not 0 <= low < high <= 1:
            raise ValueError(f"layers must be two shares 0 <= low < high <= 1, got {self.layers}")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window must be odd and positive, got {self.window}")

    def layer_range(self, num_layers: int) -> range:
        """The layers whose attention counts, at least one."""
        first = int(self.layers[0] * num_layers)
        return range(first, max(first + 1, int(self.layers[1] * num_layers)))

    def score(self, evidence: Evidence) -> torch.Tensor:
        from cacheblend_kernels import window_average

        assert evidence.question_N is not None
        return window_average(evidence.question_N * evidence.candidate_N, self.window)
