"""From a prompt to the chunks that it teaches."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cacheblend_rag.keys import KeySpace
from cacheblend_rag.learn.options import LearnOptions
from cacheblend_rag.learn.repeats import Repeats
from cacheblend_rag.locate import Ids

MOST_TOKENS = 1024  # of a chunk: a longer repeat becomes several
_AGAIN_S = 60.0  # after which a chunk is named again that did not come to be
_MOST_NAMED = 10_000


class Prompt(NamedTuple):
    """What was asked.

    Attributes:
        owner: whose it is: nothing is learnt from one owner for another.
        ids: int32 [T], its token ids.
        covered: stretches [start, end) that chunks serve, disjoint and in order.
        keys: the key space of what it teaches.
        is_salted: only its owner's prompts are to be searched for what it teaches.
        to_store: that goes to the store, and else to the memory of the engine.
        is_worth_it: whether a blend that had these stretches as well would be quicker.
    """

    owner: str
    ids: Ids
    covered: Sequence[tuple[int, int]]
    keys: KeySpace
    is_salted: bool
    to_store: bool
    is_worth_it: Callable[[Sequence[tuple[int, int]]], bool]


class Span(NamedTuple):
    """A chunk to compute; plain data.

    Attributes:
        key: of the chunk.
        token_ids: its tokens.
        prefix_ids: what it is computed behind.
        to_store: it goes to the store, and else to the memory of the engine.
    """

    key: str
    token_ids: Sequence[int]
    prefix_ids: Sequence[int]
    to_store: bool


class Learner:
    """Names the text that came for the second time, where a blend of it is worth it. Not safe to be
    used by two threads at once.
    """

    def __init__(self, options: LearnOptions) -> None:
        self._repeats = Repeats(options.min_tokens, options.remember_tokens, options.ttl_s)
        self._named: OrderedDict[str, float] = OrderedDict()  # when, by key

    def observe(self, prompt: Prompt, now: float) -> list[Span]:
        """The chunks that a prompt teaches.

        Args:
            now: the time, in seconds of any clock that goes forward.
        """
        found = self._repeats.feed(prompt.owner, prompt.ids, prompt.covered, now)
        if not found or not prompt.is_worth_it(found):
            return []
        spans = []
        for start, end in pieces(found):
            ids = prompt.ids[start:end].tolist()
            key = prompt.keys.key(ids)
            if self._is_new(key, now):
                spans.append(Span(key, ids, list(prompt.keys.prefix_ids), prompt.to_store))
        return spans

    def _is_new(self, key: str, now: float) -> bool:
        named = self._named.pop(key, -np.inf)
        is_new = now - named >= _AGAIN_S
        self._named[key] = now if is_new else named
        while len(self._named) > _MOST_NAMED:
            self._named.popitem(last=False)
        return is_new


def pieces(stretches: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The stretches, those of more than ``MOST_TOKENS`` tokens cut into equal parts."""
    for start, end in stretches:
        parts = -(-(end - start) // MOST_TOKENS)
        cuts = [start + (end - start) * part // parts for part in range(parts + 1)]
        yield from itertools.pairwise(cuts)
