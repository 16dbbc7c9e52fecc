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

from cacheblend_kernels import question_attention
from cacheblend_kernels.paged import PagedKV
from cacheblend_rag.engine import layout
from cacheblend_rag.engine.attention import own_options
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.kernel_pass import NEVER, NOWHERE, PassRows, QuestionPass, View
from cacheblend_rag.select import AskedLayers

_LOGITS = 1 << 23  # held at once, float32
# What a logit becomes where a row does not see a key. Finite, so that a row to spare, which sees
# none, is no NaN.
_UNSEEN = -1e30


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
            attend(layer, q_THD, k_TGD[:, 0], self._own_TT, out_THD)
            return
        # Tokens between chunks are read from the cache, as in ``QuestionPass``.
        self._handle.write(index, k_TGD, v_TGD, self._rows.slots)
        hidden_X1, bias_TX = self._sight
        keys_XD = torch.cat([_context(self._view(index)), k_TGD[:, 0]])
        # Where nothing was placed there may be anything, and zero times NaN is NaN.
        keys_XD.masked_fill_(hidden_X1, 0.0)
        asking_T = self._asking_T if index in self._layers.summed else None
        got_X = attend(layer, q_THD, keys_XD, bias_TX, out_THD, asking_T)
        if got_X is not None:
            count = len(got_X) - len(q_THD)
            self._score_GN[0, :count] += got_X[:count]
        if index == self.last:
            self.stop()

    @functools.cached_property
    def _asking_T(self) -> torch.Tensor:
        """float32, 1 for the question's tokens and 0 for others."""
        return (self._rows.asking >= 0).float()

    @functools.cached_property
    def _own_TT(self) -> torch.Tensor:
        """What is added to logits where the pass's tokens see only one another."""
        at_T = self._rows.positions
        return _bias(at_T, at_T.masked_fill(at_T < 0, NEVER))

    @functools.cached_property
    def _sight(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [X, 1], keys that nobody sees; and what is added to logits [T, X]."""
        view, rows = self._view(self._layers.sees_from), self._rows
        at_N = torch.arange(_most(view), device=rows.positions.device)
        known_N = at_N < view.length
        if self._known_N is not None:
            known_N = known_N & self._known_N
        at_N = at_N.masked_fill(~known_N, NEVER)
        own_T = torch.zeros_like(rows.positions, dtype=torch.bool)
        hidden_X = torch.cat([~known_N, own_T])
        return hidden_X[:, None], _bias(rows.positions, torch.cat([at_N, rows.key_position]))


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
    bias_TX: torch.Tensor,
    out_THV: torch.Tensor,
    asking_T: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Attention over latents, as ``question_attention`` over what a layer makes of them.

    Args:
        keys_XD: latents, each with its rotated part.
        bias_TX: float32, added to the logits of all heads.
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
    got_X = None
    # As few parts as the memory allows, and of like size.
    parts = -(-heads * tokens * len(keys_XD) // _LOGITS)
    at_once = -(-heads // min(parts, heads))
    for head in range(0, heads, at_once):
        some = slice(head, min(head + at_once, heads))
        logits = _product(q_HTD[some].flatten(0, 1), keys_XD).view(-1, *bias_TX.shape)
        torch.add(bias_TX, logits, alpha=layer.impl.scale, out=logits)
        weights = logits.softmax(-1).flatten(0, 1)
        if asking_T is not None:
            got = asking_T.repeat(some.stop - some.start) @ weights
            got_X = got if got_X is None else got_X + got
        torch.mm(
            weights.to(keys_XD.dtype),
            keys_XD[:, : layer.kv_lora_rank],
            out=context_HTL[some].flatten(0, 1),
        )
    out_THV.copy_(torch.bmm(context_HTL, layer.W_UV).transpose(0, 1))
    return got_X


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
    before = _context(view)
    step.attend(index, layer, q_THD, k_TGD, layout.no_values(k_TGD), out)
    assert torch.equal(_context(view), before), "slots of -1 were written"
    sees = torch.cat([known_N[:end].expand(tokens, -1), positions[:, None] >= positions], 1)
    k, v = layout.of_heads(layer, *_rows(torch.cat([before[:end, None], k_TGD])))
    want, scored = question_attention(q_THD, k, v, sees, **own_options(layer))
    return max(_far(out, want), _far(scores[0, :end], scored[:end]))


def _rows(k_NGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return k_NGD, layout.no_values(k_NGD)


def _far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def _most(view: PagedKV) -> int:
    """Context tokens that are read, whatever is known of them."""
    return min(view.most, len(view.table) * view.k_BSGD.shape[1])


def _context(view: PagedKV) -> torch.Tensor:
    """Latents [N, D] of the context, a new tensor."""
    most = _most(view)
    blocks = view.table[: -(-most // view.k_BSGD.shape[1])]
    return view.k_BSGD.index_select(0, blocks).flatten(0, 1)[:most, 0]


def _bias(at_T: torch.Tensor, keys_at_X: torch.Tensor) -> torch.Tensor:
    """float32 [T, X], 0 where a row sees a key."""
    hidden_TX = keys_at_X[None] > at_T[:, None]
    zeros = torch.zeros(hidden_TX.shape, device=at_T.device)
    return zeros.masked_fill_(hidden_TX, _UNSEEN)


def _product(a_RD: torch.Tensor, b_XD: torch.Tensor) -> torch.Tensor:
    """float32 [R, X]: rows times rows, rounded to no fewer bits."""
    if a_RD.is_cuda and a_RD.dtype != torch.float32:
        return torch.mm(a_RD, b_XD.T, out_dtype=torch.float32)
    return a_RD.float() @ b_XD.float().T
