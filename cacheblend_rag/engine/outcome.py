"""What a blend was asked to do, and what it did: plain data between scheduler, ranks and report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from cacheblend_rag.plan import Plan, Segment


@dataclass(frozen=True)
class BlendTask:
    """One request's blend, from the scheduler to every rank.

    Attributes:
        request_id: vLLM's own; name: the caller's.
        token_ids: all tokens that the request has so far.
        question: token ids whose attention selects.
        blocks: numbers of the paged blocks that are allocated, the first positions' first.
        write_from: positions below it are in the cache already; prefix_cached: those that vLLM's
            prefix cache had when the request was first scheduled.
        computes: how many tokens are computed, if no chunk is missing.
        rows: how many of the last tokens vLLM's own steps compute; the blend says which tokens
            these really are. Fewer than ``computes`` where vLLM found more tokens in its cache than
            are there.
        planned: the scheduler's part of the report.
        proves: it is to show that blends are right; see ``proof.py``.
        number: of the request's blends, from 1 on. It is blended again after a preemption.
        adapter: vLLM's request for a LoRA adapter, if it has one.
        tables: where there are several KV cache groups, ``blocks`` of each, and 0 in the place of
            what is not kept; found: tokens that vLLM's prefix cache has, all groups together.
    """

    request_id: str
    name: str
    token_ids: tuple[int, ...]
    question: tuple[int, ...]
    plan: Plan
    blocks: tuple[int, ...]
    write_from: int
    computes: int
    rows: int
    prefix_cached: int = 0
    planned: Mapping[str, Any] = field(default_factory=dict)
    proves: bool = False
    number: int = 1
    adapter: Any = None
    tables: tuple[tuple[int, ...], ...] = ()
    found: int = 0

    @property
    def end(self) -> int:
        """One behind the last position."""
        return len(self.token_ids)

    def own_blocks(self, block_size: int) -> tuple[int, ...]:
        """Those of its blocks that no other request reads before it is whole."""
        return self.blocks[self.write_from // block_size :]

    @property
    def first_row(self) -> int:
        """The position of the first row as vLLM counts."""
        return self.end - self.rows


class Refine(NamedTuple):
    """Tokens of a request under way that are computed again, from the scheduler to the worker.

    Attributes:
        request_id: vLLM's own; name: the caller's.
        start: position of the first of ``token_ids``. All before it are exact.
        blocks: numbers of the request's paged blocks, the first positions' first.
        is_last: with these, all KV of the request is exact.
    """

    request_id: str
    name: str
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    is_last: bool


class Refined(NamedTuple):
    """What became of a ``Refine``, from the worker to the scheduler.

    Attributes:
        tokens: that were computed; seconds: that it took.
        step_s: seconds of a step without it; 0: not known.
        is_last: as in ``Refine``.
        failure: why it was not done; empty if it was.
    """

    tokens: int
    seconds: float
    step_s: float
    is_last: bool
    failure: str


class Clock:
    """Seconds a stage: by the host's clock, on a GPU by its own events, for which nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._before: dict[str, float] = {}
        self.mark()

    def add(self, stage: str, seconds: float) -> None:
        """``stage`` had begun elsewhere, and took so long there."""
        self._before[stage] = seconds

    def mark(self, stage: str = "") -> None:
        """The time since the mark before belongs to ``stage``; to none if it has no name."""
        if self._cuda:
            # A host's clock would tell when work was queued, and to wait for it would cost what is
            # measured.
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((stage, event))
        else:
            self._marks.append((stage, time.perf_counter()))

    def ready(self) -> bool:
        """Whether the GPU is past the last mark."""
        return not self._cuda or bool(self._marks[-1][1].query())

    def seconds(self) -> dict[str, float]:
        """By stage; waits for the last mark."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        total = dict(self._before)
        for (_, before), (stage, now) in zip(self._marks, self._marks[1:], strict=False):
            if stage:
                spent = before.elapsed_time(now) / 1e3 if self._cuda else now - before
                total[stage] = total.get(stage, 0.0) + spent
        return total


def gpu_seconds(run: Callable[[], object]) -> float:
    """The quickest of three runs of what ``run`` queues on the current stream; waits for it."""
    best = math.inf
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


@dataclass
class BlendOutcome:
    """What one rank did for one request.

    Attributes:
        segments: the plan's; missing: numbers of those whose chunk this engine did not have;
            timed_out: of those of them that the store may have, but not soon enough; unavailable:
            of those of them for which it could not be asked.
        prefix_cached: positions below it were in vLLM's prefix cache.
        planned: the scheduler's part of the report.
        bytes: of stored KV used.
        chosen: int64 positions computed, ascending, on the host; on a GPU they arrive there with
            the clock's last mark.
        refined: what was computed again since, as ``refined_so_far`` has it.
    """

    clock: Clock
    segments: Sequence[Segment]
    prefix_cached: int = 0
    planned: Mapping[str, Any] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    timed_out: list[int] = field(default_factory=list)
    unavailable: list[int] = field(default_factory=list)
    bytes: int = 0
    chosen: torch.Tensor | None = None
    refined: dict[str, Any] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether ``to_dict`` would not wait."""
        return self.clock.ready()

    def positions(self) -> list[int]:
        """The positions computed; waits for them."""
        self.clock.seconds()
        return [] if self.chosen is None else [int(p) for p in self.chosen]

    def to_dict(self) -> dict[str, Any]:
        """For the report: plain data; waits for the GPU."""
        seconds = self.clock.seconds()
        chosen = torch.zeros(0, dtype=torch.int64) if self.chosen is None else self.chosen
        bounds = torch.tensor([[s.start, s.end] for s in self.segments])
        # Chosen positions ascend: how many are within a segment is the distance of its two ends
        # among them.
        counts = torch.searchsorted(chosen, bounds).diff(dim=1).flatten().tolist()
        reused = [bool(s.key) and i not in self.missing for i, s in enumerate(self.segments)]
        gone = [i for i in self.missing if i not in self.timed_out and i not in self.unavailable]
        return {
            "recomputed": [n if kept else 0 for n, kept in zip(counts, reused, strict=True)],
            "prefix_cached": self.prefix_cached,
            "missing": self.missing,
            "timed_out": self.timed_out,
            "unavailable": self.unavailable,
            "seconds": seconds,
            "bytes": self.bytes,
            "lost": [self.segments[i].key for i in gone],
            "refined": self.refined,
        }

    def report(self) -> dict[str, Any]:
        """``to_dict`` with the scheduler's part."""
        done = self.to_dict()
        seconds = {**self.planned.get("seconds", {}), **done["seconds"]}
        return {**self.planned, **done, "seconds": seconds}
