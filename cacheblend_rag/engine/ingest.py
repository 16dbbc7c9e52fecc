"""Computing the KV of chunks: each alone behind the ingest prefix, or behind its prompt prefix and
what the chunk's own document has before it; many in one forward.

Shape legend: N tokens of a chunk, L layers, G KV heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.heads import gather
from cacheblend_rag.engine.isolated import IsolatedPass, LayerKV, Span
from cacheblend_rag.engine.upload import upload
from cacheblend_rag.store.base import ChunkKV
from cacheblend_rag.store.part import Heads
from cacheblend_rag.undo import on_failure


class Ingestor:
    """Computes chunks on one rank. The prefix runs once and is kept for the next batch.

    Where several ranks share the model, they do so together; the leading one gets whole chunks,
    the others those of their own ``heads``.
    """

    def __init__(self, handle: ModelHandle, heads: Heads | None = None) -> None:
        self._handle, self._heads = handle, heads
        self._prefix_ids: tuple[int, ...] = ()
        self._adapter = 0  # that the prefix was computed with
        self._prefix: list[LayerKV] = []

    def compute(
        self,
        chunks: Sequence[Sequence[int]],
        prefix_ids: Sequence[int],
        contexts: Sequence[Sequence[int]],
        adapter: int = 0,
    ) -> list[ChunkKV]:
        """KV of each chunk behind ``prefix_ids`` and its own context, which may be empty, on the
        CPU; that of prefix and contexts is dropped. Where one rank can't, all raise.

        ``adapter``: number of the LoRA adapter that the handle is using, 0 for none.
        """
        # The prefix's KV is the adapter's as well.
        if adapter != self._adapter:
            self._prefix, self._prefix_ids, self._adapter = [], (), adapter
        with on_failure(self._drop_prefix):
            return self._handle.ranks.all_or_none(
                lambda: self._compute(chunks, prefix_ids, contexts)
            )

    def _drop_prefix(self) -> None:
        """Some ranks have it, others may not."""
        self._prefix, self._prefix_ids = [], ()

    def _compute(
        self,
        chunks: Sequence[Sequence[int]],
        prefix_ids: Sequence[int],
        contexts: Sequence[Sequence[int]],
    ) -> list[ChunkKV]:
        self._run_prefix(tuple(prefix_ids))
        first = len(prefix_ids)
        sequences = [(*c, *chunk) for c, chunk in zip(contexts, chunks, strict=True)]
        ends = list(itertools.accumulate(map(len, sequences)))
        spans = list(zip([0, *ends], ends, strict=False))
        kept = [(b - len(chunk), b) for chunk, b in zip(chunks, ends, strict=True)]
        host = _Host(kept, self._handle, self._heads)
        # One pass for all chunks, but each sees the prefix and itself only: its KV must not depend
        # on which others happen to be ingested with it.
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
        # Most batches have the prefix of the batch before.
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
    filled by a stream of its own while the forward runs, where it comes from a GPU.
    """

    def __init__(
        self, spans: Sequence[Span], handle: ModelHandle, heads: Heads | None = None
    ) -> None:
        self._layout, dtype = handle.layout, handle.config.model_config.dtype
        self._spans, self._heads = spans, heads
        on_gpu = handle.device.type == "cuda"
        self._stream = torch.cuda.Stream(handle.device) if on_gpu else None
        kept = self._layout
        if heads is not None and heads.leads:
            kept = kept._replace(heads=heads.all)
        new = torch.zeros if kept.by_layer else torch.empty  # there, some numbers mean nothing
        self._kv = [
            new(kept.shape(handle.num_layers, b - a), dtype=dtype, pin_memory=on_gpu)
            for a, b in spans
        ]

    def copy(self, index: int, kv: LayerKV) -> None:
        """Take one layer's K and V of all spans."""
        if self._heads is not None:
            whole_2THD = gather(self._layout.joined(*kv), self._heads)
            kv = LayerKV(*self._layout.split(whole_2THD, index)) if self._heads.leads else kv
        if self._stream is None:
            self._split(index, kv)
            return
        own = LayerKV(kv.k_TGD.clone(), kv.v_TGD.clone())  # the model will reuse its memory
        # The forward goes on while the copies run; they wait for it here, and it never for them.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._split(index, own)
        # Or PyTorch would hand this memory to the next layer while it is still being read.
        own.k_TGD.record_stream(self._stream)
        own.v_TGD.record_stream(self._stream)

    def _split(self, index: int, kv: LayerKV) -> None:
        for host, (a, b) in zip(self._kv, self._spans, strict=True):
            for there, here in zip(self._layout.split(host[index], index), kv, strict=True):
                there.copy_(here[a:b], non_blocking=True)

    def arrived(self) -> list[torch.Tensor]:
        """Wait for the last copy."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._kv
