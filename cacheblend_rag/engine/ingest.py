"""Computing the KV of chunks: each alone behind the ingest prefix, or behind its head and what the
chunk's own document has before it; many in one forward.

Shape legend: T tokens of the pass, N tokens of a chunk, S prefix tokens, L layers, G KV heads,
H query heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.attention import dense_causal, visible
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.lane import upload
from cacheblend_rag.engine.outcome import gpu_seconds
from cacheblend_rag.store.base import ChunkKV

Span = tuple[int, int]


class LayerKV(NamedTuple):
    """Keys and values of one layer, [T, G, D] each."""

    k_TGD: torch.Tensor
    v_TGD: torch.Tensor


class IsolatedPass(Pass):
    """Causal attention within each span and over a shared prefix; hands out every layer's K and V.

    Spans are half-open intervals of the pass's tokens. A span's tokens stand at positions
    ``first_position`` and following, right behind the prefix. ``keep`` gets each layer's K and V
    (the model's own memory, to be copied); by default they are collected in ``layers``.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        num_layers: int,
        *,
        prefix: Sequence[LayerKV] = (),
        first_position: int = 0,
        keep: Callable[[int, LayerKV], None] | None = None,
    ) -> None:
        self._spans, self._last, self._prefix = spans, num_layers - 1, prefix
        self._first = first_position
        self._keep = keep or self._collect
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self._packed: _Packed | None = None
        self.layers: list[LayerKV] = []

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        self._keep(index, LayerKV(k_TGD, v_TGD))
        if index == self._last:
            self.stop()
        flash = compat.flash_attention(layer)
        if flash is not None:
            self._attend_packed(flash, index, layer, q_THD, k_TGD, v_TGD, out_THD)
            return
        window = compat.sliding_window(layer)
        for a, b in self._spans:
            k, v = k_TGD[a:b], v_TGD[a:b]
            if self._prefix:
                k = torch.cat([self._prefix[index].k_TGD, k])
                v = torch.cat([self._prefix[index].v_TGD, v])
            mask = self._mask(b - a, window, k.device)
            out_THD[a:b] = dense_causal(layer, q_THD[a:b], k, v, mask)

    def _attend_packed(
        self,
        flash: Callable[..., Any],
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        """All spans in one kernel; the prefix is repeated before each."""
        if self._packed is None:
            behind = self._prefix[0].k_TGD.shape[0] if self._prefix else 0
            self._packed = _Packed.of(self._spans, behind, k_TGD.device)
        p = self._packed
        if self._prefix:
            k_TGD = torch.cat([self._prefix[index].k_TGD, k_TGD])[p.keys]
            v_TGD = torch.cat([self._prefix[index].v_TGD, v_TGD])[p.keys]
        window = compat.sliding_window(layer)
        flash(
            q=q_THD,
            k=k_TGD,
            v=v_TGD,
            out=out_THD,
            cu_seqlens_q=p.query_bounds,
            cu_seqlens_k=p.key_bounds,
            max_seqlen_q=p.most_queries,
            max_seqlen_k=p.most_keys,
            softmax_scale=layer.impl.scale,
            window_size=[window - 1, 0] if window is not None else None,
            softcap=compat.softcap(layer),
        )

    def _collect(self, index: int, kv: LayerKV) -> None:
        self.layers.append(LayerKV(kv.k_TGD.clone(), kv.v_TGD.clone()))

    def _mask(self, num_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
        key = (num_tokens, window)
        if key not in self._masks:
            behind = self._prefix[0].k_TGD.shape[0] if self._prefix else 0
            keys = torch.arange(self._first - behind, self._first + num_tokens, device=device)
            self._masks[key] = visible(keys[behind:], keys, window)
        return self._masks[key]


class _Packed(NamedTuple):
    """Spans as sequences of a packed attention, each with the prefix's S keys in front."""

    keys: torch.Tensor  # int64 rows of prefix and pass together
    query_bounds: torch.Tensor  # int32
    key_bounds: torch.Tensor  # int32
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, spans: Sequence[Span], behind: int, device: torch.device) -> _Packed:
        prefix = torch.arange(behind)
        rows = [torch.cat([prefix, torch.arange(a, b) + behind]) for a, b in spans]
        lengths = torch.tensor([[b - a, b - a + behind] for a, b in spans])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (0, 0, 1, 0)).int().T.contiguous()
        most = int(lengths[:, 0].max())
        query_bounds, key_bounds = upload(bounds, device)
        return cls(upload(torch.cat(rows), device), query_bounds, key_bounds, most, most + behind)


