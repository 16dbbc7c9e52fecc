"""Moving rotated keys from where a chunk was computed to where it stands in a prompt."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from cacheblend_kernels import rerotate
from cacheblend_rag.engine.forward import UnsupportedModelError
from cacheblend_rag.reason import Reason


class Turn(NamedTuple):
    """Cosine and sine, float32 [N, P], of the further angle of N tokens."""

    cos_NP: torch.Tensor
    sin_NP: torch.Tensor


class Rerotator:
    """The model's RoPE, from its own tables, so that every scaling variant is right.

    Tables are kept in float32: the module's own buffer is rounded to the model's dtype.
    """

    def __init__(self, model: Any, max_positions: int, device: torch.device) -> None:
        cos, sin, self.is_neox = _the_only_table(model, max_positions)
        # YaRN and its kin scale the table by m; position 0 shows it, and a turn must not scale.
        self._inverse_m2 = (1.0 / (cos[0] ** 2 + sin[0] ** 2)).to(device)
        self._cos, self._sin = cos.to(device), sin.to(device)

    @property
    def positions(self) -> int:
        """Positions the table covers."""
        return self._cos.shape[0]

    def sample(self) -> list[list[int]]:
        """Some of the table, rounded so far that machines agree on it: rows of cosine and sine in
        64ths, at positions that tell every frequency apart.
        """
        rows = [p for p in (0, 1, 8, 64, 512) if p < self.positions]
        table = torch.cat([self._cos[rows], self._sin[rows]], dim=1).cpu()
        return [[int(self.is_neox)], *(table * 64).round().int().tolist()]

    @functools.cached_property
    def from_start(self) -> Turn:
        """The turns from position 0 to every position of the table."""
        everywhere = torch.arange(self.positions, device=self._cos.device)
        return self.turn(torch.zeros_like(everywhere), everywhere)

    def turn(self, old_N: torch.Tensor, new_N: torch.Tensor) -> Turn:
        """The turn from positions ``old_N`` to ``new_N`` (int64); exactly none where they agree."""
        cos_old, sin_old = self._cos[old_N], self._sin[old_N]
        cos_new, sin_new = self._cos[new_N], self._sin[new_N]
        cos = (cos_new * cos_old + sin_new * sin_old) * self._inverse_m2
        sin = (sin_new * cos_old - cos_new * sin_old) * self._inverse_m2
        stay = (old_N == new_N)[:, None]
        return Turn(cos.masked_fill_(stay, 1.0), sin.masked_fill_(stay, 0.0))

    def apply(self, k_NGD: torch.Tensor, turn: Turn) -> torch.Tensor:
        """Keys after ``turn``; a new tensor of the same dtype."""
        return rerotate(k_NGD, turn.cos_NP, turn.sin_NP, is_neox=self.is_neox)


def context_length(chosen: Any) -> int:
    """Positions the model itself was made for, whatever part of them an engine serves; 0 where its
    configuration does not say.
    """
    return int(getattr(chosen.hf_text_config, "max_position_embeddings", 0) or 0)


def _the_only_table(model: Any, max_positions: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    tables = [_table(m, max_positions) for m in model.modules() if _is_rope(m)]
    if not tables:
        raise UnsupportedModelError(Reason.NO_ROPE, "no rotary position embedding (RoPE) found")
    cos, sin, is_neox = tables[0]
    for other_cos, other_sin, other_neox in tables[1:]:
        same = other_cos.shape == cos.shape and other_neox == is_neox
        if not same or not torch.equal(other_cos, cos) or not torch.equal(other_sin, sin):
            detail = "layers rotate by different RoPE tables"
            raise UnsupportedModelError(Reason.ROPE_TABLES, detail)
    return cos, sin, is_neox


def _is_rope(module: Any) -> bool:
    return (
        hasattr(module, "cos_sin_cache")
        or hasattr(module, "inv_freq")
        or ("rotary" in type(module).__name__.lower() and hasattr(module, "_compute_cos_sin_cache"))
    )


def _table(module: Any, max_positions: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    if hasattr(module, "_compute_cos_sin_cache"):
        try:
            table = module._compute_cos_sin_cache().float().cpu()
        except TypeError as error:  # LongRoPE: two tables, switched by the sequence's length
            detail = f"{type(module).__name__} has more than one table"
            raise UnsupportedModelError(Reason.ROPE_TABLES, detail) from error
        cos, sin = table.chunk(2, dim=-1)
        return cos, sin, bool(getattr(module, "is_neox_style", True))
    # a Hugging Face module, under vLLM's Transformers backend
    angles = torch.arange(max_positions)[:, None].float() * module.inv_freq.float().cpu()
    return angles.cos(), angles.sin(), True
