"""Chunks for tests of stores: small, random, told by a number."""

from __future__ import annotations

import hashlib

import torch

from cacheblend_rag.store import ChunkKV


def key_of(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def chunk_of(seed: int, dtype: torch.dtype = torch.bfloat16, num_tokens: int = 7) -> ChunkKV:
    """Random bits, but for those of what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (2, 2, num_tokens, 2, 4 * dtype.itemsize), generator=generator)
    token_ids = tuple(seed * 1000 + n for n in range(num_tokens))
    return ChunkKV(token_ids, seed % 5, finite(bits.to(torch.uint8).view(dtype)))


def latent_chunk_of(seed: int) -> ChunkKV:
    """One row a token and layer, as multi-head latent attention keeps it."""
    chunk = normal_chunk_of(seed)
    return ChunkKV(chunk.token_ids, chunk.base, chunk.kv_L2NHD[:, :1, :, :1].contiguous())


def finite(kv: torch.Tensor) -> torch.Tensor:
    """The same with ones where it is not finite, or nearly so."""
    return torch.where(kv.abs() <= torch.finfo(kv.dtype).max / 2, kv, torch.ones_like(kv))


def spoiled(chunk: ChunkKV, value: float = float("nan")) -> ChunkKV:
    """The same with one number replaced."""
    kv = chunk.kv_L2NHD.clone()
    kv[-1, 1, -1, -1, -1] = value
    return ChunkKV(chunk.token_ids, chunk.base, kv)


def normal_chunk_of(seed: int, dtype: torch.dtype = torch.bfloat16, num_tokens: int = 7) -> ChunkKV:
    """Numbers as they come in KV: each head has its own range."""
    generator = torch.Generator().manual_seed(seed)
    kv_L2NHD = torch.randn(2, 2, num_tokens, 2, 16, generator=generator)
    ranges_L2H = torch.rand(2, 2, 2, generator=generator) * 8 + 0.1
    token_ids = tuple(seed * 1000 + n for n in range(num_tokens))
    return ChunkKV(token_ids, seed % 5, (kv_L2NHD * ranges_L2H[:, :, None, :, None]).to(dtype))


def same(one: ChunkKV | None, other: ChunkKV) -> bool:
    """Bit for bit."""
    return (
        one is not None
        and (one.token_ids, one.base) == (other.token_ids, other.base)
        and one.kv_L2NHD.dtype == other.kv_L2NHD.dtype
        and one.kv_L2NHD.shape == other.kv_L2NHD.shape
        and torch.equal(one.kv_L2NHD.view(torch.uint8), other.kv_L2NHD.view(torch.uint8))
    )
