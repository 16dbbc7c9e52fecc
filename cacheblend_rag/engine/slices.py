"""Ingestion in slices: a forward of which some is computed between two steps of the engine.

vLLM's ``model.forward`` is one call. So it runs in a thread of its own, which waits where its
budget of parts is spent. A layer has two: its attention, and all from there to the next one's. Only
one of this thread and the engine's runs at a time. All ranks get the same budgets, so collectives
keep their order. The result is that of ``Ingestor.compute``, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Condition
from typing import Any, Generic, TypeVar

import torch
from vllm.forward_context import override_forward_context

from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.ingest import Ingestor
from cacheblend_rag.errors import EngineError
from cacheblend_rag.store.base import ChunkKV
from cacheblend_rag.store.part import Heads

_T = TypeVar("_T")


class _Dropped(BaseException):
    """Nobody wants what is being computed. Not an Exception: a guarded pass would keep it."""


class PartBudget:
    """How many parts the forward may compute; the engine's thread waits meanwhile."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._parts = 0  # that the forward may still compute
        self._ended, self._dropped = True, False

    def begin(self) -> None:
        """There is a forward, which waits for its first parts."""
        self._ended = self._dropped = False

    def grant(self, parts: int) -> bool:
        """Let the forward compute so many parts, and wait for it; returns whether it ended."""
        with self._changed:
            self._parts = parts
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._parts or self._ended)
            return self._ended

    def cancel(self) -> None:
        """End the forward where it is."""
        with self._changed:
            self._dropped = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended)

    def await_parts(self) -> None:
        """In the forward's thread: wait until there are parts to compute."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._dropped)

    def spend(self) -> None:
        """In the forward's thread, before each part: waits where the budget is spent."""
        with self._changed:
            if not self._parts and not self._dropped:
                self._changed.notify_all()
                # vLLM keeps its forward context in a global. Left in place, the engine's next step
                # would run with that of this thread.
                with override_forward_context(None):  # the engine's steps have their own
                    self._changed.wait_for(lambda: self._parts or self._dropped)
            if self._dropped:
                # The forward ends by its own unwinding, which leaves the model as it was; a thread
                # can't be killed.
                raise _Dropped
            self._parts -= 1

    def end(self) -> None:
        """In the forward's thread: it is over."""
        with self._changed:
            self._ended, self._parts = True, 0
            self._changed.notify_all()


class BudgetedPass(Pass):
    """A pass that asks its budget before and behind every attention."""

    def __init__(self, step: Pass, budget: PartBudget, resumed: Callable[[], None]) -> None:
        self._step, self._budget, self.last, self._resumed = step, budget, step.last, resumed

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        self._spend()
        self._step.attend(index, layer, q_THD, k_TGD, v_TGD, out_THD)
        self._spend()

    def _spend(self) -> None:
        self._budget.spend()
        self._resumed()


class _BudgetedIngestor(Ingestor):
    """Whose every part asks the budget."""

    def __init__(self, handle: ModelHandle, heads: Heads | None, budget: PartBudget) -> None:
        super().__init__(handle, heads)
        self._budget = budget

    def _run(self, step: Pass, ids: Sequence[int], positions: Sequence[int]) -> None:
        resumed = self._handle.adapters.renew
        super()._run(BudgetedPass(step, self._budget, resumed), ids, positions)


class SlicedWork(Generic[_T]):
    """One piece of work at a time, in a thread of its own, which goes on slice by slice.

    Attributes:
        seconds: what the last slice took.
    """

    def __init__(self, device: torch.device, name: str) -> None:
        self.budget = PartBudget()
        self._device, self._thread = device, DaemonPool(1, name)
        self._result: Future[_T] | None = None
        self.seconds = 0.0

    @property
    def is_begun(self) -> bool:
        """Whether there is work whose result was not taken."""
        return self._result is not None

    def begin(self, work: Callable[[], _T]) -> None:
        """Have ``work`` done by the next calls of ``go_on``; what was begun before is dropped. It
        spends ``budget`` before each of its parts.
        """
        if self._result is not None:
            self.budget.cancel()
        self.budget.begin()
        self._result = self._thread.submit(self._in_thread(work))

    def go_on(self, parts: int) -> bool:
        """Do so many parts; returns whether all is done."""
        start = time.perf_counter()
        done = self.budget.grant(parts)
        if self._device.type == "cuda":
            # Or the next step would queue behind the slice's kernels, and the slice's time would be
            # that of queueing them.
            torch.cuda.current_stream().synchronize()
        self.seconds = time.perf_counter() - start
        return done

    def take(self) -> _T:
        """The result; raises what the work raised."""
        assert self._result is not None
        result, self._result = self._result, None
        return result.result()

    def _in_thread(self, work: Callable[[], _T]) -> Callable[[], _T]:
        """``work`` for the other thread, with the settings and the stream of this one."""
        # Both are properties of a thread in PyTorch. With another number of threads, matrix
        # products on a CPU are summed in another order, and a slice would no longer equal the
        # whole, bit for bit.
        threads, stream = torch.get_num_threads(), self._stream()

        def run() -> _T:
            try:
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
                self.budget.await_parts()
                with _on(stream), torch.inference_mode():
                    return work()
            # Whatever happened, or the engine's thread would wait for ever.
            finally:
                self.budget.end()

        return run

    def _stream(self) -> Any:
        return torch.cuda.current_stream() if self._device.type == "cuda" else None


class SlicedIngestor:
    """Computes the chunks of one ingestion at a time.

    Attributes:
        learnt: nobody asked for these chunks.
    """

    def __init__(self, handle: ModelHandle, heads: Heads | None = None) -> None:
        self._work = SlicedWork[list[ChunkKV]](handle.device, "cacheblend-ingest")
        self._ingestor = _BudgetedIngestor(handle, heads, self._work.budget)
        self._name, self._keys = "", list[str]()
        self.learnt = False

    @property
    def seconds(self) -> float:
        """What the last slice took."""
        return self._work.seconds

    def begin(
        self,
        name: str,
        keys: Sequence[str],
        chunks: Sequence[Sequence[int]],
        prefix_ids: Sequence[int],
        contexts: Sequence[Sequence[int]],
        *,
        learnt: bool = False,
    ) -> None:
        """Have these chunks computed by the next calls of ``go_on`` with this ``name``; what was
        begun before is dropped.
        """
        self._work.begin(lambda: self._ingestor.compute(chunks, prefix_ids, contexts))
        self._name, self._keys, self.learnt = name, list(keys), learnt

    def go_on(self, name: str, parts: int) -> bool:
        """Compute so many parts; returns whether all is done.

        Raises:
            EngineError: nothing of that name is under way.
        """
        if not self._work.is_begun or name != self._name:
            raise EngineError("another ingestion took the place of this one; begin it again")
        return self._work.go_on(parts)

    def take(self) -> tuple[list[str], list[ChunkKV]]:
        """Keys and chunks; raises what computing them raised."""
        return self._keys, self._work.take()


@contextmanager
def _on(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
