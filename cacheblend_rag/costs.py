"""When a blend is not worth its fixed costs: then a plain prefill is exact and quicker."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from cacheblend_rag.plan import Plan
from cacheblend_rag.reason import Reason, Why

_MARGIN = 0.85  # of the plain prefill's time; predictions of short prompts are off by as much
_ALL_IN_MEMORY: Mapping[str, float] = MappingProxyType({})


class Costs(NamedTuple):
    """Seconds, measured where the model runs.

    Attributes:
        prefill_s: a token of a plain prefill.
        recompute_s: a token of a selective pass; at least as long as in a plain prefill.
        load_s: a token's KV from host memory.
        blend_s: all of a blend that does not grow with it, the host's work and the engine's own
            step behind it included.
        context_s: a token of what a blend covers, where all else of a blend grows with it: as
            without our kernels.
    """

    prefill_s: float
    recompute_s: float
    load_s: float
    blend_s: float
    context_s: float = 0.0

    def prefill(self, plan: Plan) -> float:
        """Seconds of a plain prefill of what ``plan`` covers."""
        return self.prefill_s * plan.end

    def too_slow(self, plan: Plan, fetch_s: Mapping[str, float]) -> set[str]:
        """Chunks that take longer to fetch than their tokens to compute.

        Args:
            fetch_s: seconds until a disk or a network has brought a chunk to host memory, by key;
                chunks that are there already are left out.
        """
        saved = dict.fromkeys(fetch_s, 0.0)
        for s in plan.segments:
            if s.key in saved:
                saved[s.key] += self.recompute_s * len(s) * (1 - plan.ratio)
        return {key for key, seconds in fetch_s.items() if seconds >= saved[key]}

    def blend(self, plan: Plan, fetch_s: Mapping[str, float] = _ALL_IN_MEMORY) -> float:
        """Seconds of blending ``plan``.

        Copying from host memory overlaps with computing, so the longer of the two counts; fetching
        comes before both.
        """
        left_out = self.too_slow(plan, fetch_s)
        reused = sum(len(s) for s in plan.segments if s.key and s.key not in left_out)
        fetched = sum(seconds for key, seconds in fetch_s.items() if key not in left_out)
        computed = plan.end - reused + plan.ratio * reused
        least = self._least(plan.end)
        return least + fetched + max(self.load_s * reused, self.recompute_s * computed)

    def _least(self, tokens: int) -> float:
        """Seconds of any blend that covers so many tokens."""
        return self.blend_s + self.context_s * tokens

    def corrected(self, plan: Plan, plain_s: float, blended_s: float) -> Costs:
        """With ``blend_s``, or ``context_s`` where that counts, such that the difference is right
        that was measured for ``plan``, from end to end.
        """
        predicted = self.blend(plan) - self.prefill(plan)
        if self.context_s:
            more = (blended_s - plain_s - predicted) / plan.end
            return self._replace(context_s=max(0.0, self.context_s + more))
        return self._replace(blend_s=max(0.0, self.blend_s + blended_s - plain_s - predicted))

    def too_short(self, tokens: int) -> Why | None:
        """Why no plan of a prompt of so many tokens is worth it; None if one may be."""
        plain, blended = self.prefill_s * tokens, self._least(tokens)
        if blended < _MARGIN * plain:
            return None
        return Why(
            Reason.PREFILL_AS_QUICK,
            f"a plain prefill is as quick here, whatever is stored: {1e3 * plain:.1f} ms predicted "
            f"for {tokens} tokens, a blend {1e3 * blended:.1f} ms at least (blend_if='always' "
            "blends all the same)",
        )

    def refusal(self, plan: Plan, fetch_s: Mapping[str, float] = _ALL_IN_MEMORY) -> Why | None:
        """Why ``plan`` is not worth it; None if it is. ``fetch_s`` is that of ``too_slow``."""
        blended, plain = self.blend(plan, fetch_s), self.prefill(plan)
        if blended < _MARGIN * plain:
            return None
        slow = ""
        if fetch_s:
            wait = 1e3 * sum(fetch_s.values())
            slow = f"; {len(fetch_s)} chunks are not in memory, fetching them takes {wait:.0f} ms"
        return Why(
            Reason.PREFILL_AS_QUICK,
            f"a plain prefill is as quick here: {1e3 * plain:.1f} ms predicted for {plan.end} "
            f"tokens, a blend {1e3 * blended:.1f} ms{slow} (blend_if='always' blends all the same)",
        )
