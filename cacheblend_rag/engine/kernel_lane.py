"""The quick way on a GPU: our kernels over the paged cache itself, KV arriving on a copy stream.

Chunk KV travels in groups of layers through a few staging buffers while whatever comes first
computes; each layer is re-rotated and scattered by one launch just before it is needed. Nothing
here waits for the GPU, and nothing on the host grows with the context but one index per token.

Shape legend: E tokens of the blended region, N tokens to place, S source chunks, L layers, G KV
heads, D head size, T tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cacheblend_kernels import key_deviation
from cacheblend_kernels.attention import Extra, question_scores, scattered_attention
from cacheblend_kernels.paged import PagedKV
from cacheblend_kernels.place import Sources, place
from cacheblend_rag.engine import compat
from cacheblend_rag.engine.attention import PagedCache, PagedPass
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.hot import HotChunks
from cacheblend_rag.engine.lane import Lane, Region, upload
from cacheblend_rag.engine.lanes import Lanes
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.engine.staging import Staging


class KernelsUnusableError(Exception):
    """Why this engine's cache can't be used by our kernels; the plain way serves it."""


class KernelCache:
    """Views of every layer's paged cache, shown to be right by writing through the backend.

    Raises:
        KernelsUnusableError: a cache of another layout or dtype than the kernels know.
    """

    def __init__(self, handle: ModelHandle) -> None:
        dtype = handle.config.model_config.dtype
        self._block_size = int(handle.config.cache_config.block_size)
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, layer in enumerate(handle.layers):
            cache = layer.kv_cache
            heads, dim = layer.num_kv_heads, layer.head_size
            if cache.dtype != dtype or cache.dim() != 4 or cache.shape[-1] != 2 * dim:
                raise KernelsUnusableError(
                    f"layer {index} has a paged cache of {tuple(cache.shape)} {cache.dtype}"
                )
            k, v = cache.transpose(1, 2).split(dim, -1)
            if k.shape[2] != heads or k.stride(-1) != 1 or self._block_size % k.shape[1]:
                raise KernelsUnusableError(f"layer {index} has a paged cache of another layout")
            self._views.append((k, v))
            self._check(handle, index)

    def table(self, blocks: Sequence[int], device: torch.device) -> torch.Tensor:
        """int32 block table for the kernels, whose blocks may be smaller than the scheduler's."""
        parts = self._block_size // self._views[0][0].shape[1]
        table = torch.tensor(blocks, dtype=torch.int32)[:, None] * parts
        return upload((table + torch.arange(parts, dtype=torch.int32)).flatten(), device)

    def view(self, index: int, table: torch.Tensor) -> PagedKV:
        """A request's view of layer ``index``."""
        return PagedKV(*self._views[index], table)

    def _check(self, handle: ModelHandle, index: int) -> None:
        """What the backend writes into block 0, which no request uses, must be where we look."""
        k, v = self._views[index]
        size = k.shape[1]
        shape = (2, size, *k.shape[2:])
        written = torch.randn(shape, device=handle.device).to(k.dtype)
        slots = torch.arange(size, device=handle.device)
        handle.write(index, written[0], written[1], slots)
        if not (torch.equal(k[0], written[0]) and torch.equal(v[0], written[1])):
            raise KernelsUnusableError(f"layer {index} has a paged cache of another layout")


