"""Scores of answers, and intervals. Pure: texts and numbers in, numbers out."""

from __future__ import annotations

import math
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from cacheblend_rag.errors import MissingExtraError

RESAMPLES = 5000


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: SQuAD's own normalisation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, right: str) -> float:
    """SQuAD's token F1, 0 to 1. Where one side has no token left: 1 if both, else 0.

    Written here as SQuAD's script is: the libraries that have it fetch that script from a hub, or
    need tensors for a dozen lines.
    """
    a, b = normalised(answer).split(), normalised(right).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


def exact(answer: str, right: str) -> float:
    """1 where both are the same after normalisation, else 0."""
    return float(normalised(answer) == normalised(right))


def rouge_l(answer: str, right: str) -> float:
    """Rouge-L's F-measure, 0 to 1, as rouge-score computes it with stemming.

    Raises:
        MissingExtraError: rouge-score is not installed.
    """
    score: float = _rouge().score(right, answer)["rougeL"].fmeasure
    return score


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("rouge-score", "eval") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def best(metric: Callable[[str, str], float], answer: str, right: Sequence[str]) -> float | None:
    """The best of ``metric`` over the right answers; None where none is known."""
    return max((metric(answer, one) for one in right), default=None)


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_interval(differences: Sequence[float], *, seed: int = 0) -> Interval:
    """Mean of paired differences, one a question, with a percentile bootstrap interval over the
    questions (``RESAMPLES`` of them).

    Raises:
        ValueError: there are none.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        raise ValueError("there is no difference to average")
    draw = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[draw.integers(0, len(values), size=(100, len(values)))].mean(axis=1)
            for _ in range(RESAMPLES // 100)
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def detectable(differences: Sequence[float]) -> float | None:
    """The smallest true mean difference that as many questions, whose differences scatter as these
    do, tell from none four times in five, by a two-sided paired test at the 5 % level. None of
    fewer than two questions, and where all differences are equal: their scatter is not known then.
    """
    if len(differences) < 2:
        return None
    normal = statistics.NormalDist()
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return (normal.inv_cdf(0.975) + normal.inv_cdf(0.8)) * error or None
