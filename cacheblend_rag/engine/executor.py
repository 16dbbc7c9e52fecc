"""One request's way into the paged cache: what a blend needs done, whoever does it.

``TorchExecutor`` does it in plain torch on any device and is the specification; ``KernelExecutor``
does the same with our kernels and a copy stream on a GPU.

Shape legend: E tokens of the blended region, G KV heads, D head size.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cacheblend_kernels import key_deviation
from cacheblend_rag.engine.attention import PagedCache, PagedPass
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.isolated import fresh_kv
from cacheblend_rag.engine.outcome import BlendTask
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.engine.upload import Array, upload
from cacheblend_rag.select import AskedLayers
from cacheblend_rag.store.base import ChunkKV

FIRST_TOKENS = 4  # of a prompt, which take the attention that nothing else wants


class Loaded(NamedTuple):
    """Prompt tokens [start, end) and the chunk whose tokens ``offset`` and following they are."""

    start: int
    end: int
    offset: int
    key: str
    chunk: ChunkKV


class Region:
    """What a blend fills of a request's KV, [0, E): which tokens have stored KV, and where.

    Plain numpy: torch's operations on the CPU wake threads for every few thousand numbers.

    Attributes:
        stored_E: bool; offset_E: int64, a token's place in its chunk; old_E: int64, the position
            its key is rotated to; span_E: int32, which of the spans it is in, or -1.
        asked: end of the plan; what comes behind it is no context of the question.
        write_from: positions below it are in the paged cache already.
    """

    def __init__(self, task: BlendTask, spans: Sequence[Loaded]) -> None:
        self.task, self.spans = task, spans
        self.end, self.asked, self.write_from = task.end, task.plan.end, task.write_from
        self.offset_E = np.zeros(self.end, dtype=np.int64)
        self.stored_E = np.zeros(self.end, dtype=np.bool_)
        # A token without stored KV turns by nothing.
        self.old_E = np.arange(self.end)
        self.span_E = np.full(self.end, -1, dtype=np.int32)
        for number, (start, end, offset, _, chunk) in enumerate(spans):
            self.span_E[start:end] = number
            self.offset_E[start:end] = np.arange(offset, offset + end - start)
            self.old_E[start:end] = chunk.base + self.offset_E[start:end]
            self.stored_E[start:end] = True

    @functools.cached_property
    def ids_E(self) -> Array:
        """int64 token ids."""
        return np.array(self.task.token_ids, dtype=np.int64)

    @property
    def bytes(self) -> int:
        """Bytes of stored KV used."""
        return sum((s.end - s.start) * s.chunk.nbytes // len(s.chunk.token_ids) for s in self.spans)

    def glue(self, most: int) -> Array:
        """int64 positions of the tokens between chunks, the last ``most`` of them. Those of a chunk
        that is missing are not among them: too many to be asked with the question.
        """
        glue = ~self.stored_E[: self.asked]
        for s in self.task.plan.segments:
            if s.key and not self.stored_E[s.start]:
                glue[s.start : s.end] = False
        return glue.nonzero()[0][-max(1, most) :]

    def along(self, glue: Array, layers: AskedLayers) -> Array:
        """int64 positions of what runs before the question in its pass, ascending: ``glue``, and
        the prompt's first tokens where the question does not see the context in all layers.
        """
        if not layers.sees_from:
            return glue
        # A model's attention is not itself without an attention sink to see.
        return np.union1d(np.arange(min(FIRST_TOKENS, self.asked)), glue)


class BlendExecutor(ABC):
    """Layers may be placed in any order; everything else says what must be placed before."""

    def __init__(
        self, region: Region, handle: ModelHandle, rope: Rerotator, cache: PagedCache
    ) -> None:
        self.region, self.handle, self.rope, self._cache = region, handle, rope, cache
        self.device = handle.device
        self._blocks: Sequence[int] = region.task.blocks

    @functools.cached_property
    def _rows_3E(self) -> torch.Tensor:
        """The region's rows on the device, in one upload; made when the first is wanted, as a GPU
        that is to ask the question would wait for the host.
        """
        region = self.region
        return upload(np.stack([region.ids_E, region.offset_E, region.span_E]), self.device)

    @property
    def ids_E(self) -> torch.Tensor:
        """int64 token ids."""
        return self._rows_3E[0]

    @property
    def offset_E(self) -> torch.Tensor:
        """int64, a token's place in its chunk."""
        return self._rows_3E[1]

    @property
    def span_E(self) -> torch.Tensor:
        """int64, the span a token is in, or -1."""
        return self._rows_3E[2]

    @abstractmethod
    def open(self, blocks: Sequence[int], low: int, high: int) -> None:
        """From here on, the tokens [low, high) are placed, all layers of them: those below are in
        the paged cache, and those above have no blocks yet.

        Args:
            blocks: numbers of the blocks of [0, high) at least.
        """

    @abstractmethod
    def place(self, layers: range) -> None:
        """See that the stored KV of ``layers`` is in the paged cache, re-rotated."""

    def resume(self) -> None:  # noqa: B027 - most wait for nobody
        """Nothing of the step that is about to run waits for an upload any more."""

    def give_up(self) -> None:  # noqa: B027 - most fill nothing
        """Nothing more is wanted of it: let go of what its request alone would have filled."""

    @abstractmethod
    def ask(self, question: Sequence[int], layers: AskedLayers, most_glue: int) -> torch.Tensor:
        """Run the question's tokens, and the tokens between chunks, over the reused KV. Below
        ``layers.sees_from`` they see only one another, and the prompt's first tokens.

        Args:
            question: token ids, at the positions behind the last chunk.
            layers: those whose attention is summed; none above them runs.
            most_glue: tokens between chunks that may run along.

        Returns:
            float32 [E]: attention each context token got, on this rank's heads; 0 for tokens
            behind the plan's end.
        """

    def deviation(self, check: int, values: bool, most_tokens: int) -> torch.Tensor:
        """Prefill the plan's tokens up to layer ``check``, at most so many at once, outside of the
        paged cache.

        Returns:
            float32 [E]: squared distance of their fresh keys there, and values if asked, to the
            reused ones, on this rank's heads; 0 for tokens behind the plan's end.
        """
        at = torch.arange(self.region.asked, device=self.device)
        ids = self.ids_E[at]
        # starts a transfer, which small uploads must come before
        self.place(range(check, check + 1))
        k, v = fresh_kv(self.handle, ids, check + 1, most_tokens)[check]
        cached_k, cached_v = self._reused(check, at)
        distance = key_deviation(k, cached_k)
        if values:
            distance = distance + key_deviation(v, cached_v)
        return F.pad(distance, (0, self.region.end - self.region.asked))

    @abstractmethod
    def _reused(self, index: int, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [at, G, D] of a placed layer, as they were placed, at positions on the device."""

    @abstractmethod
    def correct(
        self, candidate_E: torch.Tensor, chosen: torch.Tensor, propagation_length: int
    ) -> None:
        """From here on, what is recomputed also moves the reused tokens around it: ``Correction``
        has the arguments.
        """

    @abstractmethod
    def propagator(
        self, tile: torch.Tensor
    ) -> Callable[[int, torch.Tensor, torch.Tensor], None] | None:
        """What is done at each layer of a forward that computes the tokens at ``tile`` (int64
        positions on the device, ascending), with the layer's number and their fresh K and V, before
        these are written; None where no other token is moved.
        """

    def recompute(self, tile: torch.Tensor) -> None:
        """Compute the tokens at ``tile`` through all layers over the fused KV, each seeing what
        comes before it, in a forward of our own. Each layer is placed just before it is needed.
        """
        if len(tile):
            step = PagedPass(
                self._cache,
                torch.tensor(self._blocks),
                tile.cpu(),
                before=self.place_layer,
                fresh=self.propagator(tile),
            )
            self.handle.run(step, self.ids_E[tile], tile)

    def place_layer(self, index: int) -> None:
        """The same of one layer."""
        self.place(range(index, index + 1))

    def _question_positions(self, count: int) -> Array:
        """int64: where the question stands, or just before the RoPE table ends."""
        # Beyond the table there is no rotation. Only scores come of these positions, no KV.
        start = min(self.region.task.plan.question_start, self.rope.positions - count)
        return np.arange(start, start + count)
