"""What counts as token ids: whole numbers, in any sequence or one-dimensional array."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from numbers import Number
from typing import Any

from cacheblend_rag.errors import PromptError

_BYTES = (bytes, bytearray, memoryview)


def are_token_ids(value: Any) -> bool:
    """Whether ``value`` is meant as token ids, by its kind or its first item."""
    if isinstance(value, _BYTES) or hasattr(value, "tolist"):  # NumPy's, PyTorch's, array's
        return True
    if not isinstance(value, Sequence) or not value:
        return False
    first = value[0]
    whole = hasattr(first, "__index__") and getattr(first, "ndim", 0) == 0
    return whole or isinstance(first, Number)


def token_ids(value: Any) -> tuple[int, ...]:
    """``value`` as plain numbers.

    Raises:
        PromptError: something else than whole numbers.
    """
    if isinstance(value, _BYTES):
        raise PromptError(
            "bytes are no token ids: decode them to text, data.decode('utf-8'), or tokenise them"
        )
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, str | Mapping | Set) or not hasattr(items, "__iter__"):
        raise PromptError(f"token ids are a list of whole numbers, not {type(value).__name__}")
    items = tuple(items)
    if set(map(type, items)) <= {int}:
        return items
    return tuple(map(_whole, items))


def _whole(item: Any) -> int:
    if isinstance(item, list | tuple) or getattr(item, "ndim", 0) > 0:
        raise PromptError("token ids are one row of whole numbers; pass each row by itself, ids[0]")
    number = item.item() if hasattr(item, "item") else item  # NumPy's and PyTorch's scalars
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise PromptError(f"{number!r} is no token id; pass one text, or whole numbers as ids")
    return operator.index(number)
