"""The plain way: dense torch operations, the backend's own attention. Any device; our twin.

Shape legend: E tokens of the blended region, A of its plan, Q question tokens, F tokens that run
before them, T tokens of a pass, K layers loaded at once, G KV heads, H query heads, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cacheblend_kernels import question_attention
from cacheblend_rag.engine import compat, layout
from cacheblend_rag.engine.attention import PagedCache, dense_causal, own_options, visible
from cacheblend_rag.engine.correction import Correction
from cacheblend_rag.engine.executor import BlendExecutor, Region
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.engine.upload import upload
from cacheblend_rag.select import AskedLayers

# Bytes of layers taken together: operations have fixed costs, and a CPU's cache still holds these.
_AT_ONCE = {"cpu": 4 << 20, "cuda": 64 << 20}


class TorchExecutor(BlendExecutor):
    """See ``BlendExecutor``."""

    def __init__(
        self, region: Region, handle: ModelHandle, rope: Rerotator, cache: PagedCache
    ) -> None:
        super().__init__(region, handle, rope, cache)
        self._delta = rope.delta(
            upload(region.old_E, self.device), torch.arange(region.end, device=self.device)
        )
        self._correction: Correction | None = None
        self._new = slice(0, 0)  # the tokens that are placed
        self._placed: set[int] = set()  # layers
        self._slots = self._moved_slots = torch.empty(0, dtype=torch.int64, device=self.device)
        self._first = 0  # of the layers held
        self._k_KEGD = self._v_KEGD = torch.empty(0, device=self.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [E, G, D] of layer ``index``, keys at their new positions; zeros in holes."""
        if not self._first <= index < self._first + len(self._k_KEGD):
            kept, end = self.handle.layout, self.region.end
            dtype = self.handle.config.model_config.dtype
            nbytes = math.prod(kept.shape(1, end)) * dtype.itemsize
            # Layers are asked for in ascending order, so the next ones come with this one.
            at_once = 1 if kept.by_layer else max(1, _AT_ONCE[self.device.type] // nbytes)
            last = min(index + at_once, self.handle.num_layers)
            kv = torch.zeros(kept.shape(last - index, end), dtype=dtype, device=self.device)
            for start, end, offset, _, chunk in self.region.spans:
                stored = chunk.kv_L2NHD[index:last, :, offset : offset + end - start]
                kv[:, :, start:end].copy_(stored, non_blocking=True)
            self._first = index
            some = slice(index, last)
            k, self._v_KEGD = kept.split(kv, index)
            self._k_KEGD = self.rope.apply(k, self._delta, some)
        return self._k_KEGD[index - self._first], self._v_KEGD[index - self._first]

    def open(self, blocks: Sequence[int], low: int, high: int) -> None:
        self._blocks, self._new = blocks, slice(low, high)
        self._placed = set()
        # Anew with every step: more blocks are there, and all layers are placed for the new tokens.
        table = torch.tensor(blocks)
        self._slots = self._cache.slots(table, torch.arange(low, high))
        if self._correction is not None:
            moved = self._correction.moved_N
            self.go_on(high < self.region.end)
            self._moved_slots = self._cache.slots(table, moved[moved < high].cpu())

    def place(self, layers: range) -> None:
        for index in layers:
            # Holes are written as well, as zeros: their tokens are rows of this step or a later
            # one, which overwrite them before anybody reads there.
            if index not in self._placed and self._new.start < self._new.stop:
                k, v = self.layer(index)
                self.handle.write(index, k[self._new], v[self._new], self._slots)
            self._placed.add(index)

    def ask(self, question: Sequence[int], layers: AskedLayers, most_glue: int) -> torch.Tensor:
        glue = self.region.glue(most_glue)
        along = self.region.along(glue, layers)
        along_F = upload(along, self.device)
        positions_Q = upload(self._question_positions(len(question)), self.device)
        is_glue_F = upload(np.isin(along, glue), self.device)
        step = _QuestionPass(self, along_F, is_glue_F, positions_Q, layers)
        ids = torch.cat([self.ids_E[along_F], upload(np.array(question), self.device)])
        self.handle.run(step, ids, torch.cat([along_F, positions_Q]))
        return F.pad(step.score_A, (0, self.region.end - self.region.asked))

    def _reused(self, index: int, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.layer(index)
        return k[at], v[at]

    def correct(
        self, candidate_E: torch.Tensor, chosen: torch.Tensor, propagation_length: int
    ) -> None:
        self._correction = Correction(self, candidate_E, chosen, propagation_length)

    def propagator(
        self, tile: torch.Tensor
    ) -> Callable[[int, torch.Tensor, torch.Tensor], None] | None:
        return functools.partial(self._move, tile) if self._correction else None

    def moved(
        self, tile: torch.Tensor, index: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V of the tokens ``moved_N`` at layer ``index``, as those of the tokens at ``tile``
        and before say; None where they say nothing.
        """
        if self._correction is None:
            return None
        # From the stored KV, not from what an earlier step moved: the sums of all steps so far are
        # in it.
        return self._correction.propagate(index, tile, (k, v), self.layer(index))

    def go_on(self, goes_on: bool) -> None:
        """Whether later passes ask what was moved, too."""
        if self._correction is not None:
            self._correction.goes_on = goes_on

    @property
    def moved_N(self) -> torch.Tensor:
        """int64 positions of the tokens that recomputed ones move."""
        return self.ids_E[:0] if self._correction is None else self._correction.moved_N

    def _move(self, tile: torch.Tensor, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        moved = self.moved(tile, index, k, v)
        count = len(self._moved_slots)  # the others have no blocks yet
        if moved is not None and count:
            self.handle.write(index, moved[0][:count], moved[1][:count], self._moved_slots)


class _QuestionPass(Pass):
    """Question and tokens between chunks over the reused KV; sums the question's attention.

    Its own K and V stay out of the paged cache: the tokens between chunks are computed again, over
    the blended KV, by vLLM's step.
    """

    def __init__(
        self,
        executor: TorchExecutor,
        along_F: torch.Tensor,
        is_glue_F: torch.Tensor,
        positions_Q: torch.Tensor,
        layers: AskedLayers,
    ) -> None:
        self._executor, self._layers, self.last = executor, layers, layers.summed[-1]
        self._num_along, self._glue_rows = len(along_F), is_glue_F.nonzero().flatten()
        self._glue = along_F[is_glue_F]
        end, device = executor.region.asked, executor.device
        self._query_pos = torch.cat([along_F, positions_Q])
        self._key_pos = torch.cat([torch.arange(end, device=device), positions_Q])
        self._known = torch.ones(len(self._key_pos), dtype=torch.bool, device=device)
        self._known[:end] = upload(executor.region.stored_E[:end], device)
        self._known[self._glue] = True
        self._masks: dict[compat.Sight, torch.Tensor] = {}
        self.score_A = torch.zeros(end, device=device)

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        n, sight = self._num_along, compat.sight(layer)
        end = len(self.score_A)
        q_THD = compat.plain_query(layer, q_THD, k_TGD)
        if index < self._layers.sees_from:
            mask = visible(self._query_pos, self._query_pos, sight)
            out_THD.copy_(dense_causal(layer, q_THD, k_TGD, v_TGD, mask))
            return
        stored_k, stored_v = self._executor.layer(index)
        k, v = torch.cat([stored_k[:end], k_TGD[n:]]), torch.cat([stored_v[:end], v_TGD[n:]])
        # The tokens between chunks see one another and the chunks, as in the prompt.
        k[self._glue], v[self._glue] = k_TGD[self._glue_rows], v_TGD[self._glue_rows]
        mask = self._mask(sight)
        if index not in self._layers.summed:
            out_THD.copy_(dense_causal(layer, q_THD, k, v, mask))
            return
        if n:
            out_THD[:n] = dense_causal(layer, q_THD[:n], k, v, mask[:n])
        k, v = layout.of_heads(layer, k, v)
        out_THD[n:], score = question_attention(q_THD[n:], k, v, mask[n:], **own_options(layer))
        self.score_A += score[:end]
        if index == self.last:
            self.stop()

    def _mask(self, sight: compat.Sight) -> torch.Tensor:
        if sight not in self._masks:
            self._masks[sight] = visible(self._query_pos, self._key_pos, sight) & self._known
        return self._masks[sight]
