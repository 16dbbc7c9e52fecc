"""When a blend is not worth its fixed costs: then a plain prefill is exact and quicker."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from cacheblend_rag.plan import Plan

_MARGIN = 0.97  # of the plain prefill's time; a blend predicted above it is not worth its error


class Costs(NamedTuple):
    """Seconds, measured where the model runs.

    Attributes:
        prefill_s: a token of a plain prefill.
        recompute_s: a token of a selective pass.
        load_s: a token's KV from host memory.
        blend_s: a blend's passes whatever their size, the host's work included.
    """

    prefill_s: float
    recompute_s: float
    load_s: float
    blend_s: float

    def refusal(self, plan: Plan) -> str:
        """Why ``plan`` is not worth it; empty if it is.

        Loading runs beside computing, so the longer of the two counts.
        """
        reused = sum(len(s) for s in plan.segments if s.key)
        fresh = plan.end - reused
        computed = fresh + plan.ratio * reused
        blended = self.blend_s + max(self.load_s * reused, self.recompute_s * computed)
        plain = self.prefill_s * plan.end
        if blended < _MARGIN * plain:
            return ""
        return (
            f"a plain prefill is as quick here: {1e3 * plain:.1f} ms predicted for {plan.end} "
            f"tokens, a blend {1e3 * blended:.1f} ms (when='always' blends all the same)"
        )
