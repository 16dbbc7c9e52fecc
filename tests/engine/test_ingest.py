"""Chunks are computed as a plain prefill computes them, behind one prefix or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import start
from tiny import Words, make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine import compat
from cacheblend_rag.engine.lanes import Lanes
from cacheblend_rag.errors import ConfigError

pytestmark = pytest.mark.vllm

words = Words(31)
CHUNKS = [words(size) for size in (70, 33, 90)]
PREFIXES = [words(6) for _ in range(3)]


@pytest.fixture(scope="module")
def blend(tiny_models: Path) -> Iterator[CacheBlend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        config = BlendConfig(ingest_prefix=PREFIXES[0])
        with start(make("llama", tiny_models), config=config, dtype=dtype) as opened:
            yield opened


def stored(blend: CacheBlend, prefix: object, chunks: Sequence[tuple[int, ...]] = CHUNKS) -> Any:
    """The KV of chunks computed now behind ``prefix``, float32 each."""
    front = blend.beside(replace(blend.config, ingest_prefix=prefix))  # type: ignore[arg-type]
    front.forget(chunks)
    keys = front.ingest(chunks, progress=False).keys
    store = get_kv_transfer_group().blender.store  # type: ignore[attr-defined]
    return [store.get(key).kv_L2NHD.float() for key in keys]


def test_of_several_prefixes_the_mean_is_stored(blend: CacheBlend) -> None:
    each = [stored(blend, prefix) for prefix in PREFIXES]
    assert not torch.allclose(each[0][0], each[1][0], atol=1e-3)
    rounding = 0.02 if torch.cuda.is_available() else 1e-5
    for chunk, of_chunk in enumerate(zip(*each, strict=True)):
        together = stored(blend, PREFIXES)[chunk]
        assert torch.allclose(together, torch.stack(of_chunk).mean(0), atol=rounding)


def test_several_prefixes_are_keys_of_their_own_and_never_exact(blend: CacheBlend) -> None:
    one, two, three = (
        blend.beside(replace(blend.config, ingest_prefix=prefix))
        for prefix in (PREFIXES[0], PREFIXES[:1], PREFIXES)
    )
    assert one.key(CHUNKS[0]) == two.key(CHUNKS[0]) != three.key(CHUNKS[0])
    for front, exact in ((one, True), (three, False)):
        front.ingest(CHUNKS, progress=False)
        got = front.generate((*PREFIXES[0], *CHUNKS[0], *words(12)), max_tokens=1, when="always")
        assert got.report.blended
        assert ("exact" in got.report.segments[1].reason) == exact, got.report.segments


def test_prefixes_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="one length, got 2, 3: cut them"):
        BlendConfig(ingest_prefix=[(1, 2), (1, 2, 3)])


def test_costs_are_corrected_from_end_to_end(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"prefill_s": 1e-9, "recompute_s": 1e-9, "load_s": 1e-9, "blend_s": 0.0}
    monkeypatch.setattr(Lanes, "costs", lambda self: wrong)
    costs = blend._measure_costs()
    blender = get_kv_transfer_group().blender  # type: ignore[attr-defined]
    assert costs is not None and costs == blender.costs
    assert costs.blend_s >= 0  # it is measured here, so that is all that is sure
    blender.costs = None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
@pytest.mark.parametrize("prefix", [(), PREFIXES[0], PREFIXES], ids=["none", "one", "several"])
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
        assert torch.allclose(got, expected, atol=0.05, rtol=0.05)
