"""Refinement: a blend's tokens are computed again while its answer is generated. The worker's side,
which computes them.

It is a plain prefill of our own over the request's own blocks, by the backend's kernels, before the
model runs. What the step's rows read is so written before they run, in the same thread and stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from vllm.logger import init_logger

from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.exact import compute
from cacheblend_rag.engine.outcome import BlendOutcome, Clock, Refine, Refined
from cacheblend_rag.engine.refinement import refined_so_far

logger = init_logger("vllm.cacheblend_rag")


class Timer(Protocol):
    """What is used of ``worker_state.StepTimer``."""

    def exclude(self, seconds: float) -> None:
        """This was spent on something else than a step."""

    def to_plain(self) -> dict[str, float]:
        """``step_s`` of a recent step among it, and ``interleaved_s``; 0 where none is known."""


class Refiner:
    """Computes tokens again, and says what came of it."""

    def __init__(self, cache: PagedCache, timer: Timer) -> None:
        self._cache, self._timer = cache, timer
        self._most_rows = int(cache.handle.config.scheduler_config.max_num_batched_tokens)
        self._done: list[tuple[Refine, Clock, str]] = []  # not yet reported
        self._failed: dict[str, str] = {}  # requests, and why

    def run(self, refine: Refine, outcome: BlendOutcome | None) -> None:
        """Called before the model runs. ``outcome``: of the request's blend, for its report."""
        clock, name = Clock(self._cache.handle.device), refine.request_id
        # What comes behind tokens that were not computed is not exact: the scheduler may have
        # handed it on before it heard of them.
        if name not in self._failed:
            try:
                compute(self._cache, refine.token_ids, refine.start, refine.blocks, self._most_rows)
            # Of whatever kind: the answer goes on with the KV that is there, in each layer either
            # the blend's or exact.
            except Exception as error:
                logger.exception("%s is not refined any further", name)
                self._failed[name] = (
                    f"computing tokens again failed: {type(error).__name__}: {error}"
                )
        failure = self._failed.get(name, "")
        clock.mark("refine")
        self._done.append((refine, clock, failure))
        if outcome is not None:
            tokens = int(outcome.refined.get("tokens", 0)) + len(refine.token_ids) * (not failure)
            exact = refine.is_last and not failure
            outcome.refined = refined_so_far(tokens, exact=exact, why_not=failure)

    def done(self) -> list[tuple[str, Refined]]:
        """What was computed since the call before, as far as its time is known, and of which
        requests.
        """
        ready, self._done = (
            [d for d in self._done if d[1].ready()],
            [d for d in self._done if not d[1].ready()],
        )
        done = []
        for refine, clock, failure in ready:
            seconds = clock.seconds()["refine"]
            # Or the pace would be measured by steps that it made longer itself.
            self._timer.exclude(seconds)
            timer = self._timer.to_plain()
            step_s = timer["interleaved_s"] or timer["step_s"]
            tokens = len(refine.token_ids)
            refined = Refined(tokens, seconds, step_s, refine.is_last, failure)
            done.append((refine.request_id, refined))
        return done

    def forget(self, names: Iterable[str]) -> None:
        """Requests that ended."""
        for name in names:
            self._failed.pop(name, None)
