"""Latent attention, as other versions and backends of vLLM than that of the CPU have it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_rag.engine import compat, layout, rows
from cacheblend_rag.engine.forward import ModelHandle, UnsupportedModelError
from cacheblend_rag.reason import Reason

LATENT, ROTATED = 8, 4


def test_latents_are_copied_only_for_those_who_look_at_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def packed(kv_c: torch.Tensor, k_pe: torch.Tensor) -> torch.Tensor:
        copied.append(torch.cat([kv_c, k_pe[:, 0]], 1)[:, None])
        return copied[-1]

    monkeypatch.setattr(layout, "packed", packed)
    executor = SimpleNamespace(place_layer=lambda index: None)
    proof = SimpleNamespace(note=lambda at, k, v: seen.append(k))
    kv_c, k_pe = torch.randn(4, LATENT), torch.randn(4, 1, ROTATED)
    for proves, is_last in ((None, True), (proof, False), (proof, True)):
        blend, at = SimpleNamespace(why_not=None, proof=proves), SimpleNamespace(device=None)
        part: Any = SimpleNamespace(executor=executor, blend=blend, place=slice(1, 3), positions=at)
        step = rows._StepImpl(Layer(), 5, [(part, None)], lambda _: nullcontext(), is_last)
        rows._LatentStepImpl(step).before(kv_c, k_pe)
    assert len(copied) == 1
    [k] = seen
    assert torch.equal(k[:, 0], torch.cat([kv_c, k_pe[:, 0]], 1)[1:3])


@pytest.mark.parametrize("support", ["VARLEN", "UNIFORM", "SINGLE_ONLY", None])
def test_runs_are_read_from_latents_in_any_order(support: str | None) -> None:
    """A run at the prompt's start, without context, stands before others. vLLM's other way takes it
    for the last: the last run would be computed without its context.
    """
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills

    kind = SimpleNamespace(name=support) if support else None
    builder = SimpleNamespace(query_len_support=kind, reorder_batch_threshold=4)
    if support is None:
        del builder.query_len_support
    compat.read_latents(builder, 64)
    bounds = torch.tensor([0, 30, 31, 39, 60], dtype=torch.int32)
    step: Any = SimpleNamespace(
        max_query_len=30, num_reqs=4, num_actual_tokens=60, query_start_loc_cpu=bounds
    )
    decodes, others, _, _ = split_decodes_and_prefills(step, builder.reorder_batch_threshold)
    assert compat.takes_any_run(builder) is (support == "VARLEN")
    assert (decodes, others) == ((4, 0) if support == "VARLEN" else (0, 4))


class Impl:
    """Of latent attention in vLLM 0.26, which writes the cache."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def do_kv_cache_update(self, kv_c: torch.Tensor, k_pe: torch.Tensor, *rest: Any) -> None:
        self.calls.append(("written", kv_c, k_pe, rest))


class Layer:
    """The layer in newer ones, which does it itself."""

    kv_lora_rank, kv_b_proj = LATENT, None

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.impl = Impl(self.calls)

    def update_kv_cache(self, kv_c: torch.Tensor, k_pe: torch.Tensor, *rest: Any) -> None:
        self.calls.append(("written", kv_c, k_pe, rest))


@pytest.mark.parametrize("is_old", [True, False])
def test_stored_latents_are_placed_before_fresh_ones_are_written(is_old: bool) -> None:
    layer = Layer()
    executor = SimpleNamespace(place_layer=lambda index: layer.calls.append(("placed", index)))
    blend = SimpleNamespace(why_not=None, proof=None)
    part: Any = SimpleNamespace(executor=executor, blend=blend, place=slice(1, 3))

    def move(index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        layer.calls.append(("moved", index, key, value))

    step = rows._StepImpl(layer, 5, [(part, move)], lambda _: nullcontext(), False)
    proxy: Any = rows._proxy(step)
    kv_c, k_pe = torch.randn(4, LATENT), torch.randn(4, 1, ROTATED)
    update = proxy.impl.do_kv_cache_update if is_old else proxy.update_kv_cache
    update(kv_c, k_pe, "cache", "slots", "auto", "scale")
    placed, moved, written = layer.calls
    assert placed == ("placed", 5)
    assert moved[1] == 5 and moved[2].equal(layout.packed(kv_c, k_pe)[1:3])
    assert not moved[3].numel()
    assert written[1] is kv_c and written[2] is k_pe
    assert written[3] == ("cache", "slots", "auto", "scale")


@pytest.mark.parametrize(
    ("support", "eager", "alone", "refused_on", "refusal"),
    [
        ("VARLEN", True, True, ("latents_on_ranks",), ""),
        ("VARLEN", False, True, ("latents_on_ranks",), ""),
        ("VARLEN", True, False, ("latents_on_ranks",), "on several GPUs"),
        ("VARLEN", False, False, (), ""),
        ("UNIFORM", True, True, (), ""),
        ("UNIFORM", False, True, (), "FLASHMLA in CUDA graphs"),
    ],
)
def test_latents_on_a_gpu_blend_as_they_were_run(
    support: str,
    eager: bool,
    alone: bool,
    refused_on: tuple[str, ...],
    refusal: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "is_cpu", lambda: False)
    monkeypatch.setattr(compat, "NOT_RUN_ON_A_GPU", frozenset(refused_on))
    builder = SimpleNamespace(query_len_support=SimpleNamespace(name=support))
    backend = SimpleNamespace(get_builder_cls=lambda: builder, get_name=lambda: "FLASHMLA")
    handle: Any = ModelHandle.__new__(ModelHandle)
    handle.layers = [SimpleNamespace(get_attn_backend=lambda: backend)]
    handle.layout, handle.sharing = layout.KVLayout(1, 1, 1, 576), []
    handle.config = SimpleNamespace(model_config=SimpleNamespace(enforce_eager=eager))
    handle.ranks = SimpleNamespace(alone=alone)
    if not refusal:
        handle._check_was_run_on_a_gpu()
        return
    with pytest.raises(UnsupportedModelError, match=refusal) as refused:
        handle._check_was_run_on_a_gpu()
    assert refused.value.why.reason is Reason.MLA
