"""A blend's tokens as rows of vLLM's own step: the worker's side.

To the scheduler, all but ``task.rows`` tokens of a request are there. So vLLM schedules that many
rows, in one step or several, as if they were the prompt's last tokens. Before the model
runs, those rows become the chosen tokens, in order: ids, positions and slots are written into the
step's own tensors, and the attention metadata is built anew with each run of consecutive positions
as a sequence. Chosen positions ascend and end with the prompt's last token, so no row stands at a
later position than vLLM believes: its block is allocated, and the sample is the right row's.

Stored KV of a layer goes into the cache when the forward is about to write that layer's own K and
V: the cache update of every attention layer is a call that looks its layer up in the forward
context, where ours stands in its place.

Shape legend: E tokens of the request, T rows of the step, S sequences.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger

from cacheblend_rag.engine import layout
from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.blend import Positions
from cacheblend_rag.engine.blends import Blends, Finished, Scheduled, why_failed
from cacheblend_rag.engine.exact import clear, prefill
from cacheblend_rag.engine.executor import BlendExecutor
from cacheblend_rag.engine.forward import LatentProxy, ModelHandle, ProxyImpl, ProxyLayer
from cacheblend_rag.engine.outcome import BlendOutcome, BlendTask, Clock
from cacheblend_rag.engine.proof import Proof
from cacheblend_rag.engine.runner import StepTensors
from cacheblend_rag.engine.upload import Array, upload
from cacheblend_rag.model_check import tolerance
from cacheblend_rag.reason import Reason, RefusedError, Why
from cacheblend_rag.undo import logging_failures, on_failure

logger = init_logger("vllm.cacheblend_rag")

Propagator = Callable[[int, torch.Tensor, torch.Tensor], None]


@dataclass
class _Blend:
    """One request's blend on this rank, from its first row to its last.

    Attributes:
        positions: of each row in order.
        executor: None where the rows are the tokens that vLLM takes them for.
        blocks: those allocated so far.
        placed: the first position whose stored KV may be wanting in the cache.
        proof: of blends that are to show that they are right.
        is_lost: it failed, and its rows are the tokens that vLLM takes them for.
        done: tokens that are computed when this step ends, as vLLM counts.
    """

    task: BlendTask
    outcome: BlendOutcome
    positions: Positions
    executor: BlendExecutor | None
    placed: int
    proof: Proof | None = None
    why_not: Why | None = None
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    is_lost: bool = False

    def advance(self, scheduled: Scheduled) -> Positions:
        """Go on by this step's rows: open their blocks, and return their positions."""
        first = scheduled.computed - self.task.first_row
        if self.executor is not None:
            self.executor.open(self.blocks, self.placed, self.done)
            # vLLM's uploads for this step are queued. And the host is about to wait for the rows.
            self.executor.resume()
        self.placed = max(self.placed, self.done)
        return self.positions[first : first + scheduled.known]

    def give_up(self) -> None:
        """Nothing more comes of what is stored."""
        if self.executor is not None:
            self.executor.give_up()


class _Part(NamedTuple):
    """A blend's rows in this step: which they are, and the positions they get."""

    name: str
    blend: _Blend
    executor: BlendExecutor
    place: slice
    positions: Positions


