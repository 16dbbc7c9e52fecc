"""Which KV heads a tensor parallel rank computes, and all ranks' heads together.

Shape legend: T tokens, G KV heads of this rank, H KV heads of the model, D head size.
"""

from __future__ import annotations

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)

from cacheblend_rag.engine.forward import ModelHandle, UnsupportedModelError
from cacheblend_rag.reason import Reason
from cacheblend_rag.store.part import Heads


def heads_of(handle: ModelHandle) -> Heads | None:
    """This rank's; None where there is no other rank.

    Raises:
        UnsupportedModelError: ranks have parts that make up no whole.
    """
    size = get_tensor_model_parallel_world_size()
    if size == 1:
        return None
    if handle.layout.by_layer:
        detail = "layers have KV heads of different number or size, which ranks can't share"
        raise UnsupportedModelError(Reason.KV_HEADS, detail)
    some, all_heads = handle.layout.heads, handle.layout.all_heads
    if some * size < all_heads or some * size % all_heads:
        detail = f"{size} ranks of {some} KV heads each do not make up the model's {all_heads}"
        raise UnsupportedModelError(Reason.KV_HEADS, detail)
    return share(get_tensor_model_parallel_rank(), size, some, all_heads)


def share(rank: int, size: int, some: int, all_heads: int) -> Heads:
    """Which ``some`` heads rank ``rank`` of ``size`` has, as vLLM deals them out: in order, and
    where there are fewer heads than ranks, each to several ranks that follow one another.
    """
    # With more ranks than KV heads, vLLM gives the same head to neighbouring ranks.
    copies = some * size // all_heads
    return Heads(rank // copies * some, some, all_heads, leads=rank == 0)


def gather(own_2TGD: torch.Tensor, heads: Heads) -> torch.Tensor:
    """[2, T, H, D]: keys and values of all heads, each once. All ranks call it together."""
    ranks: torch.Tensor = get_tp_group().all_gather(own_2TGD.contiguous(), dim=2)
    return once(ranks, heads)


def once(ranks_2TRD: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Of the heads of all ranks, one after another, each head once."""
    copies = ranks_2TRD.shape[2] // heads.all
    by_rank = ranks_2TRD.unflatten(2, (-1, copies, heads.some))
    whole: torch.Tensor = by_rank[:, :, :, 0].flatten(2, 3)
    return whole
