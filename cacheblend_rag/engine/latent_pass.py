"""The question's pass over latents in the paged cache, on any device. All it does has shapes that
the host knows, so that it runs inside a CUDA graph as well.

Queries are turned into the space of latents, as vLLM does for tokens that decode: nothing is made
of the context's latents, and one product with them serves all heads.

Shape legend: T tokens of the pass, N context tokens, X keys (the context's, then the pass's own),
H heads, L latent dimensions, R rotated ones, D both, P others of a head's key, V of its value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from cacheblend_kernels import masked_softmax, question_attention
from cacheblend_kernels.paged import PagedKV
from cacheblend_kernels.softmax import masked_softmax as kernel_softmax
from cacheblend_rag.engine import layout
from cacheblend_rag.engine.attention import own_options
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.kernel_pass import NEVER, NOWHERE, PassRows, QuestionPass, View
from cacheblend_rag.select import AskedLayers

_LOGITS = 1 << 23  # held at once, float32


class LatentQuestionPass(QuestionPass):
    """See ``QuestionPass``."""

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
        if index < self._layers.sees_from:
            attend(layer, q_THD, k_TGD[:, 0], self._rows.positions, self._alone[0], out_THD)
            return
        # Tokens between chunks are read from the cache, as in ``QuestionPass``.
        self._handle.write(index, k_TGD, v_TGD, self._rows.slots)
        keys_XD = _keys(self._view(index), k_TGD)
        # Where nothing was placed there may be anything, and zero times NaN is NaN.
        keys_XD.masked_fill_(self._hidden_X1, 0.0)
        asking_T = self._asking_T if index in self._layers.summed else None
        got_X = attend(layer, q_THD, keys_XD, self._rows.positions, self._at_X, out_THD, asking_T)
        if got_X is not None:
            # of the last block, tokens behind the context are among the keys
            count = min(len(got_X) - len(q_THD), self._score_GN.shape[1])
            self._score_GN[0, :count] += got_X[:count]
        if index == self.last:
            self.stop()

    @functools.cached_property
    def _asking_T(self) -> torch.Tensor:
        """float32, 1 for the question's tokens and 0 for others."""
        return (self._rows.asking >= 0).float()

    @functools.cached_property
    def _at_X(self) -> torch.Tensor:
        """Positions of the keys; ``NEVER`` of those that no row may see."""
        view, rows = self._view(self._layers.sees_from), self._rows
        at_N = torch.arange(_blocks(view) * view.k_BSGD.shape[1], device=rows.positions.device)
        known_N = at_N < view.length
        if self._known_N is not None:
            known_N &= F.pad(self._known_N, (0, len(at_N) - len(self._known_N)))
        return torch.cat([at_N.masked_fill(~known_N, NEVER), rows.key_position])

    @functools.cached_property
    def _hidden_X1(self) -> torch.Tensor:
        """bool, keys that no row may see."""
        return (self._at_X == NEVER)[:, None]


def question_pass(
    handle: ModelHandle,
    view: View,
    rows: PassRows,
    known_N: torch.Tensor | None,
    score_GN: torch.Tensor,
    layers: AskedLayers,
    before: Callable[[int], None] | None = None,
) -> QuestionPass:
    """The pass of this model."""
    kind = LatentQuestionPass if handle.layout.parts == 1 else QuestionPass
    return kind(handle, view, rows, known_N, score_GN, layers, before)


