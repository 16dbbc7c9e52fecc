"""One blend, on one rank: load, re-rotate, choose what vLLM's own steps compute.

Shape legend: E tokens of the request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np
import torch

from cacheblend_rag.costs import Costs
from cacheblend_rag.engine.executor import FIRST_TOKENS, BlendExecutor, Loaded, Region
from cacheblend_rag.engine.executors import ExecutorFactory
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.outcome import BlendOutcome, BlendTask
from cacheblend_rag.engine.proof import Proof
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.engine.upload import Array, upload, upload_all
from cacheblend_rag.plan import Kind, Plan, Segment
from cacheblend_rag.reason import Reason, RefusedError, Why
from cacheblend_rag.select import (
    Evidence,
    KVDeviation,
    QuestionAttention,
    Selector,
    create_selector,
)
from cacheblend_rag.store.base import ChunkKV, KVStore
from cacheblend_rag.undo import on_failure

_PATIENCE_S = 10.0  # with the store, where it was not measured what a prefill takes


class FromStore(NamedTuple):
    """What a plan's chunks came to, on this rank."""

    refusal: Why | None  # of the whole blend
    chunks: Mapping[str, ChunkKV | None]  # by key
    timed_out: AbstractSet[str] = frozenset()  # keys of those that missed the deadline
    unavailable: AbstractSet[str] = frozenset()  # keys for which the store could not be asked
    seconds: float = 0.0  # that this took


