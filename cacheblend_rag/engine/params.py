"""A request's ``kv_transfer_params`` that no process could be handed.

vLLM passes them on as they are, from the server to the engine and from there to the workers. Some
would end the engine on the way, and all answers with it: with or without our connector.
"""

from __future__ import annotations

import re
from typing import Any

from cacheblend_rag.reason import Reason, Why

_NAME = "kv_transfer_params"
_LONE = re.compile("[\ud800-\udfff]")  # halves of characters
_MOST_NESTED = 16  # levels of a request's options
_LOOKED_AT = {dict, list, str}


def check_params(params: object) -> None:
    """Look at them before they leave the server.

    Raises:
        ValueError: they are such; vLLM answers 400.
    """
    if params is not None and not isinstance(params, dict):
        raise ValueError(f"{_NAME} must be an object")
    level: list[Any] = [params]
    for _ in range(_MOST_NESTED):
        if any(_LONE.search(text) for value in level for text in _texts_of(value)):
            raise ValueError(f"{_NAME} has half a character (a lone surrogate)")
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise ValueError(f"{_NAME} is nested more than {_MOST_NESTED} levels deep")


def drop_unwritable(request: Any) -> Why | None:
    """Take them off a request of vLLM's that has reached the engine, where its workers could not be
    sent them; returns why, or None where nothing was taken.
    """
    try:
        check_params(request.kv_transfer_params)
    except ValueError as error:
        request.kv_transfer_params = None
        extra = request.sampling_params.extra_args
        request.sampling_params.extra_args = {n: v for n, v in extra.items() if n != _NAME}
        return Why(Reason.MALFORMED_OPTIONS, str(error))
    return None


def _texts_of(value: object) -> list[str]:
    if isinstance(value, dict):
        return [key for key in value if isinstance(key, str)]
    return [value] if isinstance(value, str) else []


def _inside(value: object) -> list[Any]:
    """What there is to look at."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list) or _LOOKED_AT.isdisjoint(map(type, value)):
        return []  # a list of block numbers, say, which may be long
    return [inner for inner in value if type(inner) in _LOOKED_AT]