def attend(
    layer: Any,
    q_THD: torch.Tensor,
    keys_XD: torch.Tensor,
    at_T: torch.Tensor,
    at_X: torch.Tensor,
    out_THV: torch.Tensor,
    asking_T: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Attention over latents, as ``question_attention`` over what a layer makes of them.

    Args:
        keys_XD: latents, each with its rotated part.
        at_T, at_X: positions; a row sees the keys at its own and earlier ones, or becomes 0.
        out_THV: written.
        asking_T: float32 weight of each row in what is returned.

    Returns:
        float32 [X], the attention that each key got, summed over heads and rows; None where no row
        has a weight.
    """
    tokens, heads, _ = q_THD.shape
    q_HTP, q_HTR = q_THD.transpose(0, 1).split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], -1)
    q_HTD = torch.cat([torch.bmm(q_HTP, layer.W_UK_T), q_HTR], -1)
    context_HTL = q_HTD.new_empty(heads, tokens, layer.kv_lora_rank)
    got_X = None if asking_T is None else torch.zeros_like(at_X, dtype=torch.float32)
    softmax = kernel_softmax if q_THD.is_cuda else masked_softmax
    how: dict[str, Any] = {"scale": layer.impl.scale, "dtype": keys_XD.dtype}
    for rows in _parts(tokens, tokens * len(at_X)):
        at_R = at_T[rows]
        for some in _parts(heads, heads * len(at_R) * len(at_X)):
            logits = _product(q_HTD[some, rows].flatten(0, 1), keys_XD.T)
            weights = softmax(logits, at_R, at_X, **how)
            if got_X is not None and asking_T is not None:
                asking_1R = asking_T[rows].repeat(1, some.stop - some.start).to(weights.dtype)
                got_X += _product(asking_1R, weights)[0]
            latents_RL = weights @ keys_XD[:, : layer.kv_lora_rank]
            context_HTL[some, rows] = latents_RL.unflatten(0, (-1, len(at_R)))
    out_THV.copy_(torch.bmm(context_HTL, layer.W_UV).transpose(0, 1))
    return got_X


def _parts(count: int, logits: int) -> list[slice]:
    """``count`` rows or heads in slices, of which each has at most ``_LOGITS`` of the ``logits`` of
    all, or is one.
    """
    at_once = max(1, count * _LOGITS // logits)
    return [slice(n, min(n + at_once, count)) for n in range(0, count, at_once)]


@torch.inference_mode()
def check(handle: ModelHandle, index: int, view: PagedKV) -> float:
    """How far the pass at layer ``index``, over what its cache holds, is from the dense twin:
    relative, the larger error of what it puts out and of what it sums.

    Args:
        view: of one block.
    """
    layer, device = handle.layers[index], handle.device
    dtype, size, tokens = view.k_BSGD.dtype, view.most, 8
    end = size - size // 4  # those behind are no context
    positions = torch.arange(end, end + tokens, device=device)
    nowhere, known_N = (
        torch.full_like(positions, NOWHERE),
        torch.arange(size, device=device) % 5 > 0,
    )
    rows = PassRows(nowhere, positions, positions, positions, nowhere)
    shape = tokens, layer.num_heads, layer.qk_nope_head_dim + layer.qk_rope_head_dim
    q_THD = torch.randn(shape, device=device).mul(0.5).to(dtype)
    k_TGD = torch.randn(tokens, 1, view.k_BSGD.shape[-1], device=device).to(dtype)
    out, scores = q_THD.new_empty(*shape[:2], layer.v_head_dim), torch.zeros(1, size, device=device)
    one = view._replace(length=torch.full_like(view.length, end))
    # two layers, of which the pass stops behind the other
    asked = AskedLayers((index, index + 1), 0)
    step = LatentQuestionPass(handle, lambda _: one, rows, known_N, scores, asked)
    # a slot of -1 would lie before the first block, or be the last one
    ends = [int(view.table[0]), -1]
    before, *_ = kept = view.k_BSGD[ends]
    step.attend(index, layer, q_THD, k_TGD, layout.no_values(k_TGD), out)
    assert torch.equal(view.k_BSGD[ends], kept), "slots of -1 were written"
    sees = torch.cat([known_N[:end].expand(tokens, -1), positions[:, None] >= positions], 1)
    k, v = layout.of_heads(layer, *_rows(torch.cat([before[:end], k_TGD])))
    want, scored = question_attention(q_THD, k, v, sees, **own_options(layer))
    return max(_far(out, want), _far(scores[0, :end], scored[:end]))


def _rows(k_NGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return k_NGD, layout.no_values(k_NGD)


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _blocks(view: PagedKV) -> int:
    """How many blocks of the context are read, whatever is known of them."""
    return min(-(-view.most // view.k_BSGD.shape[1]), len(view.table))


def _keys(view: PagedKV, k_TGD: torch.Tensor) -> torch.Tensor:
    """Latents [X, D] of the context, all of its blocks, and of the pass; a new tensor."""
    _, size, _, dim = view.k_BSGD.shape
    blocks = view.table[: _blocks(view)]
    end = len(blocks) * size
    keys_XD = k_TGD.new_empty(end + len(k_TGD), dim)
    # into its place: of a long context, a copy is as large as what all else takes
    there = keys_XD[:end].view(-1, size, 1, dim)
    torch.index_select(view.k_BSGD, 0, blocks, out=there)
    keys_XD[end:] = k_TGD[:, 0]
    return keys_XD


def _product(a_RD: torch.Tensor, b_DX: torch.Tensor) -> torch.Tensor:
    """float32 [R, X], rounded to no fewer bits."""
    if a_RD.is_cuda and a_RD.dtype != torch.float32:
        return torch.mm(a_RD, b_DX, out_dtype=torch.float32)
    return a_RD.float() @ b_DX.float()
