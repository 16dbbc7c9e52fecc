"""Forwards over a prompt of which vLLM's paged cache does not keep all.

Where each kind of layers has a group of blocks, a layer with a window has blocks for its last
window only. A row of a blend may stand anywhere, and reads the window before it. So a forward of
ours runs over a paged cache of a single layer, which has room for a whole prompt. Each layer takes
it in turn: what is stored goes in, then the rows' own K and V; the rows attend to it by the layer's
own kernel; and the blocks that vLLM keeps are copied out.

Shape legend: E tokens of the prompt, T rows of a tile, H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.forward import Pass, UnsupportedModelError
from cacheblend_rag.engine.outcome import BlendTask
from cacheblend_rag.engine.proof import Proof
from cacheblend_rag.engine.torch_executor import TorchExecutor
from cacheblend_rag.engine.upload import upload
from cacheblend_rag.reason import Reason


class Scratch:
    """A paged cache of one layer for one prompt, in the backend's own form.

    Args:
        blocks: that vLLM's own cache has.
        tokens: of the longest prompt.

    Attributes:
        cache: vLLM's own; table: the blocks of a prompt here, in order.
    """

    def __init__(self, cache: PagedCache, blocks: int, tokens: int) -> None:
        self.cache, handle = cache, cache.handle
        caches = [layer.kv_cache for layer in handle.layers]
        like = caches[0]
        # Blocks come first, or behind a dimension that tells keys from values.
        self._dim = 0 if like.shape[0] == blocks else 1
        dtype = handle.config.model_config.dtype
        if like.shape[self._dim] != blocks or any(c.shape != like.shape for c in caches):
            detail = "layers of several KV cache groups whose paged caches differ in shape"
            raise UnsupportedModelError(Reason.KV_GROUPS, detail)
        if handle.layout.parts == 1 or handle.sharing or any(c.dtype != dtype for c in caches):
            detail = "several KV cache groups with latents, shared KV or a cache of another dtype"
            raise UnsupportedModelError(Reason.KV_GROUPS, detail)
        count = -(-tokens // cache.block_size) + 1
        self.table = torch.arange(1, count)  # as in vLLM's own, no token is in block 0
        self._kv = _like(like, self._dim, count)

    def slots(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 slots of ``positions``, both on the device."""
        return positions + self.cache.block_size  # behind block 0

    def clear(self, tokens: int) -> None:
        """Forget what an earlier layer or prompt left where the first ``tokens`` go. Attention
        multiplies what lies behind a sequence's end by zero, and zero times NaN is NaN.
        """
        used = 1 + -(-tokens // self.cache.block_size)
        self._kv.narrow(self._dim, 0, used).zero_()

    def write(self, index: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor, at: torch.Tensor) -> None:
        """Put K and V of a layer at these positions (on the device)."""
        layer = self.cache.handle.layers[index]
        layer.impl.do_kv_cache_update(layer, k_TGD, v_TGD, self._kv, self.slots(at))

    def attend(
        self,
        index: int,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        metadata: Any,
        out_THD: torch.Tensor,
    ) -> None:
        """Attend by the layer's own kernel to what was put here, K and V of the rows among it."""
        layer = self.cache.handle.layers[index]
        layer.impl.forward(layer, q_THD, k_TGD, v_TGD, self._kv, metadata, output=out_THD)

    def load(self, index: int, table: torch.Tensor, first: int, last: int) -> None:
        """Copy the blocks [first, last) of a prompt in that vLLM keeps for a layer."""
        kept = _kept(table, first, last)
        if len(kept):
            real = self.cache.handle.layers[index].kv_cache
            here, there = self._at(kept, table, real.device)
            self._kv.index_copy_(self._dim, here, real.index_select(self._dim, there))

    def save(self, index: int, table: torch.Tensor, first: int) -> None:
        """Copy the blocks of a prompt from number ``first`` on out that vLLM keeps for a layer."""
        kept = _kept(table, first, len(table))
        if len(kept):
            real = self.cache.handle.layers[index].kv_cache
            here, there = self._at(kept, table, real.device)
            real.index_copy_(self._dim, there, self._kv.index_select(self._dim, here))

    def drop(self, index: int, table: torch.Tensor, first: int) -> None:
        """Zeros in the blocks of a prompt from number ``first`` on that vLLM keeps for a layer."""
        if len(kept := _kept(table, first, len(table))):
            real = self.cache.handle.layers[index].kv_cache
            real.index_fill_(self._dim, upload(table[kept], real.device), 0)

    def _at(self, kept: torch.Tensor, table: torch.Tensor, device: torch.device) -> Any:
        return upload(self.table[kept], device), upload(table[kept], device)


def _kept(table: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """The numbers of the blocks [first, last) that are not the null block."""
    return table[first:last].nonzero().flatten() + first


def _like(real: torch.Tensor, dim: int, blocks: int) -> torch.Tensor:
    """Zeros of the shape of ``real`` but for its number of blocks, its dimensions in the same order
    in memory.
    """
    strides = real.stride()
    order = sorted(range(real.dim()), key=lambda d: -strides[d])
    shape = [blocks if d == dim else real.shape[d] for d in order]
    made = torch.zeros(shape, dtype=real.dtype, device=real.device)
    return made.permute([order.index(d) for d in range(real.dim())])


class _Kept(NamedTuple):
    """Rows of earlier tiles that later ones see, where vLLM keeps no block of theirs."""

    at: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class PromptForward:
    """Computes tokens of one prompt, and puts its KV into the blocks that vLLM keeps.

    Args:
        executor: has the stored KV; None where every token is computed.
        most_rows: of a forward.
        proof: gets what the last layer made of the rows.
    """

    def __init__(
        self,
        scratch: Scratch,
        task: BlendTask,
        most_rows: int,
        executor: TorchExecutor | None = None,
        proof: Proof | None = None,
    ) -> None:
        self._scratch, self._cache, self._task = scratch, scratch.cache, task
        self._handle, self._most_rows = scratch.cache.handle, most_rows
        self._executor, self._proof = executor, proof
        self._tables = [torch.tensor(table) for table in task.tables]
        # Blocks below this one are others' too: they are read, and never written.
        self._first = task.found // self._cache.block_size
        self._ids_E = upload(torch.tensor(task.token_ids), self._handle.device)
        self._all_E = torch.arange(task.end, device=self._handle.device)
        self._kept: dict[int, _Kept] = {}  # by layer

    def run(self, positions: torch.Tensor) -> None:
        """Compute the tokens at ``positions`` (int64 on the device, ascending), each seeing what
        comes before it, in as many forwards as it takes.
        """
        tiles = [tile for tile in positions.split(self._most_rows) if len(tile)]
        for number, tile in enumerate(tiles):
            behind = int(tiles[number + 1][0]) if number + 1 < len(tiles) else None
            step = _Tile(self, tile, int(tile[0]) if number else 0, behind)
            self._handle.run(step, self._ids_E[tile], tile)
        if not tiles:  # all that is claimed is stored
            for index in range(self._handle.num_layers):
                self._fill(index, 0)
                self._scratch.save(index, self._table(index), self._first)

    def compute(
        self,
        index: int,
        tile: torch.Tensor,
        done: int,
        behind: int | None,
        kv: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Have all of a layer in the scratch memory that the rows of a tile see, and what vLLM
        keeps of it in its blocks.

        Args:
            done: tokens that earlier tiles left complete, up to the tile's first position.
            behind: the next tile's first position, if there is one.
        """
        self._fill(index, -(-done // self._cache.block_size))
        if self._executor is not None:
            # Layers with a window keep no block that would have what earlier tiles have moved.
            self._executor.go_on(behind is not None)
            if (moved := self._executor.moved(tile, index, *kv)) is not None:
                self._scratch.write(index, *moved, self._executor.moved_N)
        self._scratch.write(index, *kv, tile)
        table = self._table(index)
        # What vLLM found is exact. The rows' own KV there is not, where they see what is reused.
        self._scratch.load(index, table, 0, self._first)
        self._scratch.save(index, table, self._first)
        if self._proof is not None and index == self._handle.num_layers - 1:
            self._proof.note(tile, *kv)
        if behind is not None:
            self._keep(index, tile, behind, kv)

    def _table(self, index: int) -> torch.Tensor:
        return self._tables[self._cache.groups[index]]

    def _fill(self, index: int, last: int) -> None:
        """What a layer has without the rows of this tile; blocks below number ``last`` are as
        earlier tiles left them, the rest of the last of them too. Blocks that none has written hold
        other requests' KV.
        """
        scratch, table = self._scratch, self._table(index)
        scratch.clear(self._task.end)
        if self._executor is not None:
            scratch.write(index, *self._executor.layer(index), self._all_E)
        if (kept := self._kept.get(index)) is not None:
            scratch.write(index, kept.k, kept.v, kept.at)
        scratch.load(index, table, 0, max(last, self._first))

    def _keep(
        self, index: int, tile: torch.Tensor, behind: int, kv: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Remember the rows that those from ``behind`` on see. A layer that sees all has them in
        blocks.
        """
        window = compat.sight(self._handle.layers[index]).least()
        if window is None:
            return
        old = self._kept.pop(index, None)
        at, k, v = (tile, *kv) if old is None else _joined(old, _Kept(tile, *kv))
        seen = (at > behind - window).nonzero().flatten()
        # Copies: the model goes on to use its own memory.
        self._kept[index] = _Kept(*(x.index_select(0, seen) for x in (at, k, v)))


def _joined(old: _Kept, new: _Kept) -> _Kept:
    return _Kept(*(torch.cat(pair) for pair in zip(old, new, strict=True)))


class _Tile(Pass):
    """The rows of one forward."""

    def __init__(
        self, prompt: PromptForward, tile: torch.Tensor, done: int, behind: int | None
    ) -> None:
        self._prompt, self._tile, self._done, self._behind = prompt, tile, done, behind
        scratch, on_host = prompt._scratch, tile.cpu()
        self._scratch = scratch
        self.last = scratch.cache.handle.num_layers - 1
        blocks = -(-(int(on_host[-1]) + 1) // scratch.cache.block_size)
        table = scratch.table[:blocks]
        self._metadata = scratch.cache.metadata(table, on_host, scratch.slots(tile))

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        self._prompt.compute(index, self._tile, self._done, self._behind, (k_TGD, v_TGD))
        if index == self.last:
            self.stop()
        self._scratch.attend(index, q_THD, k_TGD, v_TGD, self._metadata[index], out_THD)


class LastRow(Pass):
    """A prompt's last token over the blocks that vLLM keeps, as vLLM's own step computes it next:
    for a proof.
    """

    def __init__(self, cache: PagedCache, task: BlendTask, proof: Proof) -> None:
        self._cache, self._proof = cache, proof
        self.last = cache.handle.num_layers - 1
        self._at = torch.tensor([task.end - 1])
        tables = [torch.tensor(table) for table in task.tables]
        self._slots = [cache.slots(table, self._at) for table in tables]
        self._metadata = [
            cache.metadata(table, self._at, slots)
            for table, slots in zip(tables, self._slots, strict=True)
        ]

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        group = self._cache.groups[index]
        real = self._cache.handle.layers[index]
        self._cache.handle.write(index, k_TGD, v_TGD, self._slots[group])
        if index == self.last:
            self._proof.note(self._at.to(k_TGD.device), k_TGD, v_TGD)
            self.stop()
        metadata = self._metadata[group][index]
        real.impl.forward(real, q_THD, k_TGD, v_TGD, real.kv_cache, metadata, output=out_THD)
