"""The quick way on a GPU: our kernels over the paged cache itself, KV arriving on a copy stream.

Chunk KV travels in groups of layers through a few staging buffers while whatever comes first
computes; each layer is re-rotated and scattered by one launch just before it is needed. Nothing
here waits for the GPU, and nothing on the host grows with the context but one index per token.
Small uploads come before most of the transfer: they queue behind what of it was begun.

Shape legend: E tokens of the blended region, A of its plan, N tokens to place, S source chunks, L
layers, G KV heads, D head size, T tokens of a pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cacheblend_kernels.angles import rotation_deltas
from cacheblend_kernels.paged import PagedKV, Propagation
from cacheblend_kernels.rotate_and_scatter import Sources, rotate_and_scatter
from cacheblend_rag.engine import compat, layout
from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.device_cache import DeviceCache
from cacheblend_rag.engine.executor import BlendExecutor, Region
from cacheblend_rag.engine.executors import ExecutorFactory
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.graphs import QuestionGraphs
from cacheblend_rag.engine.isolated import prefill_seconds
from cacheblend_rag.engine.kernel_pass import NEVER, NOWHERE, PassRows, PropagationHook
from cacheblend_rag.engine.latent_pass import check, question_pass
from cacheblend_rag.engine.rope import Rerotator, RotationDelta
from cacheblend_rag.engine.staging import Staging
from cacheblend_rag.engine.upload import Array, upload, upload_all
from cacheblend_rag.select import AskedLayers
from cacheblend_rag.select.query import QuerySelector
from cacheblend_rag.store.base import ChunkKV

# Of the question over latents, from the dense twin. Rounding to 16 bits comes to a few thousandths,
# and a projection of eight bits, which the twin has, to a few hundredths.
_LATENT_BOUND = 0.1


class KernelsUnusableError(Exception):
    """Why this engine's cache can't be used by our kernels; the plain way serves it."""


class KernelCache:
    """Views of every layer's paged cache, shown to be right by writing through the backend.

    Attributes:
        address_L2: int64 device addresses of each layer's K and V view.
        bytes_per_token: of KV over all layers, on this rank.
        is_aligned: each token's K and V of a head begin at multiples of 16 bytes.

    Raises:
        KernelsUnusableError: a cache of another layout or dtype than the kernels know.
    """

    def __init__(self, handle: ModelHandle, block_size: int) -> None:
        dtype = handle.config.model_config.dtype
        self._block_size = block_size
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, layer in enumerate(handle.layers):
            if layer.kv_cache.dtype != dtype:
                raise KernelsUnusableError(
                    f"layer {index} has a paged cache of {layer.kv_cache.dtype}"
                )
            k, v = _views(index, layer, handle.layout.parts)
            if k.stride(-1) != 1 or self._block_size % k.shape[1]:
                raise KernelsUnusableError(f"layer {index} has a paged cache of another layout")
            self._views.append((k, v))
            if (k.stride(), v.stride()) != tuple(x.stride() for x in self._views[0]):
                raise KernelsUnusableError(f"layer {index} has other strides than the first one")
            # Wrong views would not fail: they would serve other tokens' KV.
            self._check(handle, index)
        k = self._views[0][0]
        size = k.element_size()
        rows = [n * size for view in self._views[0] for n in (*view.stride()[:-1], view.shape[-1])]
        starts = [view.data_ptr() for views in self._views for view in views]
        self.is_aligned = not any(n % 16 for n in (*rows, *starts))
        self.bytes_per_token = handle.layout.parts * len(self._views) * k[0, 0].numel() * size
        # Addresses, since kernels take no list of tensors: one launch places many layers.
        self.address_L2 = torch.tensor(
            [[k.data_ptr(), v.data_ptr()] for k, v in self._views], device=handle.device
        )

    def table(self, blocks: Sequence[int]) -> Array:
        """int32 block table for the kernels, whose blocks may be smaller than the scheduler's."""
        assert all(blocks), "a blend would write into the null block, which all requests share"
        # Some backends cut the scheduler's blocks into smaller ones, which follow one another.
        parts = self._block_size // self.tokens_a_block
        table = np.array(blocks, dtype=np.int32)[:, None] * parts
        return (table + np.arange(parts, dtype=np.int32)).ravel()

    @property
    def tokens_a_block(self) -> int:
        """Of the backend's blocks, which ``table`` numbers."""
        return self._views[0][0].shape[1]

    def view(self, index: int, table: torch.Tensor, length: torch.Tensor, most: int) -> PagedKV:
        """Layer ``index`` as a request with these blocks sees it."""
        return PagedKV(*self._views[index], table, length, most)

    def _check(self, handle: ModelHandle, index: int) -> None:
        """What the backend writes into block 0, which no request uses, must be where we look."""
        k, v = self._views[index]
        size = k.shape[1]
        # Random numbers, which a cache of zeros, or one of another dtype, does not hold by chance.
        shape = handle.layout.shape(1, size)
        written = torch.randn(shape, device=handle.device).to(k.dtype)
        new_k, new_v = (part[0] for part in handle.layout.split(written, index))
        slots = torch.arange(size, device=handle.device)
        handle.write(index, new_k, new_v, slots)
        if not (torch.equal(k[0], new_k) and torch.equal(v[0], new_v)):
            raise KernelsUnusableError(f"layer {index} has a paged cache of another layout")
        if handle.layout.parts == 1:
            self._check_latents(handle, index)

    def _check_latents(self, handle: ModelHandle, index: int) -> None:
        """What the question gets of latents must be what the layer itself makes of them."""
        size, one = self.tokens_a_block, torch.zeros(1, dtype=torch.int32, device=handle.device)
        try:
            error = check(handle, index, self.view(index, one, one, size))
        # A backend, a version or a quantisation may have none of what is asked of the layer.
        except Exception as failure:
            detail = f"the question over latents failed: {type(failure).__name__}: {failure}"
            raise KernelsUnusableError(detail) from failure
        if not error <= _LATENT_BOUND:  # NaN neither
            detail = f"the question over latents differs by {error:.3g} at layer {index}"
            raise KernelsUnusableError(detail)


