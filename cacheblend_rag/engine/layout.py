"""What a layer keeps of a token, and how attention reads it.

Most models keep a key and a value of each KV head. Multi-head latent attention (MLA) keeps one row
a token: a latent, which has no position, and behind it the rotated part of all heads' keys. Here
such a row is the key of a single head whose value has no dimensions. Where heads differ in number
or size by layer (Gemma 4), all layers are stored as large as the largest.

Shape legend: T or N tokens, K layers, G KV heads, D head size, H query heads, C latent dimensions,
R rotated dimensions, P others of a head's key, V dimensions of its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class KVLayout(NamedTuple):
    """What every layer keeps of a token.

    Attributes:
        parts: 2 for keys and values, 1 for latents.
        heads: KV heads of this rank.
        all_heads: those of the model. Ranks hold the same latents, so of these there is one.
        dim: numbers of a head in one part.
        by_layer: KV heads and head size of each layer, where they differ. Then ``dim`` divides all
            head sizes, ``heads`` is how many of such parts the largest layer has, and the ends of
            the others mean nothing.
    """

    parts: int
    heads: int
    all_heads: int
    dim: int
    by_layer: tuple[tuple[int, int], ...] = ()

    @property
    def numbers(self) -> int:
        """What all heads of the model keep of a token in one layer."""
        return self.parts * self.all_heads * self.dim

    def shape(self, layers: int, tokens: int) -> tuple[int, int, int, int, int]:
        """Of the KV of so many layers and tokens on this rank."""
        return layers, self.parts, tokens, self.heads, self.dim

    def joined(self, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        """[parts, T, G, D], a new tensor."""
        kv: torch.Tensor = torch.stack((k_TGD, v_TGD)[: self.parts])
        if not self.by_layer:
            return kv
        size = self.heads * self.dim
        kv = F.pad(kv.flatten(2), (0, size - kv[0, 0].numel()))
        return kv.view(*kv.shape[:2], self.heads, self.dim)

    def split(self, kv: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [..., N, G, D] of a layer's [..., parts, N, G, D]; views."""
        if self.by_layer:
            shape = self.by_layer[layer]
            kv = kv.flatten(-2)[..., : math.prod(shape)].unflatten(-1, shape)
        k = kv[..., 0, :, :, :]
        return k, kv[..., 1, :, :, :] if self.parts == 2 else no_values(k)


def layout_of(layers: Sequence[Any], all_heads: int) -> KVLayout:
    """That of these attention layers."""
    first = layers[0]
    if is_latent(first):
        return KVLayout(1, 1, 1, int(first.head_size))
    shapes = tuple((int(layer.num_kv_heads), int(layer.head_size)) for layer in layers)
    if len(set(shapes)) == 1:
        return KVLayout(2, shapes[0][0], all_heads, shapes[0][1])
    dim = math.gcd(*(size for _, size in shapes))
    heads = max(map(math.prod, shapes)) // dim
    return KVLayout(2, heads, heads, dim, shapes)


def no_values(k: torch.Tensor) -> torch.Tensor:
    """Values of latent rows ``k``: of no dimensions."""
    return k[..., :0]


def is_latent(layer: Any) -> bool:
    """Whether a layer is one of multi-head latent attention."""
    return hasattr(layer, "kv_lora_rank") and hasattr(layer, "kv_b_proj")


def packed(kv_c_TC: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
    """Latent rows [T, 1, C + R]."""
    return torch.cat([kv_c_TC, k_pe.reshape(len(kv_c_TC), -1)], -1)[:, None]


def unpacked(layer: Any, k_TGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of latent rows, the latents [T, C] and the rotated part [T, 1, R]."""
    latent = layer.kv_lora_rank
    return k_TGD[:, 0, :latent].contiguous(), k_TGD[:, :, latent:].contiguous()


def of_heads(
    layer: Any, k_NGD: torch.Tensor, v_NGD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that attention multiplies: those that are kept, or [N, H, P + R] and
    [N, H, V], made of latents by the layer's own projection.
    """
    if not is_latent(layer):
        return k_NGD, v_NGD
    kv_c, k_pe = unpacked(layer, k_NGD)
    up = layer.kv_b_proj(kv_c)[0].view(len(kv_c), layer.num_heads, -1)
    k_nope, v = up.split([layer.qk_nope_head_dim, layer.v_head_dim], -1)
    return torch.cat([k_nope, k_pe.expand(-1, layer.num_heads, -1)], -1), v.contiguous()


def write(layer: Any, k_TGD: torch.Tensor, v_TGD: torch.Tensor, slots_T: torch.Tensor) -> None:
    """Put K and V into a layer's paged cache, in its backend's own layout."""
    if not is_latent(layer):
        layer.impl.do_kv_cache_update(layer, k_TGD, v_TGD, layer.kv_cache, slots_T)
        return
    kv_c, k_pe = unpacked(layer, k_TGD)
    layer.impl.do_kv_cache_update(
        kv_c, k_pe, layer.kv_cache, slots_T, layer.kv_cache_dtype, layer._k_scale
    )


def attend(
    layer: Any,
    q_THD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    metadata: Any,
    out_THD: torch.Tensor,
) -> None:
    """Attend over a layer's paged cache, which K and V are in already, by its backend's kernel."""
    if not is_latent(layer):
        cache = layer.kv_cache
        layer.impl.forward(layer, q_THD, k_TGD, v_TGD, cache, metadata, output=out_THD)
        return
    out = out_THD.reshape(len(q_THD), -1)
    layer.forward_impl(q_THD, *unpacked(layer, k_TGD), layer.kv_cache, metadata, output=out)
    out_THD.copy_(out.view_as(out_THD))
