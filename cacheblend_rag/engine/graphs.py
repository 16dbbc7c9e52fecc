"""The question's pass as CUDA graphs: one launch instead of some twenty a layer, for a few layers
at a time, so that it starts while the KV of its later layers is still on its way.

It is captured for a padded number of tokens and of context; rows to spare have no position and no
slot. What a request puts in goes into tensors that all graphs share.

Shape legend: T tokens of the pass, padded; N context tokens, padded; G KV heads.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import GraphCaptureContext
from vllm.logger import init_logger

from cacheblend_kernels.paged import PagedKV
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.kernel_pass import NOWHERE, SPARE, PassRows
from cacheblend_rag.engine.latent_pass import question_pass
from cacheblend_rag.engine.outcome import gpu_seconds
from cacheblend_rag.engine.upload import Array, upload
from cacheblend_rag.select import AskedLayers

logger = init_logger("vllm.cacheblend_rag")

_MOST_ASKING = 256
_LEAST_CONTEXT = 8192
_STRETCH = 4  # layers a graph: about as many as arrive together
_BOUND = 0.02  # of a graph's scores, from those of the pass as it is; rounding is far below

LayerHook = Callable[[int], None]  # called with a layer's number before the layer is touched


class CapturedPass:
    """One pass over one memory pool, as a graph for the layers that read no stored KV, those below
    ``reads_from``, and further ones of ``_STRETCH`` layers each.
    """

    def __init__(self, pool: Any, stream: torch.cuda.Stream, reads_from: int) -> None:
        self._pool, self._stream, self._reads_from = pool, stream, reads_from
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._last: list[int] = []  # the last layer each needs

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """What runs inside is captured, given that it calls ``arrive`` at each layer."""
        torch.cuda.synchronize()
        # Ranks exchange what addresses their sums read, when this ends.
        with get_tp_group().graph_capture(GraphCaptureContext(self._stream)):
            self._begin()
            try:
                yield
            finally:
                self._graphs[-1].capture_end()

    def arrive(self, index: int) -> None:
        """The pass being captured is at layer ``index``."""
        if index and index >= self._reads_from and (index - self._reads_from) % _STRETCH == 0:
            self._graphs[-1].capture_end()
            self._begin()
        self._last[-1] = index

    def replay(self, before: LayerHook | None = None) -> None:
        """Queue the pass; ``before`` is called with the last layer that the next graph reads, where
        it reads any. What that raises is raised behind the last graph: other ranks, on which it did
        not fail, sum with this one in each of them.
        """
        failure: Exception | None = None
        for graph, last in zip(self._graphs, self._last, strict=True):
            if before is not None and last >= self._reads_from and failure is None:
                try:
                    before(last)
                except Exception as error:
                    failure = error
            graph.replay()
        if failure is not None:
            raise failure

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads (transfers, ingestion, the store's) call CUDA meanwhile. In PyTorch's
        # default mode that would end the capture with an error.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graphs.append(graph)
        self._last.append(0)


class QuestionGraphs:
    """Captures the pass for a size when it is first needed, and replays it. Ranks of a tensor
    parallel group capture together, which they do at start only: one that fails later would leave
    the others waiting.

    Attributes:
        usable: false where the model runs eagerly by the user's wish, or can't be captured on some
            rank; the pass then runs as it is.

    Args:
        view: of a layer's paged cache; block_size: the scheduler's.
    """

    def __init__(
        self,
        handle: ModelHandle,
        view: Callable[[int, torch.Tensor, torch.Tensor, int], PagedKV],
        block_size: int,
    ) -> None:
        self._handle, self._view, self._ranks = handle, view, handle.ranks
        config = handle.config
        self.usable = not config.model_config.enforce_eager
        self._is_starting = False
        self._passes: dict[tuple[int, int, AskedLayers], CapturedPass] = {}
        self._pool = torch.cuda.graph_pool_handle()
        # Graphs share one pool and run one after another, so the memory of one pass serves all
        # sizes.
        self._stream = torch.cuda.Stream(handle.device)  # memory of a pool belongs to a stream
        device, most = handle.device, int(config.model_config.max_model_len)
        self._contexts = sorted({_LEAST_CONTEXT, _power_of_2(most)})  # captured at start
        self._longest = most  # positions that have an angle
        # A graph reads addresses, not values. So these tensors are never replaced, only written to:
        # the rows, and positions in the table of the model's own rotation.
        rows = torch.tensor([*SPARE, 0], dtype=torch.int64, device=device)
        self._rows = rows[:, None].repeat(1, _MOST_ASKING)
        self._length = torch.zeros(1, dtype=torch.int32, device=device)
        size = view(0, self._length, self._length, 1).k_BSGD.shape[1]
        entries = longest_table(most, block_size, size)
        self._table = torch.zeros(entries, dtype=torch.int32, device=device)
        self._groups = int(handle.layers[0].num_kv_heads)
        self._scores: dict[int, torch.Tensor] = {}

    def ask(
        self,
        rows_5T: Array,
        layers: AskedLayers,
        most: int,
        at: Callable[[], PagedKV],
        before: LayerHook,
    ) -> torch.Tensor | None:
        """The attention of the question over all heads, float32 [most]; None where there are no
        graphs for it.

        Args:
            rows_5T: ``PassRows`` on the host.
            most: a bound on the context; at: its paged cache, asked for when it is first read.
        """
        # Padded, as each size takes a graph of its own: 8 sizes serve all passes of up to 256
        # tokens.
        size = -(-rows_5T.shape[1] // 32) * 32
        context = self._context(most)
        if not self.usable or size > _MOST_ASKING:
            return None
        self._rows[:, :size].copy_(upload(_padded(rows_5T, size), self._handle.device))
        rows = PassRows(*self._rows[:5, :size])
        if context not in self._scores:
            self._scores[context] = torch.zeros(self._groups, context, device=self._handle.device)
        score = self._scores[context]

        def make(step: LayerHook | None) -> Pass:
            return question_pass(
                self._handle,
                self._layers(context),
                rows,
                None,
                score,
                layers,
                before=step,
            )

        captured = self._captured((size, context, layers), make)
        if captured is None:
            return None
        # From here on, ranks go through the graph's sums together: none that has failed before.
        self._ranks.agree()
        score.zero_()
        captured.replay(self._reading(at, before))
        return score[:, :most].sum(0)

    def _context(self, most: int) -> int:
        """A bound on the context of the graph that serves one of up to ``most`` tokens."""
        # The number of programs is fixed when a graph is captured, and follows from the longest
        # context that it serves. Powers of two, so that few are captured.
        wanted = _power_of_2(most)
        return wanted if self._ranks.alone else next(c for c in self._contexts if c >= wanted)

    def prepare(self, layers: AskedLayers) -> None:
        """Capture the usual sizes of these layers now, so that no request waits for it."""
        empty = self._view(0, self._table[:1], torch.zeros_like(self._length), 1)
        sizes = range(_MOST_ASKING, 0, -32)  # the largest first: the others fit its memory
        contexts = self._contexts[:1] if self._ranks.alone else self._contexts
        self._is_starting = True
        for most, size in itertools.product(contexts, sizes):
            spare = np.array([SPARE] * size).T
            self.ask(spare, layers, most, lambda: empty, lambda _: None)
            self.usable = not self._ranks.any([not self.usable])[0]
            if not self.usable:
                break
        self._is_starting = False
        # Each was captured with addresses of its own. A sum over other tensors than it should read
        # would only choose other tokens, which nobody notices.
        for most, size in itertools.product(contexts, sizes) if self.usable else ():
            is_right = self._is_right(layers, most, size)
            self.usable = not self._ranks.any([not is_right])[0]
            if not self.usable:
                logger.warning("CUDA graphs are off for questions: some rank's scores differ")
                break

    def _is_right(self, layers: AskedLayers, most: int, size: int) -> bool:
        """Whether a graph's scores are those of the pass as it is."""
        # Over block 0, which no request uses: what there is in it was drawn at random.
        zero = torch.zeros(1, dtype=torch.int32, device=self._handle.device)
        tokens = self._view(0, zero, zero, 1).k_BSGD.shape[1]
        length = torch.full_like(zero, tokens)
        rows_5T = np.full((5, size), NOWHERE)
        behind = np.minimum(tokens + np.arange(size), self._longest - 1)
        rows_5T[0], rows_5T[1:4] = np.arange(size) % 32, behind
        rows = PassRows(*upload(rows_5T, self._handle.device))
        plain = torch.zeros(self._groups, tokens, device=self._handle.device)

        def view(index: int) -> PagedKV:
            return self._view(index, zero, length, tokens)

        step = question_pass(self._handle, view, rows, None, plain, layers)
        try:
            self._ranks.all_or_none(lambda: self._handle.run(step, rows.ids, rows.positions))
            by_graph = self.ask(rows_5T, layers, most, lambda: view(0), lambda _: None)
            assert by_graph is not None, "it was captured"
            expected = plain.sum(0)
            error = (by_graph[:tokens] - expected).abs().max() / expected.abs().max()
            return bool(error <= _BOUND)  # not of NaN
        # Models, compilers and drivers raise anything here, as in ``_captured``.
        except Exception as failure:
            logger.warning("a graph can't be compared: %s", failure)
            return False

    def seconds(self, size: int) -> float | None:
        """How long the pass of a padded size runs, without a context; None where there is none."""
        found = next((p for key, p in self._passes.items() if key[0] == size), None)
        return None if found is None else gpu_seconds(found.replay)

    def _reading(self, at: Callable[[], PagedKV], before: LayerHook) -> LayerHook:
        """``before``, and once, what the pass reads of the paged cache."""
        pending = [at]

        def ready(last: int) -> None:
            before(last)
            while pending:
                cache = pending.pop()()
                self._table[: len(cache.table)].copy_(cache.table, non_blocking=True)
                self._length.copy_(cache.length, non_blocking=True)

        return ready

    def _layers(self, most: int) -> Callable[[int], PagedKV]:
        return lambda index: self._view(index, self._table, self._length, most)

    def _captured(
        self, key: tuple[int, int, AskedLayers], make: Callable[[LayerHook | None], Pass]
    ) -> CapturedPass | None:
        if key not in self._passes:
            if not (self._ranks.alone or self._is_starting):
                return None
            try:
                self._passes[key] = self._capture(key[0], key[2].sees_from, make)
            # Models, compilers and drivers raise anything here.
            except Exception as error:  # a model that can't be captured is served all the same
                logger.warning("CUDA graphs are off for questions: %s", error)
                self.usable = False
                return None
        return self._passes[key]

    def _capture(
        self, size: int, reads_from: int, make: Callable[[LayerHook | None], Pass]
    ) -> CapturedPass:
        """Run once as it is, so that all is compiled and allocated, then capture."""
        ids, rope = self._rows[0, :size], self._rows[5, :size]
        self._ranks.all_or_none(lambda: self._handle.run(make(None), ids, rope))
        captured = CapturedPass(self._pool, self._stream, reads_from)
        with captured.capture():
            self._handle.run(make(captured.arrive), ids, rope)
        return captured


def _power_of_2(most: int) -> int:
    """``_LEAST_CONTEXT``, or the next power of two that is no less than ``most``."""
    return max(_LEAST_CONTEXT, 1 << (most - 1).bit_length())


def longest_table(tokens: int, block_size: int, size: int) -> int:
    """Entries of the block table of so many tokens, of the backend's blocks of ``size`` tokens: all
    that the scheduler's blocks of ``block_size`` are cut into, and a block to spare.
    """
    return (-(-tokens // block_size) + 1) * (block_size // size)


def _padded(rows_5T: Array, size: int) -> Array:
    """``PassRows`` with rows to spare up to ``size``, and positions that all have an angle."""
    rows = np.array([*SPARE, 0], dtype=np.int64)[:, None].repeat(size, 1)
    rows[:5, : rows_5T.shape[1]] = rows_5T
    rows[5] = rows[1].clip(min=0)
    return rows
