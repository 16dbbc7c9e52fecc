"""Moving rotated keys from where a chunk was computed to where it stands in a prompt.

Layers of a model may rotate by different tables, or not at all (NoPE). Which layer does what is no
matter of names: ``tables_of`` finds what a model has, the self-check measures which one each layer
uses, and ``Rerotator`` holds the answer.

Shape legend: T tables that layers use, X positions, N tokens, P rotated pairs, K layers, G KV
heads, D head size.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cacheblend_kernels import rerotate, rotation_deltas
from cacheblend_rag.engine.forward import UnsupportedModelError
from cacheblend_rag.reason import Reason


class Table(NamedTuple):
    """One way in which keys depend on their position.

    Attributes:
        cos_XP, sin_XP: float32 on the CPU; a module's own buffer is rounded to the model's dtype.
        is_neox: pairs are (p, p + P) if true, (2p, 2p + 1) if false.
        first: the first rotated dimension of a key.
    """

    cos_XP: torch.Tensor
    sin_XP: torch.Tensor
    is_neox: bool
    first: int = 0

    @property
    def layout(self) -> tuple[int, bool, int]:
        """Which dimensions are rotated with one another."""
        return self.cos_XP.shape[1], self.is_neox, self.first

    def fits(self, head_size: int) -> bool:
        """Whether a key of this size has the dimensions that it rotates."""
        return self.first + 2 * self.cos_XP.shape[1] <= head_size

    def same(self, other: Table) -> bool:
        """Whether keys turn alike by both."""
        return (
            self.layout == other.layout
            and torch.equal(self.cos_XP, other.cos_XP)
            and torch.equal(self.sin_XP, other.sin_XP)
        )

    def still(self) -> Table:
        """The table of keys that do not depend on their position."""
        return self._replace(
            cos_XP=torch.ones_like(self.cos_XP), sin_XP=torch.zeros_like(self.sin_XP)
        )


class RotationTables(NamedTuple):
    """All tables that layers use, float32: cosines and sines [T, X, P], and one over the square of
    what each table scales them by [T, P].
    """

    cos_TXP: torch.Tensor
    sin_TXP: torch.Tensor
    inverse_m2_TP: torch.Tensor


class RotationDelta(NamedTuple):
    """Cosine and sine, float32 [T, N, P], of the further angle of N tokens by each table. Where a
    table rotates fewer pairs than another, those behind them mean nothing.
    """

    cos_TNP: torch.Tensor
    sin_TNP: torch.Tensor


class Rerotator:
    """How the keys of each layer depend on their position, from the model's own tables, so that
    every scaling variant is right.

    Args:
        tables: those that layers use. The kernels take those of one layout.
        of_layer: number of the table of each layer.

    Attributes:
        tables: on the device.
    """

    def __init__(
        self, tables: Sequence[Table], of_layer: Sequence[int], device: torch.device
    ) -> None:
        self._layout_T = [table.layout for table in tables]
        positions = min(len(table.cos_XP) for table in tables)
        pairs = max(self._layout_T)[0]
        both = [_padded(table, positions, pairs) for table in tables]
        cos = torch.stack([table.cos_XP for table in both]).to(device)
        sin = torch.stack([table.sin_XP for table in both]).to(device)
        # YaRN and its kin scale the table by m; position 0 shows it, and a turn must not scale.
        inverse_m2 = 1.0 / (cos[:, 0] ** 2 + sin[:, 0] ** 2)
        self.tables = RotationTables(cos, sin, inverse_m2)
        self._of_layer, self.num_tables = tuple(of_layer), len(tables)
        self._layers_T = [
            [layer for layer, t in enumerate(of_layer) if t == table]
            for table in range(len(tables))
        ]
        self._index_T = [torch.tensor(layers, device=device) for layers in self._layers_T]

    @property
    def has_one_layout(self) -> bool:
        """Whether all layers rotate the same dimensions of a key with one another."""
        return len(set(self._layout_T)) == 1

    @property
    def is_neox(self) -> bool:
        """Of the first table, see ``Table``."""
        return self._layout_T[0][1]

    @property
    def first(self) -> int:
        """Of the first table, see ``Table``."""
        return self._layout_T[0][2]

    @property
    def pairs(self) -> int:
        """Of the first table: how many it rotates."""
        return self._layout_T[0][0]

    @property
    def positions(self) -> int:
        """Positions the tables cover."""
        return self.tables.cos_TXP.shape[1]

    def check_reaches(self, max_model_len: int) -> None:
        """Raise UnsupportedModelError where an engine takes longer prompts than the tables have
        positions. vLLM itself reads beyond them there.
        """
        if self.positions < max_model_len:
            detail = (
                f"the RoPE table ends after {self.positions} positions and max_model_len is "
                f"{max_model_len}; start the engine with max_model_len={self.positions}"
            )
            raise UnsupportedModelError(Reason.ROPE_TABLES, detail)

    def sample(self) -> list[list[int]]:
        """Some of the tables, rounded so far that machines agree on it: rows of cosine and sine in
        64ths, at positions that tell every frequency apart. Then the table of each layer, where
        there are several.
        """
        # Coarse, because machines compute cosines that differ in the last bits, and a fingerprint
        # that differs makes a store look empty.
        rows = [p for p in (0, 1, 8, 64, 512) if p < self.positions]
        layouts = self._layout_T[:1] if self.has_one_layout else self._layout_T
        found = [[int(neox), *([first] if first else [])] for _, neox, first in layouts]
        both = self.tables.cos_TXP, self.tables.sin_TXP
        for cos, sin, (pairs, *_) in zip(*both, self._layout_T, strict=True):
            some = torch.cat([cos[rows, :pairs], sin[rows, :pairs]], dim=1).cpu()
            found += (some * 64).round().int().tolist()
        return [*found, list(self._of_layer)] if self.num_tables > 1 else found

    def table_of(self, layer: int) -> int:
        """The number of the table that a layer's keys are rotated by."""
        return self._of_layer[layer]

    def layers(self, table: int, span: range) -> slice | torch.Tensor:
        """Those of consecutive layers that turn by ``table``, as an index (on the device)."""
        if self.num_tables == 1:
            return slice(span.start, span.stop)
        mine = self._layers_T[table]
        low, high = bisect.bisect_left(mine, span.start), bisect.bisect_left(mine, span.stop)
        return self._index_T[table][low:high]

    @functools.cached_property
    def from_start(self) -> RotationDelta:
        """The turns from position 0 to every position of the tables."""
        everywhere = torch.arange(self.positions, device=self.tables.cos_TXP.device)
        return self.delta(torch.zeros_like(everywhere), everywhere)

    def delta(self, old_N: torch.Tensor, new_N: torch.Tensor) -> RotationDelta:
        """The turns from positions ``old_N`` to ``new_N`` (int64); none at all where they agree."""
        return RotationDelta(*rotation_deltas(*self.tables, old_N, new_N))

    def apply(self, k: torch.Tensor, delta: RotationDelta, layers: int | slice) -> torch.Tensor:
        """Keys [N, G, D] of one layer, or [K, N, G, D] of several, turned by ``delta``; a new
        tensor of the same dtype.
        """
        chosen = self._of_layer[layers]
        if isinstance(chosen, int):
            return self._turned(k, delta, chosen)
        if len({self._layout_T[table] for table in chosen}) > 1:
            each = zip(k, chosen, strict=True)
            return torch.stack([self._turned(k_NGD, delta, table) for k_NGD, table in each])
        return self._turned(k, delta, chosen[0] if len(set(chosen)) == 1 else list(chosen))

    def _turned(
        self, k: torch.Tensor, delta: RotationDelta, tables: int | list[int]
    ) -> torch.Tensor:
        """Keys by one table, or those of each layer by its own, of the same layout."""
        pairs, is_neox, first = self._layout_T[tables if isinstance(tables, int) else tables[0]]
        cos, sin = delta.cos_TNP[tables][..., :pairs], delta.sin_TNP[tables][..., :pairs]
        return rerotate(k, cos, sin, is_neox=is_neox, first=first)