class Ingestor:
    """Computes chunks on one rank. The prefix runs once and is kept for the next batch."""

    def __init__(self, handle: ModelHandle) -> None:
        self._handle = handle
        self._prefix_ids: tuple[int, ...] = ()
        self._prefix: list[LayerKV] = []

    def compute(
        self,
        chunks: Sequence[Sequence[int]],
        prefix_ids: Sequence[int],
        contexts: Sequence[Sequence[int]],
    ) -> list[ChunkKV]:
        """KV of each chunk behind ``prefix_ids`` and its own context, which may be empty, on the
        CPU; that of prefix and contexts is dropped.
        """
        self._run_prefix(tuple(prefix_ids))
        first = len(prefix_ids)
        sequences = [(*c, *chunk) for c, chunk in zip(contexts, chunks, strict=True)]
        ends = list(itertools.accumulate(map(len, sequences)))
        spans = list(zip([0, *ends], ends, strict=False))
        kept = [(b - len(chunk), b) for chunk, b in zip(chunks, ends, strict=True)]
        host = _Host(kept, self._handle)
        step = IsolatedPass(
            spans,
            self._handle.num_layers,
            prefix=self._prefix,
            first_position=first,
            keep=host.copy,
        )
        ids = [token for sequence in sequences for token in sequence]
        positions = [first + i for sequence in sequences for i in range(len(sequence))]
        self._run(step, ids, positions)
        return [
            ChunkKV(tuple(chunk), first + len(context), kv)
            for chunk, context, kv in zip(chunks, contexts, host.arrived(), strict=True)
        ]

    def _run_prefix(self, prefix_ids: tuple[int, ...]) -> None:
        if prefix_ids == self._prefix_ids:
            return
        self._prefix = []
        if prefix_ids:
            n = len(prefix_ids)
            step = IsolatedPass([(0, n)], self._handle.num_layers)
            self._run(step, prefix_ids, range(n))
            self._prefix = step.layers
        self._prefix_ids = prefix_ids

    def _run(self, step: Pass, ids: Sequence[int], positions: Sequence[int]) -> None:
        both = upload(torch.tensor([list(ids), list(positions)]), self._handle.device)
        self._handle.run(step, both[0], both[1])


class _Host:
    """Host memory for the KV of spans of the pass's tokens, [L, 2, N, G, D] each; pinned, and
    filled by a stream of its own beside the forward, where it comes from a GPU.
    """

    def __init__(self, spans: Sequence[Span], handle: ModelHandle) -> None:
        layer, dtype = handle.layers[0], handle.config.model_config.dtype
        self._spans = spans
        on_gpu = handle.device.type == "cuda"
        self._stream = torch.cuda.Stream(handle.device) if on_gpu else None
        shape = (layer.num_kv_heads, layer.head_size)
        self._kv = [
            torch.empty(handle.num_layers, 2, b - a, *shape, dtype=dtype, pin_memory=on_gpu)
            for a, b in spans
        ]

    def copy(self, index: int, kv: LayerKV) -> None:
        """Take one layer's K and V of all spans."""
        if self._stream is None:
            self._split(index, kv)
            return
        own = LayerKV(kv.k_TGD.clone(), kv.v_TGD.clone())  # the model will reuse its memory
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._split(index, own)
        own.k_TGD.record_stream(self._stream)
        own.v_TGD.record_stream(self._stream)

    def _split(self, index: int, kv: LayerKV) -> None:
        for host, (a, b) in zip(self._kv, self._spans, strict=True):
            host[index, 0].copy_(kv.k_TGD[a:b], non_blocking=True)
            host[index, 1].copy_(kv.v_TGD[a:b], non_blocking=True)

    def arrived(self) -> list[torch.Tensor]:
        """Wait for the last copy."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._kv


def prefill_seconds(handle: ModelHandle) -> float:
    """Seconds a token of a plain prefill of medium length, on a GPU."""
    config = handle.config
    most = min(config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len)
    count = min(2048, int(most))
    ids = torch.zeros(count, dtype=torch.int64, device=handle.device)
    positions = torch.arange(count, device=handle.device)

    def run() -> None:
        step = IsolatedPass([(0, count)], handle.num_layers, keep=lambda index, kv: None)
        handle.run(step, ids, positions)

    return gpu_seconds(run) / count