class StepRows(Blends):
    """Blends whose tokens are rows of vLLM's own step."""

    def __init__(self, handle: ModelHandle, cache: PagedCache, tensors: StepTensors) -> None:
        super().__init__(handle)
        self._cache, self._tensors = cache, tensors
        self._blends: dict[str, _Blend] = {}
        self._begun_ahead: dict[str, _Blend] = {}  # of the step that is being built
        self._stream: torch.cuda.Stream | None = None  # on which steps run; None before the first
        self._finished: list[_Blend] = []
        self._most_rows = int(handle.config.scheduler_config.max_num_batched_tokens)
        self._lost: dict[str, set[int]] = {}  # not yet reported
        self._dtype = str(handle.config.model_config.dtype).removeprefix("torch.")
        self._is_disproved = False

    def begin_ahead(self, task: BlendTask) -> None:
        """Begin a blend of the step that the scheduler is still building, in this very process. All
        earlier steps were queued, so this comes behind them, as the step does. What fails here is
        begun again with the step, which says why it can't.
        """
        # To choose may need stored KV, or missing chunks' tokens, in blocks that are new.
        if self._tensors.zeroes_blocks:
            return
        clock = Clock(self.handle.device)
        outcome = BlendOutcome(clock, task.plan.segments, task.prefix_cached, task.planned)
        on_stream = torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()
        try:
            with on_stream, torch.inference_mode(), self.handle.adapters.using(task.adapter):
                self._begun_ahead[task.request_id] = self._chosen(task, outcome)
        except Exception as error:
            logger.debug("%s was not begun ahead: %s", task.request_id, error)

    def begin_step(self, tasks: Mapping[str, BlendTask], batch: Mapping[str, Scheduled]) -> None:
        """Called before the model runs.

        Args:
            tasks: blends that begin with this step, by request.
            batch: all requests of a step in which a blend has rows; else empty.
        """
        if self.handle.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.handle.device)
        # vLLM hands out blocks step by step. A blend whose rows take several steps has no block yet
        # for its last positions, so what was chosen is kept here and placed as its blocks come.
        for name, scheduled in batch.items():
            if name in tasks:
                with self.handle.adapters.using(tasks[name].adapter):
                    self._begin(tasks[name])
            elif name in self._blends:
                self._blends[name].blocks += scheduled.blocks
        ours = {name: self._blends[name] for name in batch if name in self._blends}
        if not ours:
            return
        for name, blend in ours.items():  # first, since one that is lost here goes on as well
            blend.done = batch[name].computed + batch[name].known
        with self._losing(*(blend for blend in ours.values() if blend.executor is not None)):
            self._change(ours, batch)
        self._collect(ours)

    def _change(self, ours: Mapping[str, _Blend], batch: Mapping[str, Scheduled]) -> None:
        # A step that is one CUDA graph replays what was captured. It reads neither the metadata nor
        # the layers that a context names, and vLLM's V2 runner makes no context for it. Such steps
        # have one row a request, which may be any row of a blend.
        context = get_forward_context() if is_forward_context_available() else None
        if context is None or context.cudagraph_runtime_mode == CUDAGraphMode.FULL:
            self._compute_before_step(ours, batch)
        else:
            # One vote for all: a model that takes embeddings makes them on all ranks together.
            self.handle.ranks.all_or_none(lambda: self._rewrite(ours, batch, context))

    def lost(self) -> dict[str, set[int]]:
        """Requests that could not be computed since the call before, and their own blocks."""
        lost, self._lost = self._lost, {}
        return lost

    def prove(self) -> None:
        """Called behind the model's forward: judge the blends that were to prove something."""
        for blend in self._finished:
            proof, blend.proof = blend.proof, None
            if proof is None:
                continue
            found: float | None = None
            with self._losing(blend):
                found = proof.error()
            error, bound = found or 0.0, tolerance(self._dtype)[0]
            # Each rank sees its own heads only, and may have lost the blend alone. So all of them
            # vote on every proof that was begun. "Not below" is true of NaN too.
            flags = [blend.why_not is not None, not error <= bound, found is None]
            is_lost, differs, is_unknown = self.handle.ranks.any(flags)
            if is_lost:  # by a failure, which says nothing of others
                # That rank has told the blocks, with an earlier step maybe: they may be another's.
                self._lose(blend, "another rank failed, its log has the cause", tells=False)
            elif differs:
                detail = f"rows of vLLM's step differ by {error:.3g} ({bound:g} allowed)"
                self._lose(blend, detail)
                self._is_disproved = True
                self.proved(Why(Reason.ROWS_DIFFER, detail))
            elif not (is_unknown or self._is_disproved):  # by another, under way with this one
                self.proved(None)

    def finished(self) -> list[Finished]:
        """Blends whose last row was in a step since the call before."""
        finished, self._finished = self._finished, []
        return [
            Finished(b.task.request_id, b.task.name, b.outcome, b.why_not, b.task.number)
            for b in finished
        ]

    def forget(self, names: Iterable[str]) -> None:
        """Requests that ended, or were preempted."""
        for name in names:
            for blends in (self._blends, self._begun_ahead):
                blend = blends.pop(name, None)
                if blend is not None:
                    blend.give_up()

    # ---- a blend -------------------------------------------------------------------------------

    def _begin(self, task: BlendTask) -> None:
        """Load and choose. Whatever fails, on any rank, ends in an exact answer: what vLLM takes
        for computed is then computed here, and the rows are left as they are.
        """
        begun = self._begun_ahead.pop(task.request_id, None)
        if begun is not None:
            begun.outcome.clock.mark()  # what came between is no stage of the blend's
            self._blends[task.request_id] = begun
            return
        clock = Clock(self.handle.device)
        outcome = BlendOutcome(clock, task.plan.segments, task.prefix_cached, task.planned)
        try:
            self._blends[task.request_id] = self._chosen_by_all(task, outcome)
            return
        except RefusedError as refusal:
            why_not = refusal.why
        # Memory that ran out, a store's fault, a kernel's, one of ours: a request is answered
        # exactly whatever it was. The log has the cause, and the report says so.
        except Exception as error:
            logger.exception("the blend of %s failed; it is computed exactly", task.request_id)
            why_not = why_failed(task, error)
        # From here on the request is a plain one. vLLM will schedule nothing below ``first_row``,
        # so that is computed here, in blocks that nobody else can find. To report them as not
        # loaded is no way out: under vLLM's policy "recompute" such blocks stay findable in its
        # prefix cache, unwritten.
        rows = Positions(torch.arange(task.first_row, task.end, device=self.handle.device))
        blend = _Blend(task, outcome, rows, None, task.end, None, why_not, list(task.blocks))
        self._blends[task.request_id] = blend
        with self._losing(blend, because=f" (before that: {why_not.detail})"):
            prefill(self._cache, task, self._most_rows)

    @contextlib.contextmanager
    def _losing(self, *blends: _Blend, because: str = "") -> Iterator[None]:
        """Lose these where the block fails, by whatever it is; other requests' rows are as they
        were, and an exception that left the step would end it for all of them.
        """
        try:
            yield
        except Exception as error:
            for blend in blends:
                self._lose(blend, f"{type(error).__name__}: {error}{because}")

    def _lose(self, blend: _Blend, cause: str, *, tells: bool = True) -> None:
        """Not even an exact answer can be had: vLLM ends the request with an error, since it takes
        some of its blocks for computed. Where it takes none, every token is a row and nothing else
        was needed.
        """
        if blend.is_lost:
            return
        blend.is_lost = True
        because = sys.exc_info()[1]
        logger.error("%s can't be blended: %s", blend.task.request_id, cause, exc_info=because)
        blend.why_not = Why(Reason.BLEND_FAILED, f"blending failed: {cause}")
        blend.give_up()  # or what its transfer has half filled would be held for ever
        if blend.task.first_row == blend.task.write_from or not tells:
            return
        # The blocks before these hold what other requests may have written, and may be reading.
        own = blend.blocks[blend.task.write_from // self._cache.block_size :]
        self._lost[blend.task.request_id] = set(own)
        self._remember(blend.task.name, cause)
        with logging_failures(logger, "the blocks of %s can't be cleared", blend.task.request_id):
            clear(self._cache, own, self._most_rows)

    def _chosen_by_all(self, task: BlendTask, outcome: BlendOutcome) -> _Blend:
        """Where one rank can't, all raise."""
        with contextlib.ExitStack() as here:

            def choose() -> _Blend:
                blend = self._chosen(task, outcome)
                here.enter_context(on_failure(blend.give_up))  # another rank's too
                return blend

            return self.handle.ranks.all_or_none(choose)

    def _chosen(self, task: BlendTask, outcome: BlendOutcome) -> _Blend:
        if self.blender is None:
            raise RuntimeError("the worker was not bound")
        assert all(task.blocks), "the null block, which all requests share, is among the blocks"
        executor, positions, proof = self.blender.choose(task, outcome)
        placed, spare = task.write_from, len(positions) - task.rows
        # A chunk that went missing leaves more to compute than was claimed, and vLLM's rows cannot
        # grow. The surplus are the lowest positions, all below ``first_row``. They must be in the
        # cache when the rows attend, and nothing may be placed over them later: hence ``placed``.
        # Memory of a transfer under way: nobody else would give it back.
        with on_failure(executor.give_up):
            assert spare >= 0, "a blend never computes fewer tokens than it claimed"
            if spare:  # more than there are rows: the first tokens are computed before the step
                placed = task.first_row
                executor.open(task.blocks, task.write_from, placed)
                self.blender.recompute(executor, positions[:spare].device)
                executor.place(range(self.handle.num_layers))
        blocks = list(task.blocks)
        return _Blend(task, outcome, positions[spare:], executor, placed, proof, None, blocks)

    def _collect(self, ours: Mapping[str, _Blend]) -> None:
        for name, blend in ours.items():
            if blend.done >= blend.task.end:
                del self._blends[name]
                blend.outcome.clock.mark("load")
                self._finished.append(blend)

    # ---- a step --------------------------------------------------------------------------------

    def _rewrite(
        self, ours: Mapping[str, _Blend], batch: Mapping[str, Scheduled], context: Any
    ) -> None:
        """Give this step's rows their tokens, and see that their layers are placed."""
        # The runner orders the requests of a step in its own way. Where a blend's rows are follows
        # from it.
        order = self._tensors.order({name: s.rows for name, s in batch.items()})
        counts = np.array([batch[name].rows for name in order])
        ends = counts.cumsum()
        parts = []
        for name, first, end in zip(order, ends - counts, ends, strict=True):
            blend = ours.get(name)
            if blend is not None and blend.executor is not None:
                place = slice(int(first), int(end) - batch[name].drafts)
                parts.append(_Part(name, blend, blend.executor, place, blend.advance(batch[name])))
            elif blend is not None:
                blend.advance(batch[name])
        if not parts:
            return
        # Ids, positions and slots first: the metadata is built from these tensors as they then are.
        for part in parts:
            ids = part.executor.ids_E[part.positions.device]
            with self.handle.adapters.using(part.blend.task.adapter):
                self._tensors.write(
                    part.place, order.index(part.name), ids, part.positions.device, context
                )
        moves = [(part, part.executor.propagator(part.positions.device)) for part in parts]
        proxies = _proxies(self.handle.attention, moves, self._losing)
        # Last of all, since the host waits here for the rows, and then the GPU for the host.
        in_order = [(name, batch[name]) for name in order]
        context.attn_metadata = _metadata(self._cache, self._tensors, parts, in_order, context)
        # A copy with other layers, for this step only. The runner makes a new context for the next
        # one, so nothing has to be undone, whatever happens in the forward.
        context.no_compile_layers = {**context.no_compile_layers, **proxies}

    def _compute_before_step(
        self, ours: Mapping[str, _Blend], batch: Mapping[str, Scheduled]
    ) -> None:
        """For a step that is one CUDA graph, with as many rows for each request, which looks at no
        metadata of ours. The prompt's last token is what vLLM takes it for. Another row's token is
        computed here, and the row, whose sample nobody wants, writes no KV.
        """
        order = self._tensors.order({name: s.rows for name, s in batch.items()})
        counts = np.array([batch[name].rows for name in order])
        first = dict(zip(order, (counts.cumsum() - counts).tolist(), strict=True))
        for name, blend in ours.items():
            if blend.executor is not None:
                work = partial(_computed, self.handle, blend, blend.executor, batch[name])
                # Ranks compute together. One that fails alone would go on without the others.
                with self._losing(blend):
                    others = self.handle.ranks.all_or_none(work)
                    # Behind the vote: where one rank failed, the graph writes what is exact. Else
                    # it would put the KV of the tokens that vLLM takes these rows for over what is
                    # placed there.
                    if others:
                        self._tensors.write_nothing(slice(first[name], first[name] + others))


def _computed(
    handle: ModelHandle, blend: _Blend, executor: BlendExecutor, scheduled: Scheduled
) -> int:
    """Compute what a blend's rows would come to; returns how many, from its first one on, are
    other tokens than vLLM takes them for.
    """
    # Within the vote, or other ranks, on which it was not lost, would wait for this one.
    if blend.is_lost:
        raise RuntimeError("it was lost in an earlier step")
    # Rows ascend and end with the last token, so those that are vLLM's own come behind. Of
    # context, even these are computed here: they may move what is reused.
    positions = blend.advance(scheduled)
    at, theirs = positions.numpy(), scheduled.computed + np.arange(scheduled.known)
    others = int(((at != theirs) | (at < blend.task.plan.end)).sum())
    if others:
        with handle.adapters.using(blend.task.adapter):
            executor.recompute(positions[:others].device)
    # No layer of a graph asks for its stored KV, so all of it is placed before.
    executor.place(range(handle.num_layers))
    return others


class _StepImpl(ProxyImpl):
    """The layer's own attention; what must be in the cache before its K and V goes there first."""

    def __init__(
        self,
        layer: Any,
        index: int,
        moves: list[tuple[_Part, Propagator | None]],
        losing: Callable[[_Blend], AbstractContextManager[None]],
        is_last: bool,
    ) -> None:
        super().__init__(layer)
        self._index, self._moves, self._losing = index, moves, losing
        self._is_last = is_last

    def forward(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        return self._layer.impl.forward(self._layer, *args, **kwargs)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: Any, slots: Any
    ) -> None:
        # Before, because ``move`` compares fresh K and V with the stored ones at the same slots,
        # and because a recomputed token has stored KV too: what is written last stays.
        self.before(key, value)
        self._layer.impl.do_kv_cache_update(self._layer, key, value, kv_cache, slots)

    @property
    def reads_rows(self) -> bool:
        """Whether anybody looks at this layer's K and V."""
        return any(
            move is not None or (part.blend.proof is not None and self._is_last)
            for part, move in self._moves
        )

    def before(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """See to what must be in the cache before this layer's K and V."""
        for part, move in self._moves:
            if part.blend.why_not is not None:
                continue  # it was lost at a layer below
            with self._losing(part.blend):
                part.executor.place_layer(self._index)
                if move is not None:
                    move(self._index, key[part.place], value[part.place])
                if part.blend.proof is not None and self._is_last:
                    part.blend.proof.note(part.positions.device, key[part.place], value[part.place])


class _LatentStepImpl(ProxyImpl):
    """The implementation of latent attention, which older vLLMs have write the cache."""

    def __init__(self, step: _StepImpl) -> None:
        super().__init__(step._layer)
        self._step = step

    def before(self, kv_c_normed: torch.Tensor, k_pe: torch.Tensor) -> None:
        """See to what must be in the cache before this layer's latents."""
        # A copy of all rows, without which a host is quicker.
        reads = self._step.reads_rows
        key = layout.packed(kv_c_normed, k_pe) if reads else kv_c_normed[:, None]
        self._step.before(key, layout.no_values(key))

    def do_kv_cache_update(self, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, *args: Any) -> None:
        self.before(kv_c_normed, k_pe)
        self._layer.impl.do_kv_cache_update(kv_c_normed, k_pe, *args)


class _LatentStepLayer(LatentProxy):
    """The same of latent attention, whose layer writes the cache itself in newer vLLMs."""

    impl: _LatentStepImpl

    def update_kv_cache(
        self, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        self.impl.before(kv_c_normed, k_pe)
        self._real.update_kv_cache(kv_c_normed, k_pe, *args, **kwargs)


def _proxy(impl: _StepImpl) -> ProxyLayer:
    if layout.is_latent(impl._layer):
        return _LatentStepLayer(_LatentStepImpl(impl))
    return ProxyLayer(impl)


def _proxies(
    layers: Mapping[str, Any],
    moves: list[tuple[_Part, Propagator | None]],
    losing: Callable[[_Blend], AbstractContextManager[None]],
) -> dict[str, ProxyLayer]:
    """What stands in the place of each layer for a step."""
    last = len(layers) - 1
    return {
        name: _proxy(_StepImpl(layer, i, moves, losing, i == last))
        for i, (name, layer) in enumerate(layers.items())
    }


def _metadata(
    cache: PagedCache,
    tensors: StepTensors,
    parts: list[_Part],
    batch: Sequence[tuple[str, Scheduled]],
    context: Any,
) -> dict[str, Any]:
    """Attention metadata of the step, each run of a blend's rows a sequence. The host has to know
    the rows: this waits for them.
    """
    positions = {part.name: part.positions.numpy() for part in parts}
    bounds, lengths, whose = _sequences(positions, batch)
    table = tensors.table(len(batch))[upload(whose, cache.handle.device)]
    slots = next(iter(context.slot_mapping.values()))
    return cache.build(bounds, lengths, table, slots, tensors.positions(len(slots)))


def _sequences(
    positions: Mapping[str, Array], batch: Sequence[tuple[str, Scheduled]]
) -> tuple[Array, Array, Array]:
    """The sequences that a step's metadata is built of, each run of a blend's rows one of them:
    their first rows and the end of all, their contexts, and the numbers of their requests.

    All runs of a request have its whole block table. Stock kernels are causal from the end of a
    sequence, and a run's sequence ends with its last row: so each row sees what stands before it.

    Args:
        positions: of blends' rows; batch: all requests, in the order of their rows.
    """
    sequences: list[tuple[Array, Array, int]] = []  # first rows, lengths, number of the request
    at = 0
    for number, (name, s) in enumerate(batch):
        if name in positions:
            drafts = s.computed + s.known + np.arange(s.drafts)
            first, length = _runs(np.concatenate([positions[name], drafts]))
        # Another request of the step, or one that is computed exactly: one run, as vLLM has it.
        else:
            first, length = np.array([0]), np.array([s.computed + s.rows])
        sequences.append((at + first, length, number))
        at += s.rows
    bounds = np.concatenate([*(first for first, _, _ in sequences), [at]])
    lengths = np.concatenate([length for _, length, _ in sequences])
    whose = np.concatenate([np.full(len(length), n) for _, length, n in sequences])
    return bounds, lengths, whose


def _runs(positions: Array) -> tuple[Array, Array]:
    """Of ascending positions, the first row of each run of consecutive ones, and the context each
    run ends with.
    """
    first = np.concatenate([[True], positions[1:] != positions[:-1] + 1]).nonzero()[0]
    last = np.concatenate([first[1:], [len(positions)]]) - 1
    return first, positions[last] + 1