def _padded(table: Table, positions: int, pairs: int) -> Table:
    """``table`` of so many positions and pairs, those that it has not standing still."""
    more = (0, pairs - table.cos_XP.shape[1])
    cos = torch.nn.functional.pad(table.cos_XP[:positions], more, value=1.0)
    return table._replace(
        cos_XP=cos, sin_XP=torch.nn.functional.pad(table.sin_XP[:positions], more)
    )


def context_length(chosen: Any) -> int:
    """Positions the model itself was made for, whatever part of them an engine serves; 0 where its
    configuration does not say.
    """
    return int(getattr(chosen.hf_text_config, "max_position_embeddings", 0) or 0)


def tables_of(model: Any, max_positions: int, *head_sizes: int) -> list[Table]:
    """All tables by which layers of ``model`` may rotate keys of these sizes, each of them once.

    A module that a model has says neither that a layer uses it (what sees images has its own), nor
    which dimensions of a key it gets. So each table is there twice, at a key's start and at its
    end, and with those of each layout comes one that does not rotate.
    """
    found: list[Table] = []
    for module in filter(_is_rope, model.modules()):
        for table in _tables(module, max_positions):
            if table.fits(max(head_sizes)) and not any(map(table.same, found)):
                found.append(table)
    if not found:
        raise UnsupportedModelError(Reason.NO_ROPE, "no rotary position embedding (RoPE) found")
    rest = [(table, size - 2 * table.cos_XP.shape[1]) for table in found for size in head_sizes]
    tables = found + [table._replace(first=first) for table, first in rest if first > 0]
    layouts = {table.layout: table.still() for table in tables}
    return tables + list(layouts.values())


