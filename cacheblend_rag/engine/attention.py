"""Attention of the passes: over the paged cache through the backend's own kernel, or dense."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata

from cacheblend_kernels import masked_attention
from cacheblend_rag.engine import compat, layout
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.upload import Array, upload


def visible(q_pos_R: torch.Tensor, k_pos_N: torch.Tensor, sight: compat.Sight) -> torch.Tensor:
    """bool [R, N]: a query sees keys at its own and earlier positions, as far as its layer does."""
    distance = q_pos_R[:, None] - k_pos_N[None]
    mask = distance >= 0
    if sight.window is not None:
        mask &= distance < sight.window
    if sight.chunk is not None:
        mask &= q_pos_R[:, None] // sight.chunk == k_pos_N[None] // sight.chunk
    return mask


def dense_causal(
    layer: Any,
    q_RHD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    visible_RN: torch.Tensor,
) -> torch.Tensor:
    """[R, H, D]: attention with a layer's own scale, softcap and sinks."""
    k, v = layout.of_heads(layer, k_NGD, v_NGD)
    return masked_attention(q_RHD, k, v, visible_RN, **own_options(layer))


def own_options(layer: Any) -> dict[str, Any]:
    """Scale, softcap and sinks of a layer, for dense attention."""
    return {
        "scale": layer.impl.scale,
        "softcap": compat.softcap(layer),
        "sinks_H": compat.sinks(layer),
    }


