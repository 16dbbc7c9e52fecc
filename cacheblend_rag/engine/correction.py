"""What recomputed tokens tell of the reused ones around them.

The KV of neighbouring tokens of a chunk is off in much the same way: they miss the same context. A
recomputed token shows by how much; the reused ones around it are moved as it was, the less the
farther away it is (our own; docs/quality.md has the measurements).

Shape legend: E tokens of the blended region, N tokens that are moved, R recomputed tokens, T tokens
of a pass, G KV heads, D head size.
"""

from __future__ import annotations

import torch

from cacheblend_kernels import nearness
from cacheblend_rag.engine.lane import Lane, upload
from cacheblend_rag.engine.rope import Turn


class Correction:
    """Moves the reused tokens of a request, layer by layer, as its recomputed ones were.

    Args:
        lane: whose region is blended.
        candidate_E: bool, reused tokens that are not exact; chosen: int64 positions, ascending.
        reach: tokens at which a recomputed token's say has fallen to 1/e.
    """

    def __init__(
        self, lane: Lane, candidate_E: torch.Tensor, chosen: torch.Tensor, reach: int
    ) -> None:
        chunk_E = upload(lane.region.span_E, lane.device)
        reused_E = candidate_E.clone()
        reused_E[chosen] = False
        self._sources_R = chosen[candidate_E[chosen]]
        self.moved_N = reused_E.nonzero().flatten()
        self._weight_NR = nearness(
            self.moved_N,
            self._sources_R,
            chunk_E[self.moved_N][:, None] == chunk_E[self._sources_R][None],
            reach,
        )
        self._rope, zeros = lane.rope, torch.zeros_like
        self._there = lane.rope.turn(zeros(self.moved_N), self.moved_N)
        self._back = lane.rope.turn(self._sources_R, zeros(self._sources_R))
        self._sums: dict[int, list[torch.Tensor]] = {}  # by layer, of earlier passes

    def move(
        self,
        index: int,
        tile_T: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        reused: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [N, G, D] of the tokens ``moved_N`` at layer ``index``.

        Args:
            tile_T: int64, ascending, the recomputed tokens of this pass; those of earlier passes
                are remembered.
            fresh: their K and V [T, G, D]; reused: K and V [E, G, D] as they were placed.
        """
        low = int(torch.searchsorted(self._sources_R, tile_T[0]))
        high = int(torch.searchsorted(self._sources_R, tile_T[-1], right=True))
        here = slice(low, high)
        sources = self._sources_R[here]
        at = torch.searchsorted(tile_T, sources)
        weight = self._weight_NR[:, here]
        back = Turn(self._back.cos_NP[here], self._back.sin_NP[here])
        off_k, off_v = (
            f[at].float() - r[sources].float() for f, r in zip(fresh, reused, strict=True)
        )
        off_k = self._rope.apply(off_k, back)  # as at position 0, where all compare
        sums = [torch.einsum("nr,rgd->ngd", weight, off) for off in (off_k, off_v)]
        if index in self._sums:
            sums = [a + b for a, b in zip(sums, self._sums[index], strict=True)]
        if high < len(self._sources_R):
            self._sums[index] = sums
        moves = self._rope.apply(sums[0], self._there), sums[1]
        k, v = (
            (r[self.moved_N].float() + move).to(r.dtype)
            for r, move in zip(reused, moves, strict=True)
        )
        return k, v
