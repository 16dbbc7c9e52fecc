"""Passes as CUDA graphs: one launch instead of some twenty a layer, for a few layers at a time, so
that a pass starts while the KV of its later layers is still on its way.

A pass is captured for a padded number of tokens and, for the question, of context; rows to spare
have no position and no slot. What a request puts in goes into tensors that all graphs share.

Shape legend: T tokens of the pass, padded; N context tokens, padded; G KV heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from cacheblend_kernels.move import Movers
from cacheblend_kernels.paged import PagedKV
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.kernel_pass import NEVER, NOWHERE, Moving, QuestionPass, SelectivePass
from cacheblend_rag.engine.outcome import gpu_seconds
from cacheblend_rag.engine.rope import Rerotator

logger = init_logger("vllm.cacheblend_rag")

_MOST_SELECTED = 2048  # beyond, the GPU is the bottleneck and launches are free
_MOST_ASKING = 256
_LEAST_CONTEXT = 8192
_STRETCH = 4  # layers a graph: about as many as arrive together

Before = Callable[[int], None]  # called with a layer's number before the layer is touched


class CapturedPass:
    """One pass as graphs of ``_STRETCH`` layers each, over one memory pool."""

    def __init__(self, pool: Any, stream: torch.cuda.Stream) -> None:
        self._pool, self._stream = pool, stream
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._last: list[int] = []  # the last layer each needs

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """What runs inside is captured, given that it calls ``reach`` at each layer."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            self._begin()
            try:
                yield
            finally:
                self._graphs[-1].capture_end()

    def reach(self, index: int) -> None:
        """The pass being captured is at layer ``index``."""
        if index and index % _STRETCH == 0:
            self._graphs[-1].capture_end()
            self._begin()
        self._last[-1] = index

    def replay(self, before: Before | None = None) -> Iterator[None]:
        """Queue the pass, with a pause behind each graph; ``before`` is called with the last layer
        that the next graph reads.
        """
        for graph, last in zip(self._graphs, self._last, strict=True):
            if before is not None:
                before(last)
            graph.replay()
            yield

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)
        self._last.append(0)