class Positions:
    """int64 positions on the device, and a copy on the host that is on its way from the start: the
    step needs both, and what is queued behind them meanwhile may take a while.
    """

    def __init__(
        self,
        device: torch.Tensor,
        host: torch.Tensor | None = None,
        arrived: torch.cuda.Event | None = None,
    ) -> None:
        self.device, self.host, self._arrived = device, device, arrived
        if host is not None:
            self.host = host
        elif device.is_cuda:
            self.host = torch.empty(device.shape, dtype=device.dtype, pin_memory=True)
            self.host.copy_(device, non_blocking=True)
            self._arrived = torch.cuda.current_stream(device.device).record_event()

    def __len__(self) -> int:
        return len(self.device)

    def __getitem__(self, some: slice) -> Positions:
        return Positions(self.device[some], self.host[some], self._arrived)

    def numpy(self) -> Array:
        """On the host; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self.host.numpy()


class Choice(NamedTuple):
    """The executor of a request, and the positions that are computed, ascending, the last tokens of
    the request among them.
    """

    executor: BlendExecutor
    positions: Positions
    proof: Proof | None = None


class Blender:
    """Decides on one rank what a request's rows are. All ranks of a tensor parallel group take the
    same steps.

    ``executors`` makes a request's executor: how things are done on this device.
    """

    def __init__(
        self,
        handle: ModelHandle,
        rope: Rerotator,
        store: KVStore,
        executors: ExecutorFactory,
    ) -> None:
        self.handle, self.rope, self.store, self._executors = handle, rope, store, executors
        self.costs: Costs | None = None  # set once they are measured
        self._most_rows = int(handle.config.scheduler_config.max_num_batched_tokens)
        self._fetched: dict[str, FromStore] = {}  # by a request's id

    def stage(self, request_id: str, plan: Plan) -> bool:
        """Begin to bring the KV of the blend that comes next, if it can be had at once: vLLM's own
        preparation of the step takes as long as a good part of that. Returns whether it could.
        """
        # In the scheduler's thread: so only what is in memory, or other requests would wait for a
        # disk.
        if not self.is_fast(plan):
            return False
        found = self._fetch(plan, set())  # all is in memory: nothing to consider
        self._fetched[request_id] = found
        chunks = {key: chunk for key, chunk in found.chunks.items() if chunk}
        self._executors.stage(chunks, self._deciding_layers(plan))
        return True

    def unstage(self) -> None:
        """The blend that was expected next does not come."""
        self._executors.unstage()

    def _deciding_layers(self, plan: Plan) -> range:
        """The layers whose KV decides which tokens are computed. Where none does, the lower half:
        what comes behind it is in time later.
        """
        if 0 < plan.ratio < 1:
            wanted = create_selector(plan.selector, plan.selector_options).evidence
            if isinstance(wanted, QuestionAttention):
                return wanted.among(self.handle.sees_all).reading
            if isinstance(wanted, KVDeviation):
                check = self._check(wanted)
                return range(check, check + 1)
        return range(-(-self.handle.num_layers // 2))

    def _check(self, wanted: KVDeviation) -> int:
        """The layer where the deviation is measured."""
        return min(wanted.layer, self.handle.num_layers - 1)

    def is_fast(self, plan: Plan) -> bool:
        """Whether all chunks are in memory."""
        keys = {s.key for s in plan.segments if s.key}
        return all(
            self._executors.resident(key) is not None or self.store.in_memory(key) for key in keys
        )

    def fetch(self, request_id: str, plan: Plan) -> None:
        """Bring what the blend needs to memory, from any thread, before it is asked for."""
        self._fetched[request_id] = self._load(plan)

    def refusal(self, request_id: str) -> Why | None:
        """Why a blend is not worth it, now that its chunks were fetched; None if it is."""
        found = self._fetched.get(request_id)
        return found.refusal if found is not None else None

    def forget(self, request_id: str) -> None:
        """The request will not be blended after all."""
        self._fetched.pop(request_id, None)

    def choose(self, task: BlendTask, outcome: BlendOutcome) -> Choice:
        """Load a request's chunks and choose what is computed: what has no stored KV, and of the
        rest as many tokens as the plan's ratio says; ``outcome`` is filled in.

        Raises:
            RefusedError: some rank's store is so slow that a plain prefill is as quick.
        """
        found = self._fetched.pop(task.request_id, None)
        # What was brought ahead is of no use where this fails before an executor has it.
        with on_failure(self._executors.unstage):
            executor, proof = self._opened(task, outcome, found)
        # A failure from here on leaves a transfer under way, which only its executor can give up.
        with on_failure(executor.give_up):
            return Choice(executor, self._choose(executor, task, outcome), proof)

    def _opened(
        self, task: BlendTask, outcome: BlendOutcome, found: FromStore | None
    ) -> tuple[BlendExecutor, Proof | None]:
        """The executor of a request, over its chunks; or over its own KV, which it is to prove.

        Raises:
            RefusedError: see ``choose``.
        """
        # The same path with the prompt's own KV in the place of stored KV: what a proof shows is
        # true of every blend that follows.
        proof: Proof | None = None
        if task.proves and task.first_row > task.write_from:  # else its rows are all tokens
            proof = Proof(self.handle, task.token_ids, self._most_rows)
            loaded = [
                Loaded(s.start, s.end, s.start, proof.key, proof.chunk)
                for s in task.plan.segments
                if s.key
            ]
        else:
            if found is not None:  # while others ran, but this request waited for it
                outcome.clock.add("fetch", found.seconds)
            loaded = self._fitting(task, outcome, found or self._load(task.plan))
        outcome.clock.mark("fetch")
        region = Region(task, loaded)
        outcome.bytes = region.bytes
        return self._executors(region, self._deciding_layers(task.plan)), proof

    def _choose(self, executor: BlendExecutor, task: BlendTask, outcome: BlendOutcome) -> Positions:
        clock, plan, device = outcome.clock, task.plan, self.handle.device
        must_E, candidate_E = _duties(task, executor.region.stored_E, outcome.missing)
        num_must, num_candidates = int(must_E.sum()), int(candidate_E.sum())
        # ``computes`` was claimed while all chunks were believed to be there. Tokens of chunks that
        # are missing use up the budget first, so a blend takes no longer for them while the budget
        # lasts.
        budget = min(max(task.computes - num_must, 0), num_candidates)
        clock.mark("load")
        if 0 < budget < num_candidates:
            selector = create_selector(plan.selector, plan.selector_options)
            evidence = self._gather(executor, task, selector.evidence)
            # Behind the question, which a GPU can begin without these.
            must, candidate = upload_all([must_E.nonzero()[0], candidate_E], device)
            picked = _pick(selector, executor, candidate, budget, *evidence)
            positions = torch.cat([must, picked]).sort().values
            if plan.propagation_length:
                executor.correct(candidate, positions, plan.propagation_length)
        else:
            computed_E = must_E | candidate_E if budget else must_E
            positions = upload(computed_E.nonzero()[0], device)
        chosen = Positions(positions)
        clock.mark("select")
        # These come after the last segment: the report counts by segments.
        behind = task.end - max(plan.end, task.write_from)  # of no segment
        outcome.chosen = chosen[: len(chosen) - behind].host
        return chosen

    def recompute(self, executor: BlendExecutor, positions: torch.Tensor) -> None:
        """Compute tokens in forwards of our own, whatever becomes of the others."""
        for tile in positions.split(self._most_rows):
            executor.recompute(tile)

    def _gather(
        self,
        executor: BlendExecutor,
        task: BlendTask,
        wanted: QuestionAttention | KVDeviation | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What a selector wants to know of each token, float32 [E]: the question's attention and
        the deviation of its KV.
        """
        # Each rank has some of the heads. Without the sum, ranks would choose different tokens, and
        # from then on each would compute another prompt.
        if isinstance(wanted, QuestionAttention):
            layers = wanted.among(self.handle.sees_all)
            room = self._most_rows - len(task.question) - FIRST_TOKENS
            return self.handle.ranks.sum(executor.ask(task.question, layers, room)), None
        if isinstance(wanted, KVDeviation):
            check = self._check(wanted)
            deviation_E = executor.deviation(check, wanted.values, self._most_rows)
            return None, self.handle.ranks.sum(deviation_E)
        return None, None

    def _fitting(self, task: BlendTask, outcome: BlendOutcome, found: FromStore) -> list[Loaded]:
        """The stored chunks of a plan. One that is absent, damaged, not what the prompt says or
        not there in time on any rank is missing on all: its tokens are computed afresh. What one
        rank knows to be gone is gone, whatever keeps the others from asking.

        Raises:
            RefusedError: some rank's store is so slow that a plain prefill is as quick.
        """
        refusal, chunks, timed_out, unavailable, _ = found
        segments = task.plan.segments
        unused = [
            bool(s.key) and not self._fits(chunks.get(s.key), s, task.token_ids) for s in segments
        ]
        away, is_timed_out = timed_out | unavailable, [s.key in timed_out for s in segments]
        is_gone = [gone and s.key not in away for gone, s in zip(unused, segments, strict=True)]
        # One vote on everything: a second collective would be one more place at which ranks can
        # part.
        votes = self.handle.ranks.any([*unused, *is_gone, *is_timed_out, bool(refusal)])
        if votes[-1]:
            too_slow = Why(Reason.PREFILL_AS_QUICK, "another rank's store is too slow")
            raise RefusedError(*(refusal or too_slow))
        n = len(segments)
        unused, is_gone, is_timed_out = votes[:n], votes[n : 2 * n], votes[2 * n : -1]
        outcome.missing = [i for i in range(n) if unused[i]]
        outcome.timed_out = [i for i in outcome.missing if is_timed_out[i] and not is_gone[i]]
        outcome.unavailable = [i for i in outcome.missing if not (is_timed_out[i] or is_gone[i])]
        return [
            Loaded(s.start, s.end, s.offset, s.key, chunk)
            for s, is_unused in zip(segments, unused, strict=True)
            if s.key and not is_unused and (chunk := chunks[s.key]) is not None
        ]

    def _load(self, plan: Plan) -> FromStore:
        """The chunks of a plan, unless it is not worth it on this rank."""
        refusal, slow = self.consider(plan)
        return FromStore(refusal, {}, slow) if refusal else self._fetch(plan, slow)

    def _fetch(self, plan: Plan, slow: set[str]) -> FromStore:
        """The chunks of ``plan`` that are not ``slow`` and come within the time of a prefill."""
        start, patience_s = time.perf_counter(), _PATIENCE_S
        if self.costs is not None and plan.blend_if == "faster":
            patience_s = self.costs.prefill(plan)
        keys = dict.fromkeys(s.key for s in plan.segments if s.key)
        fast = [key for key in keys if key not in slow]
        resident = {
            key: chunk for key in fast if (chunk := self._executors.resident(key)) is not None
        }
        # Chunks in GPU memory are not read from the store, which would then evict them as unused.
        for key in resident:
            self.store.touch(key)  # it is in use
        wanted = [key for key in fast if key not in resident]
        found = self.store.get_in_time(wanted, patience_s)
        chunks = {**resident, **dict(zip(wanted, found.chunks, strict=True))}
        took = time.perf_counter() - start
        return FromStore(None, chunks, found.timed_out | slow, found.unavailable, took)

    def consider(self, plan: Plan) -> tuple[Why | None, set[str]]:
        """Why a plan is not worth it, now that the store says what is not in memory; None if it is.
        And the chunks that take longer to fetch than to compute. What is not waited for is brought
        to memory for the next one who asks.
        """
        refusal, slow = None, set[str]()
        if self.costs is not None and plan.blend_if == "faster":
            fetch_s = self._fetch_seconds(plan)
            if fetch_s:
                refusal, slow = (
                    self.costs.refusal(plan, fetch_s),
                    self.costs.too_slow(plan, fetch_s),
                )
                # This request goes on without them, so somebody has to bring them nearer, or every
                # request would.
                self.store.prefetch(fetch_s if refusal else slow)
        return refusal, slow

    def _fetch_seconds(self, plan: Plan) -> dict[str, float]:
        """How long the store will take, by its recent speed, for each chunk not in memory."""
        bandwidth = self.store.bandwidth
        if bandwidth is None:
            return {}
        # An estimate by the plan: to ask the store for exact sizes would take what is to be
        # foreseen.
        size = self.handle.config.model_config.dtype.itemsize
        a_token = math.prod(self.handle.layout.shape(self.handle.num_layers, 1)) * size
        return {
            s.key: (s.offset + len(s)) * a_token / bandwidth
            for s in plan.segments
            if s.key and self._executors.resident(s.key) is None and not self.store.in_memory(s.key)
        }

    def _fits(self, chunk: ChunkKV | None, s: Segment, token_ids: Sequence[int]) -> bool:
        """Whether ``chunk`` really holds the tokens of segment ``s``, in this model's shape."""
        if chunk is None:
            return False
        # A key is a hash of much, and a store is data from elsewhere. The token ids decide: KV of
        # other tokens would give a wrong answer that nothing else notices.
        shape = self.handle.layout.shape(self.handle.num_layers, len(chunk.token_ids))
        stored = chunk.token_ids[s.offset : s.offset + len(s)]
        return (
            tuple(chunk.kv_L2NHD.shape) == shape
            and chunk.kv_L2NHD.dtype == self.handle.config.model_config.dtype
            and 0 <= chunk.base <= self.rope.positions - len(chunk.token_ids)
            and stored == tuple(token_ids[s.start : s.end])
        )