class PagedCache:
    """The request's view of the paged cache, and the backend's kernel over scattered queries.

    Every maximal run of consecutive positions is passed off as one sequence: its queries are the
    run, its length the last position + 1, its blocks the request's. So each query attends by its
    position to the whole fused KV before it, with any backend, KV dtype, window and softcap.
    """

    def __init__(self, handle: ModelHandle, attn_groups: Any) -> None:
        self.handle = handle
        self._builders = _own_builders(attn_groups, handle)
        group_of = {name: n for _, names, n in self._builders for name in names}
        # of each layer, the number of the KV cache group that has its block table
        self.groups = [group_of[name] for name in handle.attention]
        # Kernels of latent attention see a context behind one query only, and some behind many.
        self._row_by_row = layout.is_latent(handle.layers[0]) and not all(
            compat.takes_any_run(builder) for builder, *_ in self._builders
        )
        # not the configured size: vLLM may give layers with a window another one
        self.block_size = int(attn_groups[0][0].kv_cache_spec.block_size)

    def slots(self, blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int64 slots of ``positions`` on the device; both arguments on the CPU."""
        size = self.block_size
        block = blocks[positions // size]
        assert bool(block.all()), "these are slots of the null block, which all requests share"
        return (block * size + positions % size).to(self.handle.device)

    def metadata(
        self, blocks: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> list[Any]:
        """Each layer's backend metadata for queries at sorted ``positions`` (CPU)."""
        # On the CPU on purpose: builders want the lengths there, and to fetch them from a GPU would
        # wait for all that it has queued.
        new_run = torch.ones(len(positions), dtype=torch.bool)
        new_run[1:] = positions[1:] != positions[:-1] + 1
        starts = new_run.nonzero().flatten()
        bounds = torch.cat([starts, torch.tensor([len(positions)])]).numpy()
        lengths = (positions[bounds[1:] - 1] + 1).numpy()
        table = blocks.to(torch.int32)[None].expand(len(lengths), -1).contiguous()
        device = self.handle.device
        built = self.build(bounds, lengths, table.to(device), slots, positions.to(device))
        return [built[name] for name in self.handle.attention]

    def build(
        self,
        bounds_S: Array,
        lengths_S: Array,
        table_SB: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> dict[str, Any]:
        """Each layer's backend metadata, by the layer's name, for sequences packed one after
        another: where each begins and the last ends, and how long its context is; their block
        tables, and slots and positions of all rows, on the device.
        """
        if self._row_by_row:
            bounds_S, lengths_S, table_SB = _one_by_one(bounds_S, lengths_S, table_SB)
        bounds = torch.from_numpy(bounds_S.astype(np.int32))
        lengths = torch.from_numpy(lengths_S.astype(np.int32))
        common = CommonAttentionMetadata(
            query_start_loc=upload(bounds, self.handle.device),
            query_start_loc_cpu=bounds,
            seq_lens=upload(lengths, self.handle.device),
            num_reqs=len(lengths),
            num_actual_tokens=int(bounds[-1]),
            max_query_len=int((bounds[1:] - bounds[:-1]).max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table_SB,
            slot_mapping=slots,
            causal=True,
            positions=positions,
            seq_lens_cpu_upper_bound=lengths,
        )
        layers = {}
        for builder, names, _ in self._builders:
            layers.update(dict.fromkeys(names, builder.build(0, common)))
        return layers


class PagedPass(Pass):
    """Write each layer's K and V of these tokens into the cache, then attend over the cache.

    Stops after writing the last layer. ``before`` is called with each layer's number before the
    layer is touched, ``fresh`` with it and its fresh K and V.
    """

    def __init__(
        self,
        cache: PagedCache,
        blocks: torch.Tensor,
        positions: torch.Tensor,
        *,
        before: Callable[[int], None] | None = None,
        fresh: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        self._cache, self._before, self._fresh = cache, before, fresh
        self.last = cache.handle.num_layers - 1
        self._slots = cache.slots(blocks, positions)
        self._metadata = cache.metadata(blocks, positions, self._slots)

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        if self._before is not None:
            self._before(index)
        if self._fresh is not None:
            self._fresh(index, k_TGD, v_TGD)
        self._cache.handle.write(index, k_TGD, v_TGD, self._slots)
        if index == self.last:
            self.stop()
        real = self._cache.handle.layers[index]
        # Read by the backend through its own metadata, so sinks, windows, soft caps and caches of
        # eight bits are its business.
        metadata = self._metadata[index]
        layout.attend(real, q_THD, k_TGD, v_TGD, metadata, out_THD)


def _one_by_one(
    bounds_S: Array, lengths_S: Array, table_SB: torch.Tensor
) -> tuple[Array, Array, torch.Tensor]:
    """The same queries, each a sequence of its own. The cache holds what all of them see by the
    time they attend.
    """
    counts = np.diff(bounds_S)
    behind = np.repeat(bounds_S[1:], counts) - 1 - np.arange(bounds_S[-1])
    whose = np.repeat(np.arange(len(counts)), counts)
    rows = np.arange(len(whose) + 1)
    return rows, lengths_S[whose] - behind, table_SB[torch.from_numpy(whose).to(table_SB.device)]


def _own_builders(attn_groups: Any, handle: ModelHandle) -> list[tuple[Any, list[str], int]]:
    """A metadata builder for each kind of attention (sliding windows are another), the names of
    its layers, and the number of their KV cache group.

    Never the runner's own builders: on a GPU they fill static CUDA graph buffers that the step
    about to run has already prepared.
    """
    # Copies all the way down to what is changed: the engine goes on to use the original.
    own = copy.copy(handle.config)
    own.compilation_config = copy.copy(own.compilation_config)
    own.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    most = own.scheduler_config.max_num_batched_tokens
    kinds = [(kind, n) for n, group in enumerate(attn_groups) for kind in group]
    reads_latents = all(compat.takes_any_run(kind.backend.get_builder_cls()) for kind, _ in kinds)
    if not reads_latents:  # which has no buffers by sequence
        # builders may size buffers by it, and every run of a blend's rows is a sequence
        own.scheduler_config = copy.copy(own.scheduler_config)
        own.scheduler_config.max_num_seqs = most
    builders, known = [], {*handle.attention, *handle.sharing}
    with set_current_vllm_config(own):
        for kind, number in kinds:
            names = [name for name in kind.layer_names if name in known]
            if names:  # the others are a draft model's
                cls = kind.backend.get_builder_cls()
                builder = cls(kind.kv_cache_spec, names, own, handle.device)
                builders.append((builder, names, number))
    for builder, *_ in builders:
        compat.read_latents(builder, most)
    return builders
