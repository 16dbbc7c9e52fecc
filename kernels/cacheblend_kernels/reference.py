"""Plain-torch twin of every operation: the specification, the CPU path and the tests' oracle.

Shape legend: N keys, R query rows, H query heads, G KV heads (H is a multiple of G), D head size,
P rotated pairs (half of the rotary dimension), T tables of X positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cacheblend_kernels.paged import PagedKV, Propagation

CUTOFF = 4  # propagation lengths: a token's weight would be below 1/50 there, and is nothing
_LOGITS = 1 << 26  # attention logits held at once, float32


def rotation_deltas(
    cos_TXP: torch.Tensor,
    sin_TXP: torch.Tensor,
    inverse_m2_TP: torch.Tensor,
    old_N: torch.Tensor,
    new_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The further angles by which keys turn that move from positions ``old_N`` to ``new_N``
    (CacheBlend, section 4.3 and appendix); none at all where they agree.

    From the tables by the angle-sum formulas, not from angles: whatever scaling made a table is in
    it.

    Args:
        cos_TXP, sin_TXP: float32 cosine and sine of T tables of X positions.
        inverse_m2_TP: float32, one over the square of what a table scales its cosines by: a turn
            must not scale.
        old_N, new_N: int64.

    Returns:
        Cosine and sine, float32 [T, N, P].
    """
    cos_old, sin_old = cos_TXP[:, old_N], sin_TXP[:, old_N]
    cos_new, sin_new = cos_TXP[:, new_N], sin_TXP[:, new_N]
    cos = (cos_new * cos_old + sin_new * sin_old) * inverse_m2_TP[:, None]
    sin = (sin_new * cos_old - cos_new * sin_old) * inverse_m2_TP[:, None]
    # Rounding would make these almost 1 and 0. A chunk that does not move keeps its bits, and is
    # exact.
    stay = (old_N == new_N)[:, None]
    return cos.masked_fill_(stay, 1.0), sin.masked_fill_(stay, 0.0)


def rerotate(
    k_NGD: torch.Tensor,
    cos_NP: torch.Tensor,
    sin_NP: torch.Tensor,
    *,
    is_neox: bool,
    first: int = 0,
) -> torch.Tensor:
    """Turn rotated keys by a further angle per token (CacheBlend, section 4.3 and appendix).

    RoPE rotates pair p of a key at position m by ``m * theta_p``, so a key computed at ``old`` is
    the key at ``new`` after a rotation by ``(new - old) * theta_p``. Values are not rotated.

    Args:
        k_NGD: keys in any floating dtype. Further dimensions may come first.
        cos_NP: float32 cosine of the further angle; may have the further dimensions of ``k_NGD``.
        sin_NP: float32 sine of it.
        is_neox: pairs are (p, p + P) if true, (2p, 2p + 1) if false.
        first: the first of the 2P rotary dimensions; the others stay.

    Returns:
        A new tensor of the shape and dtype of ``k_NGD``; computed in float32.
    """
    pairs = cos_NP.shape[-1]
    middle, end = first + pairs, first + 2 * pairs
    one, two = slice(first, middle), slice(middle, end)
    if not is_neox:
        one, two = slice(first, end, 2), slice(first + 1, end, 2)
    cos, sin = cos_NP.unsqueeze(-2), sin_NP.unsqueeze(-2)
    out = torch.empty_like(k_NGD)
    out[..., :first], out[..., end:] = k_NGD[..., :first], k_NGD[..., end:]
    a, b = k_NGD[..., one].float(), k_NGD[..., two].float()
    turned = a * cos
    out[..., one] = turned.addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=turned)
    out[..., two] = turned.addcmul_(a, sin)
    return out


