"""One blend, on one rank: load, re-rotate, select, recompute, all into the paged cache.

Shape legend: E tokens of the blended region.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.lane import Array, Lane, Loaded, Region, upload
from cacheblend_rag.engine.outcome import BlendOutcome, BlendTask, Clock
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.plan import Kind, Plan, Segment
from cacheblend_rag.select import Evidence, Selector, create_selector
from cacheblend_rag.select.hkvd import HKVDSelector
from cacheblend_rag.select.query import QuerySelector
from cacheblend_rag.store.base import ChunkKV, KVStore


class Blender:
    """Blends requests on one rank. All ranks of a tensor parallel group take the same steps.

    ``lanes`` makes a request's lane: how things are done on this device.
    """

    def __init__(
        self,
        handle: ModelHandle,
        rope: Rerotator,
        store: KVStore,
        lanes: Callable[[Region], Lane],
    ) -> None:
        self.handle, self.rope, self.store, self._lanes = handle, rope, store, lanes
        self._max_tile = int(handle.config.scheduler_config.max_num_batched_tokens)
        self._alone = get_tensor_model_parallel_world_size() == 1

    def start(self, task: BlendTask) -> BlendOutcome:
        """What ``steps`` will fill in."""
        return BlendOutcome(Clock(self.handle.device), task.plan.segments)

    def steps(self, task: BlendTask, outcome: BlendOutcome) -> Iterator[None]:
        """Blend ``task`` in steps of bounded work; ``outcome`` is filled in on the way.

        After the last step the paged cache holds K and V of [write_from, E) for every layer.
        """
        clock, plan, device = outcome.clock, task.plan, self.handle.device
        region = Region(task, self._fetch(plan.segments, task, outcome))
        outcome.bytes = region.bytes
        lane = self._lanes(region)
        must_E, candidate_E, weighted = _duties(task, region.stored_E, outcome.missing)
        selector = create_selector(plan.selector, plan.selector_options)
        num_candidates = int(candidate_E.sum())
        budget = min(selector.budget(plan.ratio, weighted), num_candidates)
        chosen, candidate = upload(must_E.nonzero()[0], device), upload(candidate_E, device)
        clock.mark("load")

        if 0 < budget < num_candidates:
            question_E = deviation_E = None
            if selector.evidence == "question":
                question_E = self._ask(lane, task, selector)
            elif selector.evidence == "deviation":
                deviation_E = yield from self._probe(lane, task, selector, clock)
            evidence = Evidence(
                candidate, lane.offset_E, lane.ids_E, question_E, deviation_E, budget
            )
            score = selector.score(evidence).masked_fill(~evidence.candidate_N, -torch.inf)
            chosen = torch.cat([chosen, score.topk(budget).indices]).sort().values
        elif budget:
            chosen = upload((must_E | candidate_E).nonzero()[0], device)

        clock.mark("select")

        outcome.chosen = _to_host(chosen)
        for tile in chosen.split(self._tile(plan)) if len(chosen) else ():  # all may be exact
            lane.recompute(tile)
            clock.mark("recompute")
            yield
            clock.mark()
        lane.place_through(self.handle.num_layers - 1)
        clock.mark("load")

    def _fetch(
        self, segments: Sequence[Segment], task: BlendTask, outcome: BlendOutcome
    ) -> list[Loaded]:
        """The stored chunks of a plan. One that is absent, damaged or not what the prompt says on
        any rank is missing on all: its tokens are computed afresh.
        """
        keys = list(dict.fromkeys(s.key for s in segments if s.key))
        chunks = dict(zip(keys, self.store.get_many(keys), strict=True))
        absent = [
            bool(s.key) and not self._fits(chunks[s.key], s, task.token_ids) for s in segments
        ]
        if not self._alone:
            # float: vLLM's all-reduce between CPU processes takes no integers
            votes = torch.tensor(absent, dtype=torch.float32, device=self.handle.device)
            absent = [vote > 0 for vote in get_tp_group().all_reduce(votes).tolist()]
        outcome.missing = [i for i, gone in enumerate(absent) if gone]
        return [
            Loaded(s.start, s.end, s.offset, s.key, chunk)
            for s, gone in zip(segments, absent, strict=True)
            if s.key and not gone and (chunk := chunks[s.key]) is not None
        ]

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

    def _ask(self, lane: Lane, task: BlendTask, selector: Selector) -> torch.Tensor:
        """The question's attention to each token, float32 [E]."""
        assert isinstance(selector, QuerySelector)
        keep = selector.layer_range(self.handle.num_layers)
        return self._sum(lane.ask(task.question, keep, self._max_tile - len(task.question)))

    def _probe(
        self, lane: Lane, task: BlendTask, selector: Selector, clock: Clock
    ) -> Generator[None, None, torch.Tensor]:
        """KV deviation at the check layer, float32 [E]; 0 below ``write_from``."""
        assert isinstance(selector, HKVDSelector)
        check = min(selector.check_layer, self.handle.num_layers - 1)
        deviation = torch.zeros(task.plan.end, device=self.handle.device)
        size, end = self._tile(task.plan), task.plan.end
        for start in range(task.write_from, end, size):
            tile = range(start, min(start + size, end))
            deviation[tile.start : tile.stop] = lane.deviation(
                check, selector.deviation == "kv", tile
            )
            yield
        return self._sum(deviation)

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over the ranks, each of which has some of the heads."""
        total: torch.Tensor = value if self._alone else get_tp_group().all_reduce(value)
        return total

    def _tile(self, plan: Plan) -> int:
        return min(plan.tile_tokens or self._max_tile, self._max_tile)


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
