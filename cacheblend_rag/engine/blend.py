"""One blend, on one rank: load, re-rotate, select, recompute, all into the paged cache.

Shape legend: E tokens of the blended region, Q question tokens, G KV heads, H query heads,
D head size, P rotated pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from vllm.distributed import get_tp_group

from cacheblend_kernels import key_deviation, question_attention
from cacheblend_rag.engine import compat
from cacheblend_rag.engine.attention import PagedCache, PagedPass, dense_causal, visible
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.plan import Kind, Plan, Segment
from cacheblend_rag.select import Evidence, Selector, create_selector
from cacheblend_rag.select.hkvd import HKVDSelector
from cacheblend_rag.select.query import QuerySelector
from cacheblend_rag.store.base import ChunkKV, KVStore


@dataclass(frozen=True)
class BlendTask:
    """One request's blend, from the scheduler to every rank.

    Attributes:
        request_id: vLLM's own; name: the caller's.
        token_ids: the prompt's first E tokens.
        question: token ids whose attention selects.
        blocks: numbers of the paged blocks that hold positions [0, E).
        write_from: positions below it are in the cache already, blended by an identical plan.
    """

    request_id: str
    name: str
    token_ids: tuple[int, ...]
    question: tuple[int, ...]
    plan: Plan
    blocks: tuple[int, ...]
    write_from: int


@dataclass
class BlendOutcome:
    """What one rank did for one request; plain data for the report."""

    recomputed: list[int] = field(default_factory=list)  # per segment
    missing: list[int] = field(default_factory=list)  # segment numbers
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    selected: list[int] = field(default_factory=list)  # positions, kept for tests and plots

    def timed(self, stage: str, since: float) -> float:
        """Add the seconds since ``since`` to ``stage``; returns now."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        return now

    def to_dict(self) -> dict[str, Any]:
        """For the report; without the positions."""
        return {
            "recomputed": self.recomputed,
            "missing": self.missing,
            "seconds": self.seconds,
            "bytes": self.bytes,
        }


class Loaded(NamedTuple):
    """Prompt tokens [start, end) and the chunk whose tokens ``offset`` and following they are."""

    start: int
    end: int
    offset: int
    chunk: ChunkKV