def _is_rope(module: Any) -> bool:
    return (
        hasattr(module, "cos_sin_cache")
        or bool(_frequencies(module))
        or ("rotary" in type(module).__name__.lower() and hasattr(module, "_compute_cos_sin_cache"))
    )


def _tables(module: Any, max_positions: int) -> list[Table]:
    is_neox = bool(getattr(module, "is_neox_style", True))
    # Phi-3's module keeps two tables in one buffer, for short and for long sequences.
    if hasattr(module, "long_factor"):
        cos, sin = _long_rope(module).float().cpu().chunk(2, dim=-1)
        return [Table(cos, sin, is_neox)]
    # Computed anew in float32. The buffer that the module keeps is rounded to the model's dtype: at
    # far positions, that alone would turn keys by a wrong angle.
    if hasattr(module, "_compute_cos_sin_cache"):
        try:
            raw = module._compute_cos_sin_cache()
        except TypeError as error:
            detail = f"{type(module).__name__} has more than one table"
            raise UnsupportedModelError(Reason.ROPE_TABLES, detail) from error
        if raw.is_complex():  # of what sees images, in two dimensions (Llama 4)
            return []
        table = raw.float().cpu()
        if hasattr(module, "mrope_section"):
            table = table[:max_positions]  # for the times of videos, it has four times as many
        cos, sin = table.chunk(2, dim=-1)
        return [Table(cos, sin, is_neox)]
    # a Hugging Face module, under vLLM's Transformers backend: pairs are found by measuring
    at = torch.arange(max_positions)[:, None].float()
    angles = [at * getattr(module, name).float().cpu() for name in _frequencies(module)]
    # Such a module scales cosine and sine by a factor of its own. A turn does not scale, so
    # frequencies are enough.
    return [Table(a.cos(), a.sin(), neox) for a in angles for neox in (True, False)]


def _long_rope(module: Any) -> torch.Tensor:
    """The one table that this engine uses: which, vLLM decides by ``max_model_len``."""
    is_long = getattr(module, "use_long_rope", None)
    if is_long is None:
        detail = f"{type(module).__name__} has tables that switch with a sequence's length"
        raise UnsupportedModelError(Reason.ROPE_TABLES, detail)
    kind, positions = (
        ("long", module.max_position_embeddings)
        if is_long
        else ("short", module.original_max_position_embeddings)
    )
    factor, mscale = getattr(module, f"{kind}_factor"), getattr(module, f"{kind}_mscale")
    table: torch.Tensor = module._compute_cos_sin_cache(positions, factor, mscale)
    return table


def _frequencies(module: Any) -> list[str]:
    """Names of its buffers of frequencies: one, or one for each type of layer."""
    names = (name for name, _ in module.named_buffers(recurse=False))
    return [n for n in names if n.endswith("inv_freq") and "original" not in n]