class KernelLane(Lane):
    """See ``Lane``."""

    def __init__(
        self,
        region: Region,
        handle: ModelHandle,
        rope: Rerotator,
        cache: PagedCache,
        kernels: KernelCache,
        staging: Staging,
    ) -> None:
        super().__init__(region, handle, rope)
        self.kernels, self._cache = kernels, cache
        self.table = kernels.table(region.task.blocks, self.device)
        new_E = region.stored_E.clone()
        new_E[: region.write_from] = False
        positions = new_E.nonzero().flatten()
        sources = list({s.key: s.chunk for s in region.spans}.items())
        number = {key: i for i, (key, _) in enumerate(sources)}
        chunk_E = torch.zeros(region.end, dtype=torch.int64)
        for s in region.spans:
            chunk_E[s.start : s.end] = number[s.key]
        rows = [positions, region.old_E, chunk_E, region.offset_E]
        packed = upload(torch.stack([positions, *(r[positions] for r in rows[1:])]), self.device)
        self._positions_N, old_N, chunk_N, row_N = packed
        self._turn = rope.turn(old_N, self._positions_N)
        self._chunk_N, self._row_N = chunk_N.int(), row_N.int()
        self._transfer = staging.begin(sources)
        lengths = torch.tensor([len(chunk.token_ids) for _, chunk in sources])
        table = upload(torch.cat([self._transfer.address_LS, lengths[None]]), self.device)
        self._address_LS, self._length_S = table[:-1], table[-1]

    def view(self, index: int) -> PagedKV:
        """This request's paged cache of layer ``index``."""
        return self.kernels.view(index, self.table)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 slots of ``positions``, both on the device, as the backend counts them."""
        block, inside = self.view(0).slots(positions)
        return block * self.view(0).k_BSGD.shape[1] + inside

    def _place(self, index: int) -> None:
        self._transfer.wait(index)
        sources = Sources(self._address_LS[index], self._length_S, self._chunk_N, self._row_N)
        place(
            sources,
            self._turn.cos_NP,
            self._turn.sin_NP,
            self._positions_N,
            self.view(index),
            is_neox=self.rope.is_neox,
        )
        self._transfer.used(index)

    def ask(self, question: Sequence[int], keep: range, most_glue: int) -> torch.Tensor:
        glue = self.region.glue(most_glue)
        glue = glue[glue >= self.region.write_from]
        known = self.region.stored_E.clone()
        known[: self.region.write_from] = True
        known[glue] = True
        at = torch.cat([glue, self._question_positions(len(question))])
        ids = torch.cat([torch.tensor(self.region.task.token_ids)[glue], torch.tensor(question)])
        at, ids = upload(torch.stack([at, ids]), self.device)
        known_E = None if bool(known.all()) else upload(known, self.device)
        step = _QuestionPass(self, at, len(glue), known_E, keep)
        self.handle.run(step, ids, at)
        return step.score_GE.sum(0)

    def deviation(self, check: int, values: bool, tile: torch.Tensor) -> torch.Tensor:
        self.place_through(check)
        blocks = torch.tensor(self.region.task.blocks)
        step = PagedPass(self._cache, blocks, tile, check=check)
        at = upload(tile, self.device)
        self.handle.run(step, self.ids_E[at], at)
        assert step.checked is not None
        cached_k, cached_v = self.view(check).gather(at)
        k, v = step.checked
        distance = key_deviation(k, cached_k)
        return distance + key_deviation(v, cached_v) if values else distance

    def recompute(self, tile: torch.Tensor) -> None:
        self.handle.run(_SelectivePass(self, tile), self.ids_E[tile], tile)


class KernelLanes(Lanes):
    """Makes ``KernelLane``s, which share the kernels' views, the copy stream and the hot chunks.

    Raises:
        KernelsUnusableError: see ``KernelCache``.
    """

    def __init__(
        self, handle: ModelHandle, rope: Rerotator, cache: PagedCache, gpu_cache: int
    ) -> None:
        super().__init__(handle, rope, cache, "")
        self._kernels = KernelCache(handle)
        self._hot = HotChunks(gpu_cache, handle.device)
        self._staging = Staging(handle.device, handle.num_layers, self._hot)

    def __call__(self, region: Region) -> Lane:
        return KernelLane(
            region, self._handle, self._rope, self._cache, self._kernels, self._staging
        )

    def forget(self, key: str) -> None:
        self._hot.discard(key)


class _SelectivePass(Pass):
    """Chosen tokens over the fused KV; their K and V go into the cache first."""

    def __init__(self, lane: KernelLane, positions_T: torch.Tensor) -> None:
        self._lane, self._positions_T = lane, positions_T
        self._slots_T = lane.slots(positions_T)
        self._last = lane.handle.num_layers - 1

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        lane = self._lane
        lane.place_through(index)
        lane.handle.write(index, k_TGD, v_TGD, self._slots_T)
        if index == self._last:
            self.stop()
        scattered_attention(
            q_THD,
            self._positions_T,
            lane.view(index),
            lane.region.end,
            out_THD,
            scale=layer.impl.scale,
            softcap=compat.softcap(layer),
            window=compat.sliding_window(layer),
        )


class _QuestionPass(Pass):
    """Tokens between chunks, then the question, over the reused KV in the paged cache.

    The former are written there (the selective pass computes them again, over the blended KV); the
    question's own K and V stay outside.
    """

    def __init__(
        self,
        lane: KernelLane,
        positions_T: torch.Tensor,
        num_glue: int,
        known_E: torch.Tensor | None,
        keep: range,
    ) -> None:
        self._lane, self._positions_T, self._known_E, self._keep = lane, positions_T, known_E, keep
        self._num_glue = num_glue
        self._slots = lane.slots(positions_T[:num_glue])
        groups = lane.view(0).k_BSGD.shape[2]
        self.score_GE = torch.zeros(groups, lane.region.end, device=lane.device)

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        lane, n, at = self._lane, self._num_glue, self._positions_T
        lane.place_through(index)
        if n:
            lane.handle.write(index, k_TGD[:n], v_TGD[:n], self._slots)
        view, end = lane.view(index), lane.region.end
        options: dict[str, Any] = {
            "scale": layer.impl.scale,
            "softcap": compat.softcap(layer),
            "window": compat.sliding_window(layer),
            "known_N": self._known_E,
        }
        extra = Extra(k_TGD[n:], v_TGD[n:], at[n:])
        scored = index in self._keep
        lse = scattered_attention(
            q_THD, at, view, end, out_THD, extra=extra, want_lse=scored, **options
        )
        if lse is not None:
            question_scores(q_THD[n:], at[n:], lse[n:], view, end, self.score_GE, **options)
        if index == self._keep[-1]:
            self.stop()
