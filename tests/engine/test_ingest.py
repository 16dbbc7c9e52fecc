"""Chunks are computed quickly as they are slowly; what that costs is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import FLASH_DTYPE, start_in_process
from tiny import Words, make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.costs import Costs
from cacheblend_rag.engine import EngineOutput, EngineRequest, compat

pytestmark = pytest.mark.vllm

words = Words(31)
CHUNKS = [words(size) for size in (70, 33, 90)]
PREFIX = words(6)


@pytest.fixture(scope="module")
def blend(tiny_models: Path) -> Iterator[CacheBlend]:
    config = BlendConfig(ingest_prefix=PREFIX)
    with start_in_process(make("llama", tiny_models), config=config, dtype=FLASH_DTYPE) as opened:
        yield opened


def stored(blend: CacheBlend, prefix: object, chunks: Sequence[tuple[int, ...]] = CHUNKS) -> Any:
    """The KV of chunks computed now behind ``prefix``, float32 each."""
    front = blend.with_config(replace(blend.config, ingest_prefix=prefix))  # type: ignore[arg-type]
    front.forget(chunks)
    keys = front.ingest(chunks, progress=False).keys
    store = get_kv_transfer_group().blender.store  # type: ignore[attr-defined]
    return [store.get(key).kv_L2NHD.float() for key in keys]


def test_costs_are_corrected_from_end_to_end(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of our own, on which a plain prefill takes 5 s and a blend 7 s."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("cacheblend_rag.front.startup.time", clock)
    wrong = {"prefill_s": 1e-9, "recompute_s": 1e-9, "load_s": 1e-9, "blend_s": 0.5}
    rpc, generate = blend.engine.rpc, blend.engine.generate

    def generate_slowly(requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        now[0] += 5.0 if requests[0].params is None else 7.0
        return generate(requests)

    monkeypatch.setattr(blend.engine, "generate", generate_slowly)
    monkeypatch.setattr(
        blend.engine,
        "rpc",
        lambda name, *args: [wrong] if name == "cacheblend_costs" else rpc(name, *args),
    )
    blender = get_kv_transfer_group().blender  # type: ignore[attr-defined]
    monkeypatch.setattr(blender, "costs", Costs(**wrong))
    costs = blend._measure_costs()
    assert costs is not None
    blend._limit(costs)
    assert blender.costs == costs
    assert costs.blend_s == pytest.approx(2.0, abs=0.2)  # less what the store took
    assert costs._replace(blend_s=0.5) == Costs(**wrong)


def test_a_slow_store_is_no_fixed_cost(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks come while other requests run, and the one that waits is told how long that took:
    else all prompts whose chunks are in memory would be taken for as slow.
    """
    blend.ingest(CHUNKS[2:], progress=False)
    blender = get_kv_transfer_group().blender  # type: ignore[attr-defined]
    get = blender.store.get_in_time

    def slow(*args: Any) -> Any:
        time.sleep(0.7)
        return get(*args)

    monkeypatch.setattr(blender, "is_fast", lambda plan: False)
    monkeypatch.setattr(blender.store, "get_in_time", slow)
    asked = words(4) + CHUNKS[2] + words(30)
    report = blend.generate(asked, max_tokens=1, blend_if="always").report
    assert report.blended and 0.7 <= report.stages_s["fetch"] < 1.4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["none", "one"])
def test_flash_attention_agrees_with_plain_torch(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, prefix: object
) -> None:
    used: list[bool] = []
    real = compat.flash_attention

    def counted(layer: Any) -> Callable[..., Any] | None:
        found = real(layer)
        used.append(found is not None)
        return found

    monkeypatch.setattr(compat, "flash_attention", counted)
    quick = stored(blend, prefix)
    assert used and all(used), "FlashAttention was not used"
    monkeypatch.setattr(compat, "flash_attention", lambda layer: None)
    for got, expected in zip(quick, stored(blend, prefix), strict=True):
        assert (got - expected).norm() / expected.norm() < 0.02  # bfloat16 through the layers
