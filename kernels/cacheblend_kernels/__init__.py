"""Tensor operations of a blend. Plain torch today; ``reference`` is the specification of each."""

from cacheblend_kernels.reference import (
    key_deviation,
    masked_attention,
    nearness,
    question_attention,
    rerotate,
    window_average,
)

__all__ = [
    "key_deviation",
    "masked_attention",
    "nearness",
    "question_attention",
    "rerotate",
    "window_average",
]
