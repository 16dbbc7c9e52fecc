"""Blends under way on a rank, however their tokens are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from cacheblend_rag.engine.blend import Blender
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.outcome import BlendOutcome, BlendTask
from cacheblend_rag.reason import Reason, Why

_KEEP_CAUSES = 1024


class Scheduled(NamedTuple):
    """A request of a step.

    Attributes:
        computed: tokens computed before; rows: in the step; blocks: that are new.
        drafts: how many of the last rows are guesses of what comes behind the request's tokens.
            vLLM adds such rows to a request of which all but one token are there, too.
    """

    computed: int
    rows: int
    blocks: tuple[int, ...] = ()
    drafts: int = 0

    @property
    def known(self) -> int:
        """Rows that are tokens of the request."""
        return self.rows - self.drafts


class Finished(NamedTuple):
    """A blend whose last row is under way; ``why_not``: it was computed exactly instead; ``number``
    as in ``BlendTask``.
    """

    request_id: str
    name: str
    outcome: BlendOutcome
    why_not: Why | None
    number: int = 1

    def result(self) -> dict[str, Any]:
        """For the scheduler, of what was blended; waits for the GPU."""
        return {**self.outcome.to_dict(), "number": self.number}

    def report(self) -> dict[str, Any]:
        """Of what was not blended."""
        why_not = self.why_not._asdict() if self.why_not is not None else {}
        return {
            **self.outcome.planned,
            **why_not,
            "prefix_cached": self.outcome.prefix_cached,
        }


class Blends(ABC):
    """Blends under way on this rank. All ranks of a tensor parallel group take the same steps.

    Attributes:
        blender: what decides; None until the worker is bound.
        proved: takes what a proof came to: None if blends are right.
        causes: why requests could not be computed, by the callers' names.
    """

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self.blender: Blender | None = None
        self.proved: Callable[[Why | None], object] = lambda why_not: None
        self.causes: OrderedDict[str, str] = OrderedDict()

    @abstractmethod
    def begin_ahead(self, task: BlendTask) -> None:
        """Begin a blend of the step that the scheduler is still building, in this very process,
        where that helps.
        """

    @abstractmethod
    def begin_step(self, tasks: Mapping[str, BlendTask], batch: Mapping[str, Scheduled]) -> None:
        """Called before the model runs.

        Args:
            tasks: blends that begin with this step, by request.
            batch: all requests of a step in which a blend has rows; else empty.
        """

    @abstractmethod
    def lost(self) -> dict[str, set[int]]:
        """Requests that could not be computed since the call before, and their own blocks."""

    @abstractmethod
    def prove(self) -> None:
        """Called behind the model's forward: judge the blends that were to prove something."""

    @abstractmethod
    def finished(self) -> list[Finished]:
        """Blends whose last row was in a step since the call before."""

    @abstractmethod
    def forget(self, names: Iterable[str]) -> None:
        """Requests that ended, or were preempted."""

    def loaded(self) -> tuple[set[str], set[str]]:
        """Requests that vLLM has held back until their KV was there, since the call before: all of
        them, and those of which it could not be had.
        """
        return set(), set()

    def _remember(self, name: str, cause: str) -> None:
        self.causes[name] = cause
        while len(self.causes) > _KEEP_CAUSES:
            self.causes.popitem(last=False)


def why_failed(task: BlendTask, error: Exception) -> Why:
    """Why a request is computed exactly whose blend has met an error."""
    cached = max(task.write_from, task.found)  # one of them is 0
    behind = f" after {cached} cached tokens" if cached else ""
    detail = f"blending failed, computed exactly{behind}: {type(error).__name__}: {error}"
    return Why(Reason.BLEND_FAILED, detail)