def nearness(
    position_N: torch.Tensor,
    position_R: torch.Tensor,
    propagation_length: float | torch.Tensor,
    same_chunk_NR: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight of each of R tokens for each of N: ``exp(-distance / propagation_length)``, over 1
    plus their sum, so that few and far ones weigh little; nothing beyond ``CUTOFF`` propagation
    lengths, and where they are of different chunks.

    Returns:
        float32 [N, R].
    """
    distance_NR = (position_N[:, None] - position_R[None]).abs().float()
    # cut off at CUTOFF: the kernel then looks at a bounded run of recomputed tokens
    weight_NR = torch.exp(-distance_NR / propagation_length) * (
        distance_NR <= CUTOFF * propagation_length
    )
    if same_chunk_NR is not None:
        weight_NR = weight_NR * same_chunk_NR
    # 1 + sum, not sum: a mean would move a token as far as its only, distant neighbour
    return weight_NR / (1 + weight_NR.sum(1, keepdim=True))


def masked_attention(
    q_RHD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    visible_RN: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of R query rows over N keys, each row seeing the keys ``visible_RN`` marks.

    Args:
        q_RHD: queries; k_NGD, v_NGD: keys and values of the same dtype.
        visible_RN: bool, at least one true a row.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)`` where it is not 0.
        sinks_H: one more logit of each head, of a key without a value.

    Returns:
        [R, H, D] in the dtype of ``q_RHD``.
    """
    if softcap or sinks_H is not None:
        return question_attention(
            q_RHD, k_NGD, v_NGD, visible_RN, scale=scale, softcap=softcap, sinks_H=sinks_H
        )[0]
    out = F.scaled_dot_product_attention(
        q_RHD.transpose(0, 1)[None],
        k_NGD.transpose(0, 1)[None],
        v_NGD.transpose(0, 1)[None],
        attn_mask=visible_RN,
        scale=scale,
        enable_gqa=q_RHD.shape[1] != k_NGD.shape[1],
    )
    return out[0].transpose(0, 1)


def question_attention(
    q_RHD: torch.Tensor,
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    visible_RN: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``masked_attention`` that also tells how much attention each key got.

    Returns:
        The attention output [R, H, D] in the dtype of ``q_RHD``, and the probabilities summed over
        rows and heads, float32 [N].
    """
    rows, heads, dim = q_RHD.shape
    keys, groups, _ = k_NGD.shape
    q_GXD = q_RHD.float().mul(scale).view(rows, groups, -1, dim).permute(1, 2, 0, 3)
    q_GXD = q_GXD.reshape(groups, -1, dim)
    hidden_RN = ~visible_RN
    out = torch.empty(rows, heads, v_NGD.shape[-1], dtype=q_RHD.dtype, device=q_RHD.device)
    out_RGXD = out.view(rows, groups, -1, v_NGD.shape[-1])
    sinks_GX1 = None
    if sinks_H is not None:
        by_row = sinks_H.float().view(groups, -1, 1).expand(groups, heads // groups, rows)
        sinks_GX1 = by_row.reshape(groups, -1, 1)
    score = torch.zeros(keys, device=q_RHD.device)
    # groups of heads at a time: logits of all would be rows x heads x keys
    at_once = max(1, _LOGITS // (rows * heads // groups * keys))  # groups: bounds the memory
    for g in range(0, groups, at_once):
        some = slice(g, g + at_once)
        # contiguous: a CPU multiplies strided float32 matrices at half the speed
        k_GND = k_NGD[:, some].transpose(0, 1).float().contiguous()
        v_GND = v_NGD[:, some].transpose(0, 1).float().contiguous()
        logits = q_GXD[some] @ k_GND.transpose(1, 2)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits.view(-1, heads // groups, rows, keys).masked_fill_(hidden_RN, -torch.inf)
        if sinks_GX1 is None:
            weights = logits.softmax(-1)
        else:
            weights = torch.cat([logits, sinks_GX1[some]], -1).softmax(-1)[..., :-1]
        score += weights.sum((0, 1))
        context = (weights @ v_GND).view(-1, heads // groups, rows, v_NGD.shape[-1])
        out_RGXD[:, some] = context.permute(2, 0, 1, 3).to(out.dtype)
    return out, score


def masked_softmax(
    logits_RX: torch.Tensor,
    at_T: torch.Tensor,
    at_X: torch.Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Softmax of ``scale`` times the logits, over the keys at a row's own and earlier positions.

    Args:
        logits_RX: float32, of one head's rows after the other's.
        at_T: int64 position of each row of a head; at_X: of each key.

    Returns:
        [R, X] in ``dtype``, computed in float32; 0 where a row does not see a key, or any.
    """
    hidden_TX = at_X[None] > at_T[:, None]
    logits = (logits_RX * scale).view(-1, *hidden_TX.shape)
    # finite: of a row that sees no key, -inf would make NaN
    weights = logits.masked_fill_(hidden_TX, torch.finfo(logits.dtype).min).softmax(-1)
    return weights.masked_fill_(hidden_TX, 0.0).view_as(logits_RX).to(dtype)


def key_deviation(fresh_NGD: torch.Tensor, cached_NGD: torch.Tensor) -> torch.Tensor:
    """KV deviation per token (CacheBlend, section 4.2): squared distance over heads and dims.

    Returns:
        float32 [N].
    """
    return (fresh_NGD.float() - cached_NGD.float()).pow(2).sum((1, 2))


def window_average(score_N: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over a centred window of odd length, zeros beyond the ends; float32 [N]."""
    return F.avg_pool1d(score_N.float()[None, None], window, 1, window // 2)[0, 0]


def placed(
    k_NGD: torch.Tensor,
    v_NGD: torch.Tensor,
    cos_NP: torch.Tensor,
    sin_NP: torch.Tensor,
    positions_N: torch.Tensor,
    cache: PagedKV,
    *,
    is_neox: bool,
    first: int = 0,
) -> None:
    """Twin of ``rotate_and_scatter.rotate_and_scatter``: ``rerotate``, then write K and V at
    ``positions_N``.
    """
    block, inside = cache.slots(positions_N)
    cache.k_BSGD[block, inside] = rerotate(k_NGD, cos_NP, sin_NP, is_neox=is_neox, first=first)
    cache.v_BSGD[block, inside] = v_NGD


def moved(
    propagation: Propagation,
    k_RGD: torch.Tensor,
    v_RGD: torch.Tensor,
    cache: PagedKV,
    cos_NP: torch.Tensor,
    sin_NP: torch.Tensor,
    *,
    is_neox: bool,
    first: int = 0,
) -> None:
    """Twin of ``propagate.propagate`` for all recomputed tokens in one pass: ``nearness`` times how
    far each is off, keys compared as if all stood at position 0.
    """
    chunk_N, at_R = propagation.chunk_N, propagation.position_R
    everywhere_N = torch.arange(len(chunk_N), device=chunk_N.device)
    k_NGD, v_NGD = (old.float() for old in cache.gather(everywhere_N))
    same_NR = (chunk_N[:, None] == propagation.chunk_R[None]) & (propagation.chunk_R >= 0)
    weight_NR = nearness(everywhere_N, at_R, propagation.propagation_length_1, same_NR)
    # back to position 0, where differences at unlike positions can be added
    off_k = k_RGD.float() - k_NGD[at_R]
    off_k = rerotate(off_k, cos_NP[at_R], -sin_NP[at_R], is_neox=is_neox, first=first)
    off_v = v_RGD.float() - v_NGD[at_R]
    sum_k, sum_v = (torch.einsum("nr,rgd->ngd", weight_NR, off) for off in (off_k, off_v))
    block, inside = cache.slots(everywhere_N)
    # and on to where each moved token stands
    turned = rerotate(sum_k, cos_NP, sin_NP, is_neox=is_neox, first=first)
    cache.k_BSGD[block, inside] = (k_NGD + turned).to(cache.k_BSGD.dtype)
    cache.v_BSGD[block, inside] = (v_NGD + sum_v).to(cache.v_BSGD.dtype)