class PassGraphs:
    """Captures passes when they are first needed, and replays them.

    Attributes:
        usable: false where the model is split over ranks, runs eagerly by the user's wish, or can't
            be captured; the passes then run as they are.
    """

    def __init__(
        self,
        handle: ModelHandle,
        rope: Rerotator,
        view: Callable[[int, torch.Tensor, torch.Tensor, int], PagedKV],
    ) -> None:
        self._handle, self._rerotator, self._view = handle, rope, view
        config = handle.config
        self.usable = (
            get_tensor_model_parallel_world_size() == 1 and not config.model_config.enforce_eager
        )
        self._passes: dict[tuple[Any, ...], CapturedPass] = {}
        self._quickest: dict[int, int] = {}  # for a padded size, the one that takes least
        self._under_way: Iterator[None] = iter(())  # a pass that pauses
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(handle.device)  # memory of a pool belongs to a stream
        device, most = handle.device, int(config.model_config.max_model_len)

        def rows(fill: int) -> torch.Tensor:
            return torch.full((_MOST_SELECTED,), fill, dtype=torch.int64, device=device)

        self._ids, self._rope = rows(0), rows(0)
        self._positions, self._slots = rows(NOWHERE), rows(NOWHERE)
        self._asking, self._beside = rows(NOWHERE), rows(NEVER)
        self._length = torch.zeros(1, dtype=torch.int32, device=device)
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        size = view(0, self._length, self._length, 1).k_BSGD.shape[1]
        self._table = torch.zeros(most // size + 2, dtype=torch.int32, device=device)
        self._groups = int(handle.layers[0].num_kv_heads)

        def ones(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.ones(count, dtype=dtype, device=device)

        self._movers = Movers(
            chunk_N=ones(most),
            position_R=ones(most, torch.int64),
            chunk_R=ones(most),
            before_N=ones(most + 1),
            pass_2=ones(2),
            reach_1=ones(1, torch.float32),
        )
        self._scores: dict[int, torch.Tensor] = {}

    def takes(self, count: int) -> bool:
        """Whether a selective pass of so many tokens can be a graph."""
        return self.usable and _padded(count) <= _MOST_SELECTED

    def select(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        movers: Movers | None,
        at: PagedKV,
        before: Before,
    ) -> Generator[None, None, bool]:
        """The selective pass, as graphs with a pause behind each; false where there are none, and
        it has yet to be done.
        """
        size = _padded(len(ids_T))
        size = self._quickest.get(size, size)
        self._fill(at, size, ids_T, positions_T, slots_T)
        if movers is None:
            self._movers.chunk_N.fill_(-1)  # no token moves
            self._movers.pass_2.zero_()
        else:
            for static, values in zip(self._movers, movers, strict=True):
                static[: len(values)].copy_(values, non_blocking=True)

        def make(step: Before | None) -> Pass:
            view = self._layers(_MOST_SELECTED)
            moving = Moving(self._movers, self._rerotator)
            positions, slots = self._positions[:size], self._slots[:size]
            return SelectivePass(self._handle, view, positions, slots, self._count, step, moving)

        captured = self._captured(("select", size), size, make)
        if captured is None:
            return False
        yield from self._run(captured.replay(before))
        return True

    def ask(
        self,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        asking_T: torch.Tensor,
        beside_T: torch.Tensor,
        keep: range,
        at: PagedKV,
        before: Before,
    ) -> Generator[None, None, torch.Tensor | None]:
        """The question pass, as graphs with a pause behind each; the attention over all heads,
        float32 [at.most], or None where there are none.
        """
        size = -(-len(ids_T) // 32) * 32
        context = max(_LEAST_CONTEXT, 1 << (at.most - 1).bit_length())
        if not self.usable or size > _MOST_ASKING:
            return None
        self._fill(at, size, ids_T, positions_T, slots_T)
        _set_rows(self._asking, asking_T, size, NOWHERE)
        _set_rows(self._beside, beside_T, size, NEVER)
        if context not in self._scores:
            self._scores[context] = torch.zeros(self._groups, context, device=self._handle.device)
        score = self._scores[context]

        def make(step: Before | None) -> Pass:
            return QuestionPass(
                self._handle,
                self._layers(context),
                self._positions[:size],
                self._slots[:size],
                self._asking[:size],
                self._beside[:size],
                None,
                score,
                keep,
                before=step,
            )

        captured = self._captured(("ask", size, context, keep), size, make)
        if captured is None:
            return None
        score.zero_()
        found: list[torch.Tensor] = []

        def steps() -> Iterator[None]:
            yield from captured.replay(before)
            found.append(score[:, : at.most].sum(0))  # before another pass takes the tensor

        yield from self._run(steps())
        return found[0]

    def prepare(self, keep: range) -> None:
        """Capture the usual sizes now, so that no request waits for it.

        Args:
            keep: the layers at which the question's attention is summed.
        """
        none = torch.zeros(1, dtype=torch.int64, device=self._handle.device)
        nowhere = torch.full_like(none, NOWHERE)
        empty = self._view(0, self._table[:1], torch.zeros_like(self._length), 1)
        sizes = sorted({_padded(n) for n in range(1, _MOST_SELECTED + 1, 32)}, reverse=True)
        for size in sizes:  # the largest first: the others fit into its memory
            ids, spare = none.expand(size), nowhere.expand(size)
            if not self.takes(size):
                return
            exhaust(self.select(ids, spare, spare, None, empty, lambda _: None))
        self._quickest = _quickest({size: self.seconds("select", size) for size in sizes})
        for size in range(_MOST_ASKING, 0, -32):
            ids, spare = none.expand(size), nowhere.expand(size)
            beside = torch.full_like(spare, NEVER)
            exhaust(self.ask(ids, spare, spare, spare, beside, keep, empty, lambda _: None))

    @property
    def stretches(self) -> int:
        """Graphs of a pass through all layers."""
        return -(-self._handle.num_layers // _STRETCH)

    def seconds(self, kind: str, size: int) -> float | None:
        """How long the pass of a padded size runs, without a context; None where there is none."""
        found = next((p for key, p in self._passes.items() if key[:2] == (kind, size)), None)
        return None if found is None else gpu_seconds(lambda: exhaust(found.replay()))

    def _layers(self, most: int) -> Callable[[int], PagedKV]:
        return lambda index: self._view(index, self._table, self._length, most)

    def _fill(
        self,
        at: PagedKV,
        size: int,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
    ) -> None:
        """What every pass reads; of one that pauses, the rest is queued first."""
        exhaust(self._under_way)
        self._table[: len(at.table)].copy_(at.table, non_blocking=True)
        self._length.copy_(at.length, non_blocking=True)
        self._count.fill_(len(ids_T))
        _set_rows(self._ids, ids_T, size, 0)
        _set_rows(self._rope, positions_T.clamp(min=0), size, 0)
        _set_rows(self._positions, positions_T, size, NOWHERE)
        _set_rows(self._slots, slots_T, size, NOWHERE)

    def _run(self, steps: Iterator[None]) -> Iterator[None]:
        """``steps``, which whoever needs the shared tensors first runs to their end."""
        whole = False

        def all_of_them() -> Iterator[None]:
            nonlocal whole
            yield from steps
            whole = True

        self._under_way = all_of_them()
        yield from self._under_way
        if not whole:
            raise RuntimeError("the pass failed while another one was made room for")

    def _captured(
        self, key: tuple[Any, ...], size: int, make: Callable[[Before | None], Pass]
    ) -> CapturedPass | None:
        if key not in self._passes:
            try:
                self._passes[key] = self._capture(size, make)
            except Exception as error:  # a model that can't be captured is served all the same
                logger.warning("CUDA graphs are off for blends: %s", error)
                self.usable = False
                return None
        return self._passes[key]

    def _capture(self, size: int, make: Callable[[Before | None], Pass]) -> CapturedPass:
        """Run once as it is, so that all is compiled and allocated, then capture."""
        ids, rope = self._ids[:size], self._rope[:size]
        self._handle.run(make(None), ids, rope)
        captured = CapturedPass(self._pool, self._stream)
        with captured.capture():
            self._handle.run(make(captured.reach), ids, rope)
        return captured


def _quickest(seconds: Mapping[int, float | None]) -> dict[int, int]:
    """For each number of rows the one, as large at least, that takes the least time: libraries of
    matrix products have sizes that suit them badly.
    """
    best: dict[int, int] = {}
    found, least = 0, math.inf
    for size in sorted(seconds, reverse=True):
        took = seconds[size]
        if took is not None and took <= least:
            found, least = size, took
        best[size] = found or size
    return best


def exhaust(steps: Iterator[object]) -> None:
    """Run ``steps`` to their end."""
    for _ in steps:
        pass


def _set_rows(static: torch.Tensor, values: torch.Tensor, size: int, spare: int) -> None:
    """``values``, then ``spare`` up to ``size`` rows."""
    static[: len(values)].copy_(values, non_blocking=True)
    static[len(values) : size].fill_(spare)


def _padded(count: int) -> int:
    step = 32 if count <= 256 else 64 if count <= 1024 else 128
    return -(-count // step) * step
