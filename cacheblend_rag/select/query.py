"""Selection by the question's attention: the default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cacheblend_rag.select.base import Evidence, QuestionAttention, Selector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class QuerySelector(Selector):
    """Recompute what the question looks at, its neighbours, and the first tokens of chunks.

    The question's tokens run through the model once, up to the last of ``layers``. From
    ``sees_from`` on they see the reused KV. The attention that they pay to a context token is its
    score: the sum over ``layers``, all heads and all question tokens, averaged over ``window``
    neighbours. At equal ratio this keeps answers closer to a full prefill than KV deviation does.
    The defaults are those whose KL was the lowest on the half of the questions that tuning may see
    (docs/quality.md).

    Attributes:
        layers: first and last layer as shares of the depth; later ones carry the signal.
        sees_from: the layer, as a share of the depth, at which they begin to see the reused KV: at
            the latest the first of ``layers``, which 1 stands for. Below, they see one another and
            the prompt's first tokens, so no stored KV has to be loaded for it (our own).
        window: odd number of neighbouring tokens that share their attention.
        first_share: the share of the budget, 0 to 1, that goes to the first tokens of chunks, as
            many of every chunk: false attention sinks (EPIC, arXiv 2410.15332). The question
            chooses the others.
        coverage: as soon as the chosen tokens get this share of the question's attention to reused
            tokens, no more are chosen; 1 uses up the budget. So a question that looks at few places
            costs less than one that looks everywhere (our own). First tokens come before others, so
            ``first_share=0`` goes with it.
    """

    name: ClassVar[str] = "query"
    layers: tuple[float, float] = (1 / 2, 3 / 4)
    sees_from: float = 0.0
    window: int = 9
    first_share: float = 0.5
    coverage: float = 1.0

    def validate(self) -> None:
        low, high = self.layers
        if not 0 <= low < high <= 1:
            raise ValueError(f"layers must be two shares 0 <= low < high <= 1, got {self.layers}")
        if not 0 <= self.sees_from <= 1:
            raise ValueError(f"sees_from must be a share, 0 to 1, got {self.sees_from}")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window must be odd and positive, got {self.window}")
        if not 0 <= self.first_share <= 1:
            raise ValueError(f"first_share must be a share, 0 to 1, got {self.first_share}")
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must be a share above 0, up to 1, got {self.coverage}")

    @property
    def evidence(self) -> QuestionAttention:
        return QuestionAttention(self.layers, self.sees_from)

    def score(self, evidence: Evidence) -> torch.Tensor:
        from cacheblend_kernels import window_average

        assert evidence.question_N is not None
        attention = evidence.question_N * evidence.candidate_N
        score: torch.Tensor = window_average(attention, self.window)
        if self.first_share:
            where = _first(evidence, int(self.first_share * evidence.budget))
            score = score.index_put((where,), score.max() + 1 + score[where])
        return score

    def choose(self, evidence: Evidence, score_N: torch.Tensor) -> torch.Tensor:
        chosen = super().choose(evidence, score_N)
        if self.coverage == 1:
            return chosen
        assert evidence.question_N is not None
        attention = (evidence.question_N * evidence.candidate_N).double()
        covered = attention[chosen].cumsum(0)
        short = covered < self.coverage * attention.sum()
        return chosen[: int(short.sum()) + 1]  # waits for the question's pass


def _first(evidence: Evidence, count: int) -> torch.Tensor:
    """int64 [count]: the candidates nearest to the starts of their chunks; every rank finds the
    same, as no two are equally near: of the same place, the one earlier in the prompt is.
    """
    import torch

    size = len(evidence.offset_N)
    order = evidence.offset_N * size + torch.arange(size, device=evidence.offset_N.device)
    far = torch.iinfo(torch.int64).max
    return order.masked_fill(~evidence.candidate_N, far).topk(count, largest=False).indices
