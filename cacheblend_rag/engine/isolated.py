"""Forwards over tokens whose attention stays among themselves: outside of the paged cache.

Shape legend: T tokens of the pass, S prefix tokens, G KV heads, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.attention import dense_causal, visible
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.outcome import gpu_seconds
from cacheblend_rag.engine.upload import upload

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
        self._spans, self.last, self._prefix = spans, num_layers - 1, prefix
        self._first = first_position
        self._keep = keep or self._collect
        self._masks: dict[tuple[int, compat.Sight], torch.Tensor] = {}
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
        # The last layer's attention goes nowhere: its K and V were all that was wanted.
        if index == self.last:
            self.stop()
        # Where the paged cache holds eight bits, vLLM has rounded the queries to fit it. Here K and
        # V are as the model computed them.
        q_THD = compat.plain_query(layer, q_THD, k_TGD)
        flash = compat.flash_attention(layer)
        if flash is not None:
            self._attend_packed(flash, index, layer, q_THD, k_TGD, v_TGD, out_THD)
            return
        sight = compat.sight(layer)
        for a, b in self._spans:
            k, v = k_TGD[a:b], v_TGD[a:b]
            if self._prefix:
                k = torch.cat([self._prefix[index].k_TGD, k])
                v = torch.cat([self._prefix[index].v_TGD, v])
            mask = self._mask(b - a, sight, k.device)
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
            # The kernel takes one run of keys for each sequence, so every span gets its own copy of
            # the prefix.
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
            # FlashAttention counts keys to the left of a query, without its own.
            window_size=[window - 1, 0] if window is not None else None,
            softcap=compat.softcap(layer),
        )

    def _collect(self, index: int, kv: LayerKV) -> None:
        self.layers.append(LayerKV(kv.k_TGD.clone(), kv.v_TGD.clone()))

    def _mask(self, num_tokens: int, sight: compat.Sight, device: torch.device) -> torch.Tensor:
        key = (num_tokens, sight)
        if key not in self._masks:
            behind = self._prefix[0].k_TGD.shape[0] if self._prefix else 0
            keys = torch.arange(self._first - behind, self._first + num_tokens, device=device)
            self._masks[key] = visible(keys[behind:], keys, sight)
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


def fresh_kv(
    handle: ModelHandle, ids_T: torch.Tensor, layers: int, most_tokens: int
) -> list[LayerKV]:
    """K and V of the first ``layers`` of a plain prefill that begins with these tokens, at most so
    many of them at once.
    """
    known: list[LayerKV] = []
    # vLLM has reserved the memory for a step of so many tokens, not for more.
    for ids in ids_T.split(most_tokens):
        first = known[0].k_TGD.shape[0] if known else 0
        step = IsolatedPass([(0, len(ids))], layers, prefix=known, first_position=first)
        handle.run(step, ids, torch.arange(first, first + len(ids), device=ids.device))
        known = (
            [
                LayerKV(torch.cat([a.k_TGD, b.k_TGD]), torch.cat([a.v_TGD, b.v_TGD]))
                for a, b in zip(known, step.layers, strict=True)
            ]
            if known
            else step.layers
        )
    return known


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
