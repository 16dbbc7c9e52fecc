"""Tensor operations of a blend.

``reference`` is the specification of each in plain torch, and what a CPU runs. The Triton kernels
have a file an operation: ``angles``, ``attention``, ``propagate``, ``rotate_and_scatter`` and
``softmax``. They are imported from there, and only where there is a GPU.
"""

from cacheblend_kernels.reference import (
    key_deviation,
    masked_attention,
    masked_softmax,
    nearness,
    question_attention,
    rerotate,
    rotation_deltas,
    window_average,
)

__all__ = [
    "key_deviation",
    "masked_attention",
    "masked_softmax",
    "nearness",
    "question_attention",
    "rerotate",
    "rotation_deltas",
    "window_average",
]