class Region:
    """The blended region [0, E) of a request: which tokens have stored KV, and that KV by layer."""

    def __init__(
        self,
        task: BlendTask,
        spans: Sequence[Loaded],
        slots: torch.Tensor,  # of positions [write_from, E)
        handle: ModelHandle,
        rope: Rerotator,
    ) -> None:
        device = handle.device
        self._spans, self._rope, self._device = spans, rope, device
        first = handle.layers[0]
        self._shape = (task.plan.end, first.num_kv_heads, first.head_size)
        self._dtype = handle.config.model_config.dtype
        positions = torch.arange(task.plan.end)
        old = positions.clone()
        self.offset_E = torch.zeros_like(positions)
        self.stored_E = torch.zeros(task.plan.end, dtype=torch.bool)
        for start, end, offset, chunk in spans:
            self.offset_E[start:end] = torch.arange(offset, offset + end - start)
            old[start:end] = chunk.base + self.offset_E[start:end]
            self.stored_E[start:end] = True
        self.ids_E = torch.tensor(task.token_ids, device=device)
        self.slots = slots
        self._turn = rope.turn(old.to(device), positions.to(device))

    @property
    def bytes(self) -> int:
        """Bytes of stored KV used."""
        total = 0
        for start, end, _, chunk in self._spans:
            total += (end - start) * chunk.nbytes // len(chunk.token_ids)
        return total

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [E, G, D] of layer ``index``, keys at their new positions; zeros in holes."""
        kv = torch.zeros(2, *self._shape, dtype=self._dtype, device=self._device)
        for start, end, offset, chunk in self._spans:
            stored = chunk.kv_L2NHD[index, :, offset : offset + end - start]
            kv[:, start:end].copy_(stored, non_blocking=True)
        return self._rope.apply(kv[0], self._turn), kv[1]


class QuestionPass(Pass):
    """Question and fresh tokens over the reused KV (the ``query`` selector's evidence).

    ``load(i)`` brings K and V of layer i and puts them into the paged cache, so loading and looking
    share one walk over the layers. The pass sums the question's attention over the layers in
    ``keep`` and stops behind the last of them. Its own K and V stay out of the paged cache: the
    fresh tokens are computed again, over the blended KV, by the selective pass.
    """

    def __init__(
        self,
        load: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        stored_E: torch.Tensor,
        fresh_F: torch.Tensor,
        positions_Q: torch.Tensor,
        keep: range,
    ) -> None:
        device = stored_E.device
        self._load, self._keep = load, keep
        self._fresh_F, self._num_fresh = fresh_F, len(fresh_F)
        num_context = len(stored_E)
        self._query_pos = torch.cat([fresh_F, positions_Q])
        self._key_pos = torch.cat([torch.arange(num_context, device=device), positions_Q])
        known = torch.ones(len(self._key_pos), dtype=torch.bool, device=device)
        known[:num_context] = stored_E
        known[fresh_F] = True
        self._known = known
        self._masks: dict[int | None, torch.Tensor] = {}  # by sliding window
        self.score_E = torch.zeros(num_context, device=device)

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        n = self._num_fresh
        k, v = self._load(index)
        k[self._fresh_F], v[self._fresh_F] = k_TGD[:n], v_TGD[:n]
        k, v = torch.cat([k, k_TGD[n:]]), torch.cat([v, v_TGD[n:]])
        mask = self._mask(compat.sliding_window(layer))
        if index not in self._keep:
            out_THD.copy_(dense_causal(layer, q_THD, k, v, mask))
            return
        if n:
            out_THD[:n] = dense_causal(layer, q_THD[:n], k, v, mask[:n])
        out_THD[n:], score = question_attention(
            q_THD[n:], k, v, mask[n:], scale=layer.impl.scale, softcap=compat.softcap(layer)
        )
        self.score_E += score[: len(self.score_E)]
        if index == self._keep[-1]:
            self.stop()

    def _mask(self, window: int | None) -> torch.Tensor:
        if window not in self._masks:
            self._masks[window] = visible(self._query_pos, self._key_pos, window) & self._known
        return self._masks[window]


class Blender:
    """Blends requests on one rank. All ranks of a tensor parallel group take the same steps."""

    def __init__(
        self, handle: ModelHandle, rope: Rerotator, cache: PagedCache, store: KVStore
    ) -> None:
        self.handle, self.rope, self.cache, self.store = handle, rope, cache, store
        self._max_tile = int(handle.config.scheduler_config.max_num_batched_tokens)

    def steps(self, task: BlendTask, outcome: BlendOutcome) -> Iterator[None]:
        """Blend ``task`` in steps of bounded work; ``outcome`` is filled in on the way.

        After the last step the paged cache holds K and V of [write_from, E) for every layer.
        """
        clock = time.perf_counter()
        blocks = torch.tensor(task.blocks)
        spans = self._fetch(task.plan.segments, task, outcome)
        slots = self.cache.slots(blocks, torch.arange(task.write_from, task.plan.end))
        region = Region(task, spans, slots, self.handle, self.rope)
        outcome.bytes = region.bytes
        must_E, candidate_E, budget = _duties(task, region.stored_E, outcome.missing)
        clock = outcome.timed("load", clock)

        selector = create_selector(task.plan.selector, task.plan.selector_options)
        budget = min(selector.budget(task.plan.ratio, budget), int(candidate_E.sum()))
        choice = 0 < budget < int(candidate_E.sum())
        question_E = deviation_E = None
        first_unloaded = 0
        if choice and selector.evidence == "question":
            question_E, first_unloaded = self._ask(task, region, must_E, selector)
            clock = outcome.timed("select", clock)
        for index in range(first_unloaded, self.handle.num_layers):
            self._place(region, task, index)
        clock = outcome.timed("load", clock)
        yield

        if choice and selector.evidence == "deviation":
            deviation_E = yield from self._probe(task, region, blocks, selector)
        if choice:
            evidence = Evidence(
                candidate_E.to(self.handle.device),
                region.offset_E.to(self.handle.device),
                region.ids_E,
                question_E,
                deviation_E,
            )
            score = selector.score(evidence).masked_fill(~evidence.candidate_N, -torch.inf)
            must_E[score.topk(budget).indices.cpu()] = True
        elif budget:
            must_E |= candidate_E
        clock = outcome.timed("select", clock)

        chosen = must_E.nonzero().flatten()
        outcome.selected = chosen.tolist()
        outcome.recomputed = _per_segment(task.plan.segments, must_E, outcome.missing)
        tiles = chosen.split(self._tile(task.plan)) if len(chosen) else ()  # all may be exact
        for positions in tiles:
            step = PagedPass(self.cache, blocks, positions)
            at = positions.to(self.handle.device)
            self.handle.run(step, region.ids_E[at], at)
            outcome.timed("recompute", clock)
            yield
            clock = time.perf_counter()

    def _fetch(
        self, segments: Sequence[Segment], task: BlendTask, outcome: BlendOutcome
    ) -> list[Loaded]:
        """The stored chunks of a plan. One that is absent, damaged or not what the prompt says on
        any rank is missing on all: its tokens are computed afresh.
        """
        chunks: dict[str, ChunkKV | None] = {}
        for s in segments:
            if s.key and s.key not in chunks:
                chunks[s.key] = self.store.get(s.key)
        absent = [
            bool(s.key) and not self._fits(chunks[s.key], s, task.token_ids) for s in segments
        ]
        # float: vLLM's all-reduce between CPU processes takes no integers
        votes = torch.tensor(absent, dtype=torch.float32, device=self.handle.device)
        outcome.missing = get_tp_group().all_reduce(votes).nonzero().flatten().tolist()
        return [
            Loaded(s.start, s.end, s.offset, chunk)
            for i, s in enumerate(segments)
            if s.key and i not in outcome.missing and (chunk := chunks[s.key]) is not None
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

    def _place(
        self, region: Region, task: BlendTask, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Load one layer and write it into the paged cache; returns it, K and V [E, G, D]."""
        k, v = region.layer(index)
        new = slice(task.write_from, None)
        self.handle.write(index, k[new], v[new], region.slots)
        return k, v

    def _ask(
        self,
        task: BlendTask,
        region: Region,
        must_E: torch.Tensor,
        selector: Selector,
    ) -> tuple[torch.Tensor, int]:
        """The question's attention to each token, and the first layer it did not load."""
        assert isinstance(selector, QuerySelector)
        device = self.handle.device
        start = min(task.plan.question_start, self.rope.positions - len(task.question))
        keep = selector.layer_range(self.handle.num_layers)
        missing = torch.zeros_like(must_E)
        for s in task.plan.segments:
            missing[s.start : s.end] = bool(s.key) and not region.stored_E[s.start]
        glue = (~region.stored_E & ~missing).nonzero().flatten()
        glue = glue[-max(1, self._max_tile - len(task.question)) :].to(device)
        positions_Q = torch.arange(start, start + len(task.question), device=device)
        step = QuestionPass(
            lambda index: self._place(region, task, index),
            region.stored_E.to(device),
            glue,
            positions_Q,
            keep,
        )
        question = torch.tensor(task.question, device=device)
        ids = torch.cat([region.ids_E[glue], question])
        self.handle.run(step, ids, torch.cat([glue, positions_Q]))
        return get_tp_group().all_reduce(step.score_E), keep[-1] + 1

    def _probe(
        self, task: BlendTask, region: Region, blocks: torch.Tensor, selector: Selector
    ) -> Generator[None, None, torch.Tensor]:
        """KV deviation at the check layer, float32 [E]; 0 below ``write_from``."""
        assert isinstance(selector, HKVDSelector)
        check = min(selector.check_layer, self.handle.num_layers - 1)
        cached_k, cached_v = region.layer(check)
        deviation = torch.zeros(task.plan.end, device=self.handle.device)
        for positions in torch.arange(task.write_from, task.plan.end).split(self._tile(task.plan)):
            step = PagedPass(self.cache, blocks, positions, check=check)
            at = positions.to(self.handle.device)
            self.handle.run(step, region.ids_E[at], at)
            assert step.checked is not None
            k, v = step.checked
            deviation[at] = key_deviation(k, cached_k[at])
            if selector.deviation == "kv":
                deviation[at] += key_deviation(v, cached_v[at])
            yield
        total: torch.Tensor = get_tp_group().all_reduce(deviation)  # KV heads are sharded by rank
        return total

    def _tile(self, plan: Plan) -> int:
        return min(plan.tile_tokens or self._max_tile, self._max_tile)


def _duties(
    task: BlendTask, stored_E: torch.Tensor, missing: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Which tokens must be computed, which may be, and the candidates' weighted number.

    Tokens below ``write_from`` are neither. Exact segments are neither. A head-cut segment's
    tokens count twice, capped so that the ratio stays a share.
    """
    must = ~stored_E
    candidate = torch.zeros_like(stored_E)
    weighted, ratio = 0.0, task.plan.ratio
    twice = min(2.0, 1.0 / ratio) if ratio else 0.0
    for i, s in enumerate(task.plan.segments):
        if s.kind in (Kind.REUSE, Kind.HEAD_CUT) and i not in missing:
            start = max(s.start, min(task.write_from, s.end))
            candidate[start : s.end] = True
            weighted += (s.end - start) * (twice if s.kind is Kind.HEAD_CUT else 1.0)
    must[: task.write_from] = False
    return must, candidate, weighted


def _per_segment(
    segments: Sequence[Segment], must_E: torch.Tensor, missing: Sequence[int]
) -> list[int]:
    return [
        int(must_E[s.start : s.end].sum()) if s.key and i not in missing else 0
        for i, s in enumerate(segments)
    ]
