"""Showing, on a request that somebody waits for, that blends are right on this engine.

An engine that our own front door starts is proved by a probe prompt. One that others start, such as
``vllm serve``, has no one to ask it anything: there the first blend is the proof. Its stored KV is
the prompt's own, computed beforehand by a plain prefill of ours. So its answer is exact if the rows
of vLLM's step are right, and these rows are compared with what that prefill says of them.
"""

from __future__ import annotations

import torch

from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.isolated import LayerKV, fresh_kv
from cacheblend_rag.engine.upload import upload
from cacheblend_rag.store.base import ChunkKV


class Proof:
    """Of one blend, on one rank.

    Attributes:
        chunk: the whole prompt's own KV, as if it were stored; key: none, so that what keeps chunks
            by their keys passes it over.
    """

    key = ""

    def __init__(self, handle: ModelHandle, token_ids: tuple[int, ...], most_tokens: int) -> None:
        ids = upload(torch.tensor(token_ids), handle.device)
        # Outside of the paged cache, so that no fault in how that is read or written can hide.
        layers = fresh_kv(handle, ids, handle.num_layers, most_tokens)
        kv = torch.stack([handle.layout.joined(*kv) for kv in layers])
        self.chunk = ChunkKV(token_ids, 0, kv.cpu())
        self._last = layers[-1]
        self._errors: list[torch.Tensor] = []

    def note(self, positions_R: torch.Tensor, k_RGD: torch.Tensor, v_RGD: torch.Tensor) -> None:
        """The last layer's K and V of rows of a step, by their positions. Those depend on all that
        the layers below have read: another order, position, slot or context shows.
        """
        for ours, plain in zip(
            (k_RGD, v_RGD), LayerKV(*(part[positions_R] for part in self._last)), strict=True
        ):
            difference = (ours.float() - plain.float()).norm()
            self._errors.append(difference / plain.float().norm().clamp_min(1e-30))

    def error(self) -> float | None:
        """The largest relative error of any step's rows; None where there were none."""
        return float(torch.stack(self._errors).max()) if self._errors else None
