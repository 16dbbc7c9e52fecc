"""Computing the KV of chunks: each alone behind the ingest prefix, many in one forward.

Shape legend: T tokens of the pass, N tokens of a chunk, S prefix tokens, L layers, G KV heads,
H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.attention import dense_causal, visible
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.store.base import ChunkKV


class LayerKV(NamedTuple):
    """Keys and values of one layer, [T, G, D] each."""

    k_TGD: torch.Tensor
    v_TGD: torch.Tensor


class IsolatedPass(Pass):
    """Causal attention within each span and over a shared prefix; keeps every layer's K and V.

    Spans are half-open intervals of the pass's tokens. A span's tokens stand at positions
    ``first_position`` and following, right behind the prefix.
    """

    def __init__(
        self,
        spans: Sequence[tuple[int, int]],
        num_layers: int,
        *,
        prefix: Sequence[LayerKV] = (),
        first_position: int = 0,
    ) -> None:
        self._spans, self._last, self._prefix = spans, num_layers - 1, prefix
        self._first = first_position
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
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
        self.layers.append(LayerKV(k_TGD.clone(), v_TGD.clone()))
        if index == self._last:
            self.stop()
        window = compat.sliding_window(layer)
        for a, b in self._spans:
            k, v = k_TGD[a:b], v_TGD[a:b]
            if self._prefix:
                k = torch.cat([self._prefix[index].k_TGD, k])
                v = torch.cat([self._prefix[index].v_TGD, v])
            mask = self._mask(b - a, window, k.device)
            out_THD[a:b] = dense_causal(layer, q_THD[a:b], k, v, mask)

    def _mask(self, num_tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
        key = (num_tokens, window)
        if key not in self._masks:
            behind = self._prefix[0].k_TGD.shape[0] if self._prefix else 0
            keys = torch.arange(self._first - behind, self._first + num_tokens, device=device)
            self._masks[key] = visible(keys[behind:], keys, window)
        return self._masks[key]


class Ingestor:
    """Computes chunks on one rank. The prefix runs once and is kept for the next batch."""

    def __init__(self, handle: ModelHandle) -> None:
        self._handle = handle
        self._prefix_ids: tuple[int, ...] = ()
        self._prefix: list[LayerKV] = []

    def compute(
        self, chunks: Sequence[tuple[int, ...]], prefix_ids: tuple[int, ...]
    ) -> list[ChunkKV]:
        """KV of each chunk behind ``prefix_ids``, on the CPU; the prefix's own KV is dropped."""
        self._run_prefix(prefix_ids)
        base = len(prefix_ids)
        spans, at = [], 0
        for chunk in chunks:
            spans.append((at, at + len(chunk)))
            at += len(chunk)
        step = IsolatedPass(
            spans, self._handle.num_layers, prefix=self._prefix, first_position=base
        )
        ids = [token for chunk in chunks for token in chunk]
        positions = [base + i for chunk in chunks for i in range(len(chunk))]
        self._run(step, ids, positions)
        return [
            ChunkKV(chunk, base, _gather(step.layers, a, b))
            for chunk, (a, b) in zip(chunks, spans, strict=True)
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
        device = self._handle.device
        self._handle.run(
            step, torch.tensor(ids, device=device), torch.tensor(positions, device=device)
        )


def _gather(layers: Sequence[LayerKV], start: int, end: int) -> torch.Tensor:
    """[L, 2, N, G, D], contiguous, on the CPU; pinned where it came from a GPU."""
    stacked = torch.stack(
        [torch.stack([kv.k_TGD[start:end], kv.v_TGD[start:end]]) for kv in layers]
    )
    host = stacked.cpu().contiguous()
    return host.pin_memory() if stacked.is_cuda else host
