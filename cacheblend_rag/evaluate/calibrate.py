"""Which way of blending keeps answers and recomputes least? Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cacheblend_rag.config import PROPAGATION_LENGTH
from cacheblend_rag.errors import DataError
from cacheblend_rag.evaluate.summary import RowSummary, SetSummary

_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
_COVERAGES = (0.4, 0.5, 0.6, 0.7)

CANDIDATES = tuple(
    f"{row}{propagation_length}"
    for propagation_length in ("", f"~{PROPAGATION_LENGTH}")
    for row in (
        *(f"query@{ratio:g}" for ratio in _RATIOS),
        *(f"query:coverage={share:g}:first_share=0@0.5" for share in _COVERAGES),
    )
)


def pooled(summaries: Sequence[SetSummary]) -> SetSummary:
    """All sets together.

    Raises:
        DataError: several sets that are not all of questions: their answers are not of one kind.
    """
    if len(summaries) == 1:
        return summaries[0]
    together = [s for s in summaries if s.set == "all"]
    if not together or any(s.measure != together[0].measure for s in summaries):
        raise DataError("calibrate on sets of questions, or on one set of summaries")
    return together[0]


def choose(summary: SetSummary, changed: float, candidates: Sequence[str] = CANDIDATES) -> str:
    """The row that recomputes least of those that change at most the share ``changed`` of answers.

    Raises:
        DataError: no row does.
    """
    rows = [row for row in summary.rows if row.row in candidates and row.ratio is not None]
    if not rows:
        raise DataError("no question was blended: are the passages long enough to be chunks?")
    fitting = [row for row in rows if row.changed <= changed]
    if not fitting:
        best = min(rows, key=lambda row: row.changed)
        raise DataError(
            f"no way changes at most {changed:.0%} of these {summary.questions} answers; "
            f"the best, {best.row}, changes {best.changed:.0%}. Allow more (--changed), or serve "
            "such questions with mode='full'"
        )
    return min(fitting, key=_cost).row


def _cost(row: RowSummary) -> tuple[float, float]:
    assert row.ratio is not None
    return round(row.ratio, 3), row.kl or 0.0