def rows_of(plan: Plan, num_tokens: int, write_from: int) -> int:
    """How many tokens of a request a blend computes, if no chunk of it is missing: those without
    stored KV, and the selector's budget. A head-cut segment's tokens count twice, capped so that
    the ratio stays a share.
    """
    must = num_tokens - max(plan.end, write_from)
    candidates, weighted = 0, 0.0
    twice = min(2.0, 1.0 / plan.ratio) if plan.ratio else 0.0
    for s in plan.segments:
        new = s.end - max(s.start, min(write_from, s.end))
        if s.kind is Kind.FRESH:
            must += new
        elif s.kind is not Kind.EXACT:
            candidates += new
            weighted += new * (twice if s.kind is Kind.LEFT_TRUNCATED else 1.0)
    # The scheduler counts here, before anything is loaded, and vLLM can't change the number of rows
    # afterwards. So the worker fills what a selector leaves of its budget with other candidates.
    selector = create_selector(plan.selector, plan.selector_options)
    return must + min(selector.budget(plan.ratio, weighted), candidates)


def _pick(
    selector: Selector,
    executor: BlendExecutor,
    candidate_E: torch.Tensor,
    budget: int,
    question_E: torch.Tensor | None,
    deviation_E: torch.Tensor | None,
) -> torch.Tensor:
    """The ``budget`` candidates that a selector wants most."""
    evidence = Evidence(
        candidate_E, executor.offset_E, executor.ids_E, question_E, deviation_E, budget
    )
    picked = selector.choose(evidence, selector.score(evidence))
    if len(picked) < budget:  # the rows are there: they are used
        others = candidate_E.index_fill(0, picked, False).nonzero().flatten()
        picked = torch.cat([picked, others[: budget - len(picked)]])
    return picked


def _duties(task: BlendTask, stored_E: Array, missing: Sequence[int]) -> tuple[Array, Array]:
    """Which tokens must be computed, and which may be (bool [E]). Tokens below ``write_from`` are
    neither, nor are those of exact segments.
    """
    must = ~stored_E
    must[: task.write_from] = False
    candidate = np.zeros_like(stored_E)
    for i, s in enumerate(task.plan.segments):
        if s.kind in (Kind.REUSE, Kind.LEFT_TRUNCATED) and i not in missing:
            candidate[max(s.start, min(task.write_from, s.end)) : s.end] = True
    return must, candidate
