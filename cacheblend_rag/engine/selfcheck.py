"""The worker's half of the model check: are keys really movable by rotation, and by which, layer by
layer? And is attention outside of the paged cache that of the layer's own backend?

Shape legend: T tokens, G KV heads, H query heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cacheblend_rag.engine import layout
from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.forward import ModelHandle, UnsupportedModelError
from cacheblend_rag.engine.isolated import IsolatedPass, LayerKV
from cacheblend_rag.engine.rope import Rerotator, Table
from cacheblend_rag.reason import Reason

NUM_TOKENS = 40
_NEAR = 37  # tokens further on
_FAR_BETTER = 10  # times: rounding differs by less, wrong tables are as wrong as keys are large


class Moved(NamedTuple):
    """What the same tokens gave at other positions, ``shift`` tokens further on."""

    shift: int
    layers: list[LayerKV]


class Measured(NamedTuple):
    """How keys move, and what shows it.

    Attributes:
        checks: how well ``rope`` explains moved keys: rows of layer, shift, relative error of K,
            relative error of V.
        attention: how well our own attention equals the backend's: rows of layer, relative error,
            whether the backend's cache rounds K and V. The last layer has none: no pass of ours
            attends there.
    """

    rope: Rerotator
    checks: list[list[Any]]
    attention: list[list[Any]]


def measured(
    handle: ModelHandle, cache: PagedCache, tables: Sequence[Table], max_len: int
) -> Measured:
    """Compute random tokens at position 0 and further on, and find by which of ``tables`` each
    layer's keys moved.

    A model whose keys depend on position in any other way fails: no table explains them, so the
    errors are as large as the keys. Each layer is judged for the same input. What attention puts
    out may depend on position (queries that are scaled by it); that is no matter of moving keys.

    Writes to the first blocks of ``cache``: no request runs yet.
    """
    far = min(max_len, max(len(table.cos_XP) for table in tables))
    # A module for another part of the model, such as what sees images, may have fewer positions.
    fitting = [table for table in tables if len(table.cos_XP) >= far]
    # The same tokens on every rank and at every start.
    generator = torch.Generator().manual_seed(0)
    vocab = handle.config.model_config.get_vocab_size()
    ids = torch.randint(0, vocab, (NUM_TOKENS,), generator=generator).to(handle.device)
    at_home = _Recording(cache)
    handle.run(at_home, ids, torch.arange(NUM_TOKENS, device=handle.device))
    moved = []
    # One shift that is no multiple of a period, and the farthest: tables that switch with a
    # sequence's length, or are scaled for long ones, differ there.
    for shift in (_NEAR, far - NUM_TOKENS):
        # Each layer is given the input that it had at position 0. Without that, a layer whose
        # output depends on position would make all layers above it look wrong.
        away = _Replaying(handle, at_home.outputs)
        handle.run(away, ids, torch.arange(shift, shift + NUM_TOKENS, device=handle.device))
        moved.append(Moved(shift, away.layers))
    rope = Rerotator(*_explanation(fitting, at_home.layers, moved), handle.device)
    checks = [
        [layer, shift, key_error, _relative(here.v_TGD, there.v_TGD)]
        for shift, layers in moved
        for layer, (here, there) in enumerate(zip(at_home.layers, layers, strict=True))
        for key_error in [_key_error(rope, layer, here, there, shift)]
    ]
    return Measured(rope, checks, at_home.compared)


def _explanation(
    tables: Sequence[Table], home: list[LayerKV], moved: list[Moved]
) -> tuple[list[Table], list[int]]:
    """Tables and the number of each layer's among them: those of the one layout by which the worst
    explained layer is explained best, or of several where that is far better. On the CPU: a GPU has
    no room for all tables.
    """
    home = [_on_host(kv) for kv in home]
    moved = [Moved(m.shift, [_on_host(kv) for kv in m.layers]) for m in moved]
    errors = [_errors(table, home, moved) for table in tables]
    if math.isinf(_worst(errors)):
        detail = "no RoPE table of the model's is as small as a key of some layer"
        raise UnsupportedModelError(Reason.MOVED_KEYS_DIFFER, detail)
    pairings = {table.layout for table in tables}
    mine = {x: [n for n, table in enumerate(tables) if table.layout == x] for x in pairings}
    worst = {x: _worst([errors[n] for n in some]) for x, some in mine.items()}
    one = min(worst, key=worst.__getitem__)
    # One layout serves all layers of most models, and the kernels need one. So several have to be
    # far better, not only better by rounding.
    several = worst[one] > _FAR_BETTER * _worst(errors)
    chosen = list(range(len(tables))) if several else mine[one]
    best = [chosen[n] for n in nearest([errors[n] for n in chosen])]
    used = sorted(set(best))
    return [tables[n] for n in used], [used.index(n) for n in best]


def _worst(errors_TL: Sequence[Sequence[float]]) -> float:
    """The error of the layer that is explained worst, each by the table that explains it best."""
    by_layer: list[tuple[float, ...]] = list(zip(*errors_TL, strict=True))
    return max(map(min, by_layer))


def _on_host(kv: LayerKV) -> LayerKV:
    return LayerKV(kv.k_TGD.cpu(), kv.v_TGD.cpu())


def nearest(errors_TL: Sequence[Sequence[float]]) -> list[int]:
    """For each layer the number of the table with the smallest error, of equals the first."""
    by_layer = zip(*errors_TL, strict=True)
    # Of tables that explain a layer equally well, the first: the same one on every rank and
    # machine.
    return [min(range(len(column)), key=column.__getitem__) for column in by_layer]


def _errors(table: Table, home: list[LayerKV], moved: list[Moved]) -> list[float]:
    """Each layer's larger error of the shifts, if it turned by ``table``."""
    rope = Rerotator([table], [0] * len(home), torch.device("cpu"))
    return [
        max(_key_error(rope, layer, here, m.layers[layer], m.shift) for m in moved)
        if table.fits(here.k_TGD.shape[-1])
        else math.inf
        for layer, here in enumerate(home)
    ]


