"""One blend, on one rank: load, re-rotate, select, recompute, all into the paged cache.

Shape legend: E tokens of the blended region.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from cacheblend_rag.costs import Costs
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.lane import Array, Lane, Loaded, Region, upload
from cacheblend_rag.engine.lanes import Lanes
from cacheblend_rag.engine.outcome import WAITS, BlendOutcome, BlendTask, Clock
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.plan import Kind, Plan, Segment
from cacheblend_rag.reason import Reason, RefusedError, Why
from cacheblend_rag.select import Evidence, KVDeviation, QuestionAttention, create_selector
from cacheblend_rag.store.base import ChunkKV, KVStore

_PATIENCE_S = 10.0  # with the store, where it was not measured what a prefill takes


class _FromStore(NamedTuple):
    """What a plan's chunks came to, on this rank."""

    refusal: Why | None  # of the whole blend
    chunks: Mapping[str, ChunkKV | None]  # by key
    late: AbstractSet[str] = frozenset()  # keys of those that come too late
    unavailable: AbstractSet[str] = frozenset()  # keys for which the store could not be asked


class Blender:
    """Blends requests on one rank. All ranks of a tensor parallel group take the same steps.

    ``lanes`` makes a request's lane: how things are done on this device.
    """

    def __init__(
        self,
        handle: ModelHandle,
        rope: Rerotator,
        store: KVStore,
        lanes: Lanes,
    ) -> None:
        self.handle, self.rope, self.store, self._lanes = handle, rope, store, lanes
        self.pieces = lanes.pace.pieces  # of a background blend, between two steps
        self.costs: Costs | None = None  # set once they are measured
        self._max_tile = int(handle.config.scheduler_config.max_num_batched_tokens)
        self._alone = get_tensor_model_parallel_world_size() == 1
        self._reader = ThreadPoolExecutor(1, "cacheblend-read")  # for those who must not wait
        self._expected: tuple[str, _FromStore] | None = None  # by a request's id

    def expect(self, request_id: str, plan: Plan) -> None:
        """Begin to bring the KV of the blend that comes next, if it can be had at once: vLLM's own
        preparation of the step takes as long as a good part of that.
        """
        keys = {s.key for s in plan.segments if s.key}
        if all(self._lanes.held(key) is not None or self.store.in_memory(key) for key in keys):
            found = self._fetch(plan, set())  # all is near: nothing to consider
            self._expected = request_id, found
            self._lanes.expect({key: chunk for key, chunk in found.chunks.items() if chunk})

    def start(self, task: BlendTask) -> BlendOutcome:
        """What ``steps`` will fill in."""
        return BlendOutcome(Clock(self.handle.device), task.plan.segments, task.write_from)

    def steps(self, task: BlendTask, outcome: BlendOutcome) -> Iterator[str | None]:
        """Blend ``task`` in steps of bounded work; ``outcome`` is filled in on the way. ``WAITS``
        after a step in which its KV has not arrived yet.

        After the last step the paged cache holds K and V of [write_from, E) for every layer.
        """
        clock, plan, device = outcome.clock, task.plan, self.handle.device
        yields = task.background and self._alone  # ranks that wait each their own way would part
        loaded = yield from self._from_store(task, yields)
        clock.mark("fetch")
        region = Region(task, self._fitting(task, outcome, loaded))
        outcome.bytes = region.bytes
        lane = self._lanes(region)
        must_E, candidate_E, weighted = _duties(task, region.stored_E, outcome.missing)
        selector = create_selector(plan.selector, plan.selector_options)
        num_candidates = int(candidate_E.sum())
        budget = min(selector.budget(plan.ratio, weighted), num_candidates)
        chosen, candidate = upload(must_E.nonzero()[0], device), upload(candidate_E, device)
        while yields and not lane.bring():
            yield WAITS
        clock.mark("load")
        if task.background:
            yield None
            clock.mark()

        if 0 < budget < num_candidates:
            question_E = deviation_E = None
            if isinstance(selector.evidence, QuestionAttention):
                question_E = yield from self._ask(lane, task, selector.evidence, clock)
            elif isinstance(selector.evidence, KVDeviation):
                deviation_E = yield from self._probe(lane, task, selector.evidence, clock)
            evidence = Evidence(
                candidate, lane.offset_E, lane.ids_E, question_E, deviation_E, budget
            )
            picked = selector.choose(evidence, selector.score(evidence))
            chosen = torch.cat([chosen, picked]).sort().values
        elif budget:
            chosen = upload((must_E | candidate_E).nonzero()[0], device)

        clock.mark("select")

        computed_along = task.end - max(task.plan.end, task.write_from)
        outcome.chosen = _to_host(chosen[: len(chosen) - computed_along])
        if plan.reach and 0 < budget < num_candidates:
            lane.correct(candidate, chosen, plan.reach)
        for tile in chosen.split(self._tile(task)) if len(chosen) else ():  # all may be exact
            yield from clock.pauses("recompute", lane.recompute(tile))
        lane.place_through(self.handle.num_layers - 1)
        clock.mark("load")

    def _from_store(self, task: BlendTask, yields: bool) -> Generator[str, None, _FromStore]:
        """What ``_load`` returns; where it ``yields``, it runs beside other steps."""
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == task.request_id:
            return expected[1]
        if not yields:
            return self._load(task.plan)
        loading = self._reader.submit(self._load, task.plan)
        while not loading.done():
            yield WAITS
        return loading.result()

    def _fitting(
        self,
        task: BlendTask,
        outcome: BlendOutcome,
        loaded: _FromStore,
    ) -> list[Loaded]:
        """The stored chunks of a plan. One that is absent, damaged, not what the prompt says or
        not there in time on any rank is missing on all: its tokens are computed afresh. What one
        rank knows to be gone is gone, whatever keeps the others from asking.

        Raises:
            RefusedError: some rank's store is so slow that a plain prefill is as quick.
        """
        refusal, chunks, late, unavailable = loaded
        segments = task.plan.segments
        unused = [
            bool(s.key) and not self._fits(chunks.get(s.key), s, task.token_ids) for s in segments
        ]
        away, is_late = late | unavailable, [s.key in late for s in segments]
        is_gone = [gone and s.key not in away for gone, s in zip(unused, segments, strict=True)]
        votes = [*unused, *is_gone, *is_late, bool(refusal)]
        if not self._alone:
            # float: vLLM's all-reduce between CPU processes takes no integers
            mine = torch.tensor(votes, dtype=torch.float32, device=self.handle.device)
            votes = [vote > 0 for vote in get_tp_group().all_reduce(mine).tolist()]
        if votes[-1]:
            too_slow = Why(Reason.PREFILL_AS_QUICK, "another rank's store is too slow")
            raise RefusedError(*(refusal or too_slow))
        n = len(segments)
        unused, is_gone, is_late = votes[:n], votes[n : 2 * n], votes[2 * n : -1]
        outcome.missing = [i for i in range(n) if unused[i]]
        outcome.late = [i for i in outcome.missing if is_late[i] and not is_gone[i]]
        outcome.unavailable = [i for i in outcome.missing if not (is_late[i] or is_gone[i])]
        return [
            Loaded(s.start, s.end, s.offset, s.key, chunk)
            for s, is_unused in zip(segments, unused, strict=True)
            if s.key and not is_unused and (chunk := chunks[s.key]) is not None
        ]

    def _load(self, plan: Plan) -> _FromStore:
        """Why it is not worth it on this rank, or else the chunks by key, and the keys of those
        that are too far away or do not come within the time of a prefill.
        """
        refusal, far = self.consider(plan)
        if refusal:
            return _FromStore(refusal, {}, far)
        return self._fetch(plan, far)

    def _fetch(self, plan: Plan, far: set[str]) -> _FromStore:
        """The chunks of ``plan`` that are not ``far`` and come within the time of a prefill."""
        patience_s = _PATIENCE_S
        if self.costs is not None and plan.when == "pays":
            patience_s = self.costs.prefill(plan)
        keys = dict.fromkeys(s.key for s in plan.segments if s.key)
        near = [key for key in keys if key not in far]
        held = {key: chunk for key in near if (chunk := self._lanes.held(key)) is not None}
        for key in held:
            self.store.touch(key)  # it is in use
        wanted = [key for key in near if key not in held]
        found = self.store.get_in_time(wanted, patience_s)
        chunks = {**held, **dict(zip(wanted, found.chunks, strict=True))}
        return _FromStore(None, chunks, found.late | far, found.unavailable)

    def consider(self, plan: Plan) -> tuple[Why | None, set[str]]:
        """Why a plan is not worth it, now that the store says what is not in memory; None if it
        is. And the chunks that take longer to fetch than to compute. What is not waited for is
        brought to memory for the next one who asks.
        """
        refusal, far = None, set[str]()
        if self.costs is not None and plan.when == "pays":
            fetch_s = self._fetch_seconds(plan)
            if fetch_s:
                refusal, far = self.costs.refusal(plan, fetch_s), self.costs.too_far(plan, fetch_s)
                self.store.prefetch(fetch_s if refusal else far)
        return refusal, far

    def _fetch_seconds(self, plan: Plan) -> dict[str, float]:
        """How long the store will take, by its recent speed, for each chunk not in memory."""
        bandwidth = self.store.bandwidth
        if bandwidth is None:
            return {}
        first = self.handle.layers[0]
        size = self.handle.config.model_config.dtype.itemsize
        a_token = 2 * self.handle.num_layers * first.num_kv_heads * first.head_size * size
        return {
            s.key: (s.offset + len(s)) * a_token / bandwidth
            for s in plan.segments
            if s.key and self._lanes.held(s.key) is None and not self.store.in_memory(s.key)
        }

    def _fits(self, chunk: ChunkKV | None, s: Segment, token_ids: Sequence[int]) -> bool:
        """Whether ``chunk`` really holds the tokens of segment ``s``, in this model's shape."""
        if chunk is None:
            return False
        layer = self.handle.layers[0]
        heads = (layer.num_kv_heads, layer.head_size)
        shape = (self.handle.num_layers, 2, len(chunk.token_ids), *heads)
        stored = chunk.token_ids[s.offset : s.offset + len(s)]
        return (
            tuple(chunk.kv_L2NHD.shape) == shape
            and chunk.kv_L2NHD.dtype == self.handle.config.model_config.dtype
            and 0 <= chunk.base <= self.rope.positions - len(chunk.token_ids)
            and stored == tuple(token_ids[s.start : s.end])
        )

    def _ask(
        self, lane: Lane, task: BlendTask, wanted: QuestionAttention, clock: Clock
    ) -> Generator[None, None, torch.Tensor]:
        """The question's attention to each token, float32 [E]."""
        keep = wanted.range(self.handle.num_layers)
        asking = lane.ask(task.question, keep, self._max_tile - len(task.question))
        return self._sum((yield from clock.pauses("select", asking)))

    def _probe(
        self, lane: Lane, task: BlendTask, wanted: KVDeviation, clock: Clock
    ) -> Generator[None, None, torch.Tensor]:
        """KV deviation at a layer, float32 [E]; 0 below ``write_from``."""
        check = min(wanted.layer, self.handle.num_layers - 1)
        deviation = torch.zeros(task.end, device=self.handle.device)
        # only the layers up to the check run
        size = min(self._tile(task) * self.handle.num_layers // (check + 1), self._max_tile)
        end = task.plan.end
        for start in range(task.write_from, end, size):
            tile = range(start, min(start + size, end))
            deviation[tile.start : tile.stop] = lane.deviation(check, wanted.values, tile)
            yield
        return self._sum(deviation)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over the ranks, each of which has some of the heads."""
        total: torch.Tensor = value if self._alone else get_tp_group().all_reduce(value)
        return total

    def _tile(self, task: BlendTask) -> int:
        usual = self._lanes.pace.tile_tokens if task.background else self._max_tile
        return min(task.plan.tile_tokens or usual, self._max_tile)


def _to_host(positions: torch.Tensor) -> torch.Tensor:
    """A copy on the host that nothing waits for; it is there when the stream has come so far."""
    if not positions.is_cuda:
        return positions
    host = torch.empty(positions.shape, dtype=positions.dtype, pin_memory=True)
    return host.copy_(positions, non_blocking=True)


def _duties(task: BlendTask, stored_E: Array, missing: Sequence[int]) -> tuple[Array, Array, float]:
    """Which tokens must be computed, which may be (bool [E]), and the candidates' weighted number.

    Tokens below ``write_from`` are neither. Exact segments are neither. A head-cut segment's
    tokens count twice, capped so that the ratio stays a share.
    """
    must = ~stored_E
    candidate = np.zeros_like(stored_E)
    weighted, ratio = 0.0, task.plan.ratio
    twice = min(2.0, 1.0 / ratio) if ratio else 0.0
    for i, s in enumerate(task.plan.segments):
        if s.kind in (Kind.REUSE, Kind.HEAD_CUT) and i not in missing:
            start = max(s.start, min(task.write_from, s.end))
            candidate[start : s.end] = True
            weighted += (s.end - start) * (twice if s.kind is Kind.HEAD_CUT else 1.0)
    must[: task.write_from] = False
    return must, candidate, weighted