def _views(index: int, layer: Any, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [B, S, G, D] of a layer's paged cache.

    Raises:
        KernelsUnusableError: it has another layout.
    """
    cache, heads, dim = layer.kv_cache, layer.num_kv_heads, layer.head_size
    if parts == 1 and cache.dim() == 3 and cache.shape[-1] == dim:  # a latent a token
        k = cache[:, :, None]
        return k, layout.no_values(k)
    # vLLM's layout has K and V of a head side by side: [blocks, heads, tokens, 2 * head size]. It
    # has changed between versions, so what is written through the backend is read back.
    if parts == 2 and cache.dim() == 4 and cache.shape[1] == heads and cache.shape[-1] == 2 * dim:
        k, v = cache.transpose(1, 2).split(dim, -1)
        return k, v
    raise KernelsUnusableError(f"layer {index} has a paged cache of {tuple(cache.shape)}")


class _OnDevice(NamedTuple):
    """What the kernels need to know of a request, on the device.

    Attributes:
        positions_N: int64, of the tokens that are placed; delta: their turns; sources: where their
            stored KV is; table: int32 block table; ends_2: int32, of the region and of its plan.
    """

    positions_N: torch.Tensor
    delta: RotationDelta
    sources: Sources
    table: torch.Tensor
    ends_2: torch.Tensor


class KernelExecutor(BlendExecutor):
    """See ``BlendExecutor``."""

    def __init__(
        self,
        region: Region,
        handle: ModelHandle,
        rope: Rerotator,
        cache: PagedCache,
        kernels: KernelCache,
        staging: Staging,
        graphs: QuestionGraphs,
        first: range,
    ) -> None:
        super().__init__(region, handle, rope, cache)
        self._kernels, self._graphs = kernels, graphs
        self._placed: set[int] = set()
        self._propagation: Propagation | None = None
        self._computed = 0  # tokens, in earlier forwards
        self._sources = {s.key: s.chunk for s in region.spans}
        self._host_table = kernels.table(region.task.blocks)
        # First of all, since the copies take longest. What is uploaded later gets in between.
        self._transfer = staging.begin(self._sources, first)

    @functools.cached_property
    def _there(self) -> _OnDevice:
        """What the kernels need to know of this request, uploaded when it is first wanted: the
        question's pass begins without it, and a GPU would wait for the host's work on it.
        """
        region, sources = self.region, self._sources
        # What vLLM's prefix cache holds is shared with other requests, and right already.
        new_E = region.stored_E.copy()
        new_E[: region.write_from] = False
        number = {key: i for i, key in enumerate(sources)}
        chunk_E = np.zeros(region.end, dtype=np.int64)
        for s in region.spans:
            chunk_E[s.start : s.end] = number[s.key]
        at = new_E.nonzero()[0]
        rows = np.stack([at, region.old_E[at], chunk_E[at], region.offset_E[at]])
        lengths = np.array([[len(chunk.token_ids) for chunk in sources.values()]], dtype=np.int64)
        # All in one upload: each takes the host as long as a kernel or two.
        rows_4N, addresses, table, ends_2 = upload_all(
            [
                rows,
                np.concatenate([self._transfer.address_LS, lengths]),
                self._host_table,
                np.array([region.end, region.asked], dtype=np.int32),
            ],
            self.device,
        )
        positions_N, old_N, chunk_N, row_N = rows_4N
        return _OnDevice(
            positions_N,
            RotationDelta(*rotation_deltas(*self.rope.tables, old_N, positions_N)),
            Sources(addresses[:-1], addresses[-1], chunk_N.int(), row_N.int()),
            table,
            ends_2,
        )

    def view(self, index: int) -> PagedKV:
        """This request's paged cache of layer ``index``."""
        table, ends_2 = self._there.table, self._there.ends_2
        return self._kernels.view(index, table, ends_2[:1], self.region.end)

    def _question_view(self, index: int) -> PagedKV:
        """The same as the question sees it."""
        table, ends_2 = self._there.table, self._there.ends_2
        return self._kernels.view(index, table, ends_2[1:], self.region.asked)

    def _slots(self, positions: Array) -> Array:
        """int64 slots of ``positions``, as the backend counts them."""
        size = self._kernels.tokens_a_block
        block = self._host_table[positions // size].astype(np.int64)
        slots: Array = block * size + positions % size
        return slots

    def give_up(self) -> None:
        self._transfer.give_up()

    def resume(self) -> None:
        self._transfer.resume()

    def open(self, blocks: Sequence[int], low: int, high: int) -> None:
        """All blocks are there from the start, so all is placed at once."""

    def place(self, layers: range) -> None:
        while not self._placed.issuperset(layers):
            # All layers that came together are placed by one launch: launches cost more than the
            # layers.
            arrived = self._transfer.arrive()
            for table in range(self.rope.num_tables):
                self._place(table, self.rope.layers(table, arrived))
            self._transfer.used()
            self._placed.update(arrived)

    def _place(self, table: int, layers: slice | torch.Tensor) -> None:
        """Layers that turn by one table, in one launch."""
        there = self._there
        rotate_and_scatter(
            there.sources._replace(address_KC=there.sources.address_KC[layers]),
            there.delta.cos_TNP[table],
            there.delta.sin_TNP[table],
            there.positions_N,
            self.view(0),
            self._kernels.address_L2[layers],
            is_neox=self.rope.is_neox,
            first=self.rope.first,
            is_aligned=self._kernels.is_aligned and self._transfer.is_aligned,
        )

    def ask(self, question: Sequence[int], layers: AskedLayers, most_glue: int) -> torch.Tensor:
        region, beyond = self.region, self.region.end - self.region.asked
        self._transfer.hold()
        glue = region.glue(most_glue)
        # Shared blocks hold those before. The pass writes K and V of its tokens, so they must not
        # be among them.
        glue = glue[glue >= region.write_from]
        known = region.stored_E[: region.asked].copy()
        known[: region.write_from] = True
        known[glue] = True
        rows_5T = self._pass_rows(question, glue, layers)
        # Graphs are captured without a mask of known tokens. Where a chunk is missing, the pass
        # runs as it is.
        if known.all():
            here, before = (lambda: self._question_view(0)), self._place_read(layers)
            score = self._graphs.ask(rows_5T, layers, region.asked, here, before)
            if score is not None:
                return F.pad(score, (0, beyond))
        known_A = None if known.all() else upload(known, self.device)
        rows = PassRows(*upload(rows_5T, self.device))
        groups = self.handle.layers[0].num_kv_heads
        by_head = torch.zeros(groups, region.asked, device=self.device)
        before = self._place_read(layers)
        view = self._question_view
        step = question_pass(self.handle, view, rows, known_A, by_head, layers, before)
        self.handle.run(step, rows.ids, rows.positions)
        return F.pad(by_head.sum(0), (0, beyond))

    def _pass_rows(self, question: Sequence[int], glue: Array, layers: AskedLayers) -> Array:
        """``PassRows`` of the question's pass."""
        along = self.region.along(glue, layers)
        n, behind = len(along), self._question_positions(len(question))
        rows_5T = np.full((5, n + len(question)), NOWHERE)
        ids, positions, asking, key_position, slots = rows_5T
        ids[:n], ids[n:] = [self.region.task.token_ids[i] for i in along], question
        positions[:n], positions[n:] = along, behind
        asking[n:] = key_position[n:] = behind
        # A token of the context is in the paged cache, and must not be seen a second time as an
        # extra key.
        key_position[:n] = NEVER
        slots[:n] = np.where(np.isin(along, glue), self._slots(along), NOWHERE)
        return rows_5T

    def _place_read(self, layers: AskedLayers) -> Callable[[int], None]:
        """What comes before a layer of the question's pass: those that it reads are placed."""
        return lambda index: self.place(range(layers.sees_from, index + 1))

    def _reused(self, index: int, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.view(index).gather(at)

    def correct(
        self, candidate_E: torch.Tensor, chosen: torch.Tensor, propagation_length: int
    ) -> None:
        chosen_E = torch.zeros_like(candidate_E).index_fill_(0, chosen, True)
        chunk_E = self.span_E.int().masked_fill(~candidate_E, -1)
        # Prefix sums: by them a kernel finds the recomputed tokens near a position without a
        # search.
        before = torch.zeros(self.region.end + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(chosen_E, 0, dtype=torch.int32, out=before[1:])
        reused_E = chunk_E.masked_fill(chosen_E, -1)
        none_2 = torch.zeros(2, dtype=torch.int32, device=self.device)
        propagation_length_1 = torch.full((1,), float(propagation_length), device=self.device)
        self._propagation = Propagation(
            reused_E, chosen, chunk_E[chosen], before, none_2, propagation_length_1
        )

    def propagator(
        self, tile: torch.Tensor
    ) -> Callable[[int, torch.Tensor, torch.Tensor], None] | None:
        if self._propagation is None:
            return None
        propagation = self._propagation._replace(
            pass_2=torch.full_like(self._propagation.pass_2, len(tile))
        )
        # Filled on the device, not copied from the host, which would wait.
        propagation.pass_2[:1].fill_(self._computed)
        self._computed += len(tile)
        return PropagationHook(propagation, self.rope, self.view)


class KernelExecutorFactory(ExecutorFactory):
    """Makes ``KernelExecutor``s, which share the kernels' views, the copy stream and the device
    cache.

    Raises:
        KernelsUnusableError: see ``KernelCache``.
    """

    def __init__(
        self, handle: ModelHandle, rope: Rerotator, cache: PagedCache, gpu_cache: int
    ) -> None:
        super().__init__(handle, rope, cache, "")
        if handle.layout.by_layer:
            raise KernelsUnusableError("KV heads differ in number or size by layer")
        if any(compat.sight(layer).chunk is not None for layer in handle.layers):
            raise KernelsUnusableError("layers attend within chunks of positions")
        if handle.config.lora_config is not None:  # a graph has the adapter it was captured with
            raise KernelsUnusableError("LoRA is on")
        if not rope.has_one_layout:
            raise KernelsUnusableError("layers rotate different dimensions of their keys")
        # Of latents, the last dimensions are.
        behind = rope.first and rope.first + 2 * rope.pairs < handle.layout.dim
        if behind or (rope.first and handle.layout.parts == 2):
            raise KernelsUnusableError(f"keys are rotated from dimension {rope.first} on")
        if any(compat.sinks(layer) is not None for layer in handle.layers):
            raise KernelsUnusableError("the model's attention has sinks")
        if handle.layout.parts == 1 and any(map(compat.sliding_window, handle.layers)):
            raise KernelsUnusableError("layers of latents have windows")
        self._kernels = KernelCache(handle, cache.block_size)
        self._device_cache = DeviceCache(gpu_cache, handle.device)
        self._staging = Staging(handle.device, handle.num_layers, self._device_cache)
        self._graphs = QuestionGraphs(handle, self._kernels.view, cache.block_size)
        # With the default selector. Other layers are captured when they are first asked for.
        self._graphs.prepare(QuerySelector().evidence.among(handle.sees_all))

    def __call__(self, region: Region, first: range) -> BlendExecutor:
        # Kernels place all tokens of a layer at once, and these have no blocks yet.
        if len(region.task.blocks) * self._cache.block_size < region.end:
            self._staging.unstage()  # it was brought for kernels
            return super().__call__(region, first)  # its blocks come with later steps
        return KernelExecutor(
            region,
            self._handle,
            self._rope,
            self._cache,
            self._kernels,
            self._staging,
            self._graphs,
            first,
        )

    def stage(self, sources: Mapping[str, ChunkKV], first: range) -> None:
        with torch.inference_mode():  # as everything that writes the same memory
            self._staging.stage(sources, first)

    def unstage(self) -> None:
        self._staging.unstage()

    def costs(self) -> dict[str, float]:
        if not self._handle.ranks.alone:
            return {}
        ask = self._graphs.seconds(64)
        # A recomputed token is a row of a step, so it costs what a prefilled one does.
        prefill = prefill_seconds(self._handle)
        return {
            "prefill_s": prefill,
            "recompute_s": prefill,
            "blend_s": ask or 0.0,  # without graphs it is found from end to end
            "load_s": self._staging.seconds_per_byte() * self._kernels.bytes_per_token,
        }

    def resident(self, key: str) -> ChunkKV | None:
        return self._device_cache.complete(key)

    def forget(self, key: str) -> None:
        self._device_cache.discard(key)
