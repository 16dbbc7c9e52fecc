"""What recomputed tokens tell of the reused ones around them.

The KV of neighbouring tokens of a chunk is off in much the same way: they miss the same context. A
recomputed token shows by how much; the reused ones around it are moved as it was, the less the
farther away it is (our own; docs/quality.md has the measurements).

Shape legend: E tokens of the blended region, N tokens that are moved, R recomputed tokens, T tokens
of a pass, C and S tokens of one chunk among N and R, G KV heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cacheblend_kernels import nearness
from cacheblend_rag.engine.executor import BlendExecutor
from cacheblend_rag.engine.rope import RotationDelta
from cacheblend_rag.engine.upload import upload


class _Chunk(NamedTuple):
    """Where a chunk's tokens are among those that move (first, last) and those that show how."""

    moved: slice
    low: int
    high: int
    weight_CS: torch.Tensor


class Correction:
    """Moves the reused tokens of a request, layer by layer, as its recomputed ones were.

    A pass sees them as it and the passes before it have moved them: those just before its end have
    not corrected all yet.

    Args:
        executor: whose region is blended.
        candidate_E: bool, reused tokens that are not exact; chosen: int64 positions, ascending.
        propagation_length: tokens at which the weight of a recomputed token's change has fallen to
            1/e.

    Attributes:
        goes_on: later passes move tokens, too: some have no blocks in this one, or keep none.
    """

    def __init__(
        self,
        executor: BlendExecutor,
        candidate_E: torch.Tensor,
        chosen: torch.Tensor,
        propagation_length: int,
    ) -> None:
        # Exact tokens are not candidates, so they never move, and nothing is learnt from them.
        reused_E = candidate_E.clone()
        reused_E[chosen] = False
        self._sources_R = chosen[candidate_E[chosen]]
        self.moved_N = reused_E.nonzero().flatten()
        self._chunks = [
            chunk
            for start, end, *_ in executor.region.spans
            if (chunk := self._chunk(start, end, propagation_length)) is not None
        ]
        self._rope, zeros = executor.rope, torch.zeros_like
        # Once a blend, not once a layer: turns are the same for all layers of a table.
        self._there = executor.rope.delta(zeros(self.moved_N), self.moved_N)
        self._back = executor.rope.delta(self._sources_R, zeros(self._sources_R))
        self._sums: dict[int, list[torch.Tensor]] = {}  # by layer, of earlier passes
        self.goes_on = False

    def _chunk(self, start: int, end: int, propagation_length: int) -> _Chunk | None:
        """The chunk at prompt tokens [start, end); None where nothing of it moves."""
        bounds = upload(torch.tensor([start, end]), self.moved_N.device)
        first, last = torch.searchsorted(self.moved_N, bounds).tolist()
        low, high = torch.searchsorted(self._sources_R, bounds).tolist()
        if first == last or low == high:
            return None
        moved_C, sources_S = self.moved_N[first:last], self._sources_R[low:high]
        return _Chunk(
            slice(first, last), low, high, nearness(moved_C, sources_S, propagation_length)
        )

    def propagate(
        self,
        index: int,
        tile_T: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        reused: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """K and V [N, G, D] of the tokens ``moved_N`` at layer ``index``; None where no pass so far
        shows anything of them.

        Args:
            tile_T: int64, ascending, the recomputed tokens of this pass; those of earlier passes
                are remembered.
            fresh: their K and V [T, G, D]; reused: K and V [E, G, D] as they were placed.
        """
        # Recomputed tokens ascend over the passes, so those of this one are a run of them.
        low = int(torch.searchsorted(self._sources_R, tile_T[0]))
        high = int(torch.searchsorted(self._sources_R, tile_T[-1], right=True))
        sums = self._sums.pop(index, None)
        if low < high:
            sums = self._added(index, sums, slice(low, high), tile_T, fresh, reused)
        if sums is None:  # tokens between and behind chunks, in all passes so far
            return None
        if high < len(self._sources_R) or self.goes_on:
            self._sums[index] = sums
        moves = self._rope.apply(sums[0], self._there, index), sums[1]
        k, v = (_moved(_rows(r, self.moved_N), by) for r, by in zip(reused, moves, strict=True))
        return k, v

    def _added(
        self,
        index: int,
        sums: list[torch.Tensor] | None,
        here: slice,
        tile_T: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        reused: tuple[torch.Tensor, torch.Tensor],
    ) -> list[torch.Tensor]:
        """The ``sums`` of earlier passes with what the sources ``here`` show."""
        sources = self._sources_R[here]
        at = torch.searchsorted(tile_T, sources)
        back = RotationDelta(self._back.cos_TNP[:, here], self._back.sin_TNP[:, here])
        off_k, off_v = (
            _rows(f, at).float() - _rows(r, sources) for f, r in zip(fresh, reused, strict=True)
        )
        # The change of a key turns with the key's position. Changes of different tokens can be
        # added as at one position only, which is 0.
        off_k = self._rope.apply(off_k, back, index)
        # A pass may have some of the recomputed tokens, and vLLM may need more passes. Each adds to
        # the sums of those before, and what it corrects is as far as they go.
        sums = sums or [off.new_zeros(len(self.moved_N), *off.shape[1:]) for off in (off_k, off_v)]
        for chunk in self._chunks:
            first, last = max(chunk.low, here.start), min(chunk.high, here.stop)
            if first < last:
                weight_CS = chunk.weight_CS[:, first - chunk.low : last - chunk.low]
                for total, off in zip(sums, (off_k, off_v), strict=True):
                    rows = off[first - here.start : last - here.start]
                    # One operation: a CPU spends longer on handing tensors around than on these.
                    total[chunk.moved].flatten(1).addmm_(weight_CS, rows.flatten(1))
        return sums


def _rows(kv_NGD: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """``kv_NGD[at]``, several times quicker on a CPU."""
    return kv_NGD.index_select(0, at)


def _moved(reused_NGD: torch.Tensor, by_NGD: torch.Tensor) -> torch.Tensor:
    """Their sum, computed in float32, in the dtype of what is moved."""
    return torch.add(reused_NGD, by_NGD, out=torch.empty_like(reused_NGD))
