"""Refinement: a blend's tokens are computed again while its answer is generated. The scheduler's
side, which says what comes next.

In the order of positions, and those of the answer too: each token is exact if all before it are.
When what was computed again has reached the token that a step computes anyway, all KV of the
request is a full prefill's, and so is what its further steps add. Until then its blocks keep hashes
that nobody else has.

Only a request that is in the next step is given anything: vLLM has not freed its blocks, and the
workers take the steps in order. Nobody else reads them: below ``start`` are those that others may
share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cacheblend_rag.engine import hashes
from cacheblend_rag.engine.outcome import Refine, Refined
from cacheblend_rag.options import Refine as Wish
from cacheblend_rag.pacing import RefinePace

PREEMPTED = "vLLM took the request's blocks for others before all was computed again"


@dataclass
class _UnderWay:
    """A request whose blend is refined.

    Attributes:
        wish: tokens a step, or ``idle``.
        next: the first position that was not handed to the worker yet.
        of_prompt: the plain hashes of its prompt's blocks.
        tokens: that were computed again.
        exact: all of the request's KV is; why_not: why it will not be.
    """

    request: Any
    wish: Wish
    next: int
    blocks: list[int]
    of_prompt: Sequence[bytes]
    tokens: int = 0
    exact: bool = False
    is_last_under_way: bool = False
    why_not: str = ""


def refined_so_far(tokens: int, *, exact: bool, why_not: str) -> dict[str, Any]:
    """For the report."""
    return {"tokens": tokens, "exact": exact, "detail": why_not}


class Refinements:
    """The requests that are refined, by vLLM's names.

    Args:
        refusal: why this engine refines nothing; empty if it does.
        most_tokens: of a step.

    Attributes:
        pool: vLLM's block pool; None until it is known.
    """

    def __init__(self, refusal: str, block_size: int, most_tokens: int) -> None:
        self._refusal, self.block_size, self._most = refusal, block_size, most_tokens
        self._pace = RefinePace(most_tokens)
        self._requests: dict[str, _UnderWay] = {}
        self.pool: Any = None

    def refusal(self, request: Any) -> str:
        """Why a request's blend can't be refined, whatever is in its prompt; empty if it can."""
        if self._refusal:
            return self._refusal
        if self.pool is None:
            return "this vLLM does not show its block pool to connectors"
        if request.lora_request is not None:
            return "the request has a LoRA adapter, with which refinement was not tested"
        return ""

    def begin(
        self,
        request: Any,
        wish: Wish,
        start: int,
        blocks: Sequence[int],
        of_prompt: Sequence[bytes],
    ) -> None:
        """A blend is about to be computed. All its KV below ``start`` is exact, and only what lies
        below may be in blocks that others read.
        """
        under_way = _UnderWay(request, wish, start, list(blocks), of_prompt)
        self._requests[request.request_id] = under_way

    def has(self, name: str) -> bool:
        """Whether a request is refined, or was."""
        return name in self._requests

    def take_blocks(self, scheduled: Any) -> None:
        """Of a step that was built: it may give requests further blocks."""
        if not self._requests:
            return
        cached = scheduled.scheduled_cached_reqs
        for name, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in self._requests and new:
                self._requests[name].blocks += new[0]

    def next(self, name: str, caller: str, computed: int) -> list[Refine]:
        """What of a request is computed again before its step, of which position ``computed`` is
        the first.
        """
        found = self._requests.get(name)
        if found is None or found.exact or found.why_not or found.is_last_under_way:
            return []
        tokens = found.request.all_token_ids
        count = self._pace.tokens() if found.wish == "idle" else min(int(found.wish), self._most)
        # Where vLLM schedules steps ahead, the last token may not be known here yet.
        end = min(found.next + count, computed, len(tokens))
        if end <= found.next:
            return []
        start, found.next = found.next, end
        found.is_last_under_way = end == computed
        ids, blocks = tuple(tokens[start:end]), tuple(found.blocks)
        return [Refine(name, caller, start, ids, blocks, found.is_last_under_way)]

    def take(self, done: Iterable[tuple[str, Refined]]) -> None:
        """What the worker did."""
        for name, refined in done:
            if not refined.failure:
                self._pace.learn(refined.tokens, refined.seconds, refined.step_s)
            found = self._requests.get(name)
            if found is None or found.why_not:
                continue
            if refined.failure:
                found.why_not = refined.failure
                continue
            found.tokens += refined.tokens
            if refined.is_last:
                found.exact = True
                if found.of_prompt:  # else vLLM looks nothing up
                    own = found.request, found.of_prompt
                    hashes.make_plain(self.pool, *own, self.block_size)

    def stop(self, name: str, *, is_blended_anew: bool = False) -> None:
        """A request was preempted: it goes on in other blocks."""
        found = self._requests.get(name)
        if found is not None and (is_blended_anew or not found.exact):
            found.exact, found.why_not = False, found.why_not or PREEMPTED

    def report(self, name: str) -> dict[str, Any]:
        """What of a request was computed again; empty where that was not begun."""
        found = self._requests.get(name)
        if found is None:
            return {}
        return refined_so_far(found.tokens, exact=found.exact, why_not=found.why_not)

    def forget(self, name: str) -> None:
        """A request ended: what was not computed again stays as it is."""
        self._requests.pop(name, None)
