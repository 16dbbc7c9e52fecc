"""The worker's half of the gate: are keys really movable by rotation, layer by layer?"""

from __future__ import annotations

from typing import Any

import torch

from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.isolated import IsolatedPass, LayerKV
from cacheblend_rag.engine.rope import Rerotator

NUM_TOKENS = 40


def moved_errors(handle: ModelHandle, rope: Rerotator, max_len: int) -> list[list[Any]]:
    """Compute random tokens at position 0 and further on, and compare after rotation.

    A model whose keys depend on position in any way other than one RoPE fails: NoPE layers, RoPE
    that differs by layer, absolute positions, tables that switch with the sequence's length.

    Returns:
        Rows of layer, shift, relative error of K, relative error of V.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = handle.config.model_config.get_vocab_size()
    ids = torch.randint(0, vocab, (NUM_TOKENS,), generator=generator).to(handle.device)
    home = torch.arange(NUM_TOKENS, device=handle.device)
    at_home = _run(handle, ids, home, 0)
    rows: list[list[Any]] = []
    for shift in (37, max_len - NUM_TOKENS):
        away = home + shift
        moved = _run(handle, ids, away, shift)
        turn = rope.turn(home, away)
        for index, (here, there) in enumerate(zip(at_home, moved, strict=True)):
            key_error = _relative(rope.apply(here.k_TGD, turn), there.k_TGD)
            rows.append([index, shift, key_error, _relative(here.v_TGD, there.v_TGD)])
    return rows


def _run(
    handle: ModelHandle, ids: torch.Tensor, positions: torch.Tensor, first: int
) -> list[LayerKV]:
    step = IsolatedPass([(0, NUM_TOKENS)], handle.num_layers, first_position=first)
    handle.run(step, ids, positions)
    return step.layers


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))
