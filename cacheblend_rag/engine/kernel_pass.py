"""The question's pass over the paged cache, by our kernels. Everything it reads is a tensor on the
device, so that the same pass runs eagerly and inside a CUDA graph.

Shape legend: T tokens of the pass, G KV heads, N context tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from cacheblend_kernels.attention import Extra, question_scores, scattered_attention
from cacheblend_kernels.paged import PagedKV, Propagation
from cacheblend_kernels.propagate import Propagator
from cacheblend_rag.engine import compat
from cacheblend_rag.engine.forward import ModelHandle, Pass
from cacheblend_rag.engine.rope import Rerotator
from cacheblend_rag.select import AskedLayers

NOWHERE = -1  # position and slot of a row to spare
NEVER = 1 << 30  # position of a key that no row may see

View = Callable[[int], PagedKV]


class PassRows(NamedTuple):
    """The tokens of a pass, int64 [T] each; a row to spare has the values of ``SPARE``.

    Attributes:
        ids: of the tokens.
        positions: ascending.
        asking: the position where it is the question's; ``NOWHERE`` elsewhere.
        key_position: the same with ``NEVER``.
        slots: of the tokens between chunks; ``NOWHERE`` elsewhere.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    asking: torch.Tensor
    key_position: torch.Tensor
    slots: torch.Tensor


SPARE = (0, NOWHERE, NOWHERE, NEVER, NOWHERE)


class PropagationHook:
    """What a forward does to the reused tokens around those it computes.

    Args:
        view: a layer's paged cache.
    """

    def __init__(self, propagation: Propagation, rope: Rerotator, view: View) -> None:
        cos_TXP, sin_TXP = rope.from_start
        self._propagate = Propagator(
            propagation, cos_TXP, sin_TXP, is_neox=rope.is_neox, first=rope.first
        )
        self._table_of, self._view = rope.table_of, view

    def __call__(self, index: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> None:
        """Move them by what these fresh K and V of layer ``index`` show."""
        self._propagate(self._table_of(index), k_TGD, v_TGD, self._view(index))


class QuestionPass(Pass):
    """Tokens between chunks, then the question, over the reused KV in the paged cache.

    The former are written there (vLLM's step computes them again, over the blended KV); the
    question's own K and V stay outside. In the layers below ``layers.sees_from`` nothing is read or
    written there: the pass's tokens see one another. Stops behind the last layer that is summed.

    Args:
        view: a layer's paged cache.
        rows: its tokens, those to spare last.
        known_N: bool, context tokens that may be seen; None for all.
        score_GN: float32, to which the question's attention is added over the layers
            ``layers.summed``.
        before: called with each layer's number before the layer is touched.
    """

    def __init__(
        self,
        handle: ModelHandle,
        view: View,
        rows: PassRows,
        known_N: torch.Tensor | None,
        score_GN: torch.Tensor,
        layers: AskedLayers,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self._handle, self._view, self._before, self._rows = handle, view, before, rows
        self._known_N, self._score_GN, self._layers = known_N, score_GN, layers
        self.last = layers.summed[-1]

    @functools.cached_property
    def _alone(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the pass's own keys, and the length of a context that has no token: for the
        layers in which the pass sees only itself.
        """
        at_T = self._rows.positions
        none_1 = torch.zeros(1, dtype=torch.int32, device=at_T.device)
        return at_T.masked_fill(at_T < 0, NEVER), none_1

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
        view, rows = self._view(index), self._rows
        sight: dict[str, Any] = {
            "scale": layer.impl.scale,
            "softcap": compat.softcap(layer),
            "window": compat.sliding_window(layer),
        }
        if index < self._layers.sees_from:
            key_position_T, none_1 = self._alone
            own = Extra(k_TGD, v_TGD, key_position_T)
            nothing = view._replace(length=none_1, most=1)
            scattered_attention(q_THD, rows.positions, nothing, out_THD, extra=own, **sight)
            return
        # Slots of -1 are written by no backend, so the question's own K and V stay out of the
        # cache: vLLM's step computes them later, over the blended KV.
        self._handle.write(index, k_TGD, v_TGD, rows.slots)
        scored, options = index in self._layers.summed, {**sight, "known_N": self._known_N}
        extra = Extra(k_TGD, v_TGD, rows.key_position)
        lse = scattered_attention(
            q_THD, rows.positions, view, out_THD, extra=extra, want_lse=scored, **options
        )
        if lse is not None:
            question_scores(q_THD, rows.asking, lse, view, self._score_GN, **options)
        if index == self.last:
            self.stop()
