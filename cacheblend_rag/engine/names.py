"""vLLM's names of the requests that answer a client's request."""

from __future__ import annotations

import re
from collections.abc import Iterable

# one of n answers, one of several prompts or turns, one of the beams at a token of a beam search,
# and what vLLM adds to make it unique
_BEAM = r"-[0-9a-f]{16,32}-beam-(?P<beam>\d+)"
_UNIQUE = r"(?:-[0-9a-f]{8})?"


def answers_to(name: str, request: str) -> tuple[int, int] | tuple[()]:
    """The place of vLLM's request ``name`` among those that answer a client's ``request``: number
    of its prompt and of its answer, from 1; empty where it is of another request.
    """
    # A chat has one prompt: what looks like the number of another is the end of another chat's id.
    between = "_" if request.startswith("chatcmpl-") else "[-_]"
    own = rf"(?:(?P<answer>\d+)_)?{re.escape(request)}(?:{between}(?P<prompt>\d{{1,7}}))?"
    found = re.fullmatch(rf"{own}(?:{_BEAM})?{_UNIQUE}", name)
    if found is None:
        return ()
    return int(found["prompt"] or 0) + 1, int(found["answer"] or found["beam"] or 0) + 1


def answering(names: Iterable[str], request: str) -> list[str]:
    """Those of vLLM's ``names``, the oldest first, that answer a client's ``request``, by their
    places. Of several of one place, the latest: clients may give one id (``X-Request-Id``) twice.
    But the tokens of a beam search stay as they came.
    """
    found: dict[object, tuple[tuple[int, int], str]] = {}
    for name in names:
        if place := answers_to(name, request):
            found[name if is_beam(name) else place] = place, name
    return [name for _, name in sorted(found.values(), key=lambda both: both[0])]


def is_beam(name: str) -> bool:
    """Whether vLLM's request ``name`` is one beam at one token of a beam search."""
    return re.search(rf"{_BEAM}{_UNIQUE}$", name) is not None