def _key_error(rope: Rerotator, layer: int, here: LayerKV, there: LayerKV, shift: int) -> float:
    at = torch.arange(len(here.k_TGD), device=here.k_TGD.device)
    return _relative(rope.apply(here.k_TGD, rope.delta(at, at + shift), layer), there.k_TGD)


class _Recording(IsolatedPass):
    """Keeps the attention's output at each layer, besides K and V, and compares it with what the
    layer's backend puts out for the same input.
    """

    def __init__(self, cache: PagedCache) -> None:
        super().__init__([(0, NUM_TOKENS)], cache.handle.num_layers)
        self.outputs: list[torch.Tensor] = []
        self.compared: list[list[Any]] = []
        self._handle, at = cache.handle, torch.arange(NUM_TOKENS)
        # Not block 0, the null block of vLLM: a slot in it is an error.
        blocks = torch.arange(1, 2 + NUM_TOKENS // cache.block_size)
        self._slots = cache.slots(blocks, at)
        self._metadata = cache.metadata(blocks, at, self._slots)

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        super().attend(index, layer, q_THD, k_TGD, v_TGD, out_THD)
        self.outputs.append(out_THD.clone())
        self._handle.write(index, k_TGD, v_TGD, self._slots)
        real, metadata = self._handle.layers[index], self._metadata[index]
        theirs = torch.empty_like(out_THD)
        layout.attend(real, q_THD, k_TGD, v_TGD, metadata, theirs)
        # The backend reads from the cache, which may hold eight bits. We compute with what went in.
        is_rounded = real.kv_cache.dtype != k_TGD.dtype
        self.compared.append([index, _relative(out_THD, theirs), is_rounded])


class _Replaying(IsolatedPass):
    """Puts out what another pass did, so that each layer gets the input that it got there."""

    def __init__(self, handle: ModelHandle, outputs: Sequence[torch.Tensor]) -> None:
        super().__init__([(0, NUM_TOKENS)], handle.num_layers)
        self._outputs = outputs

    def attend(
        self,
        index: int,
        layer: Any,
        q_THD: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
        out_THD: torch.Tensor,
    ) -> None:
        self._collect(index, LayerKV(k_TGD, v_TGD))
        if index == self.last:
            self.stop()
        out_THD.copy_(self._outputs[index])


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-12))
