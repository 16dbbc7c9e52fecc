"""Quantised weights change nothing about blending; a cache that rounds costs only its rounding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blending import IDS, PARTS, PREFIX, PROMPT
from engines import EXACT, FULL_LOGPROBS, logprobs, start_in_process
from quantised import QUANTISED, make_quantised
from tiny import make

from cacheblend_rag import CacheBlend
from cacheblend_rag.engine import compat

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]

# a GPU rounds 16 bits by batch shape
EXACT_BF16 = 0.05 if torch.cuda.is_available() else EXACT


OF_LLAMA = [(name, "llama") for name in QUANTISED]
# windows, tables that differ by layer, layers that do not rotate
OF_OTHERS = [
    pytest.param(name, family, marks=pytest.mark.slow)
    for name, family in (("awq", "gemma3"), ("gptq", "smollm3"), ("w8a8", "qwen3"))
]


@pytest.mark.parametrize(("name", "family"), [*OF_LLAMA, *OF_OTHERS])
def test_quantised_weights_are_exact_at_ratio_1(name: str, family: str, tiny_models: Path) -> None:
    if name in ("gptq", "awq") and not (
        torch.cpu._is_avx512_supported() or torch.cuda.is_available()
    ):
        pytest.skip("needs a GPU or AVX-512: vLLM's kernel for four-bit weights is made of it")
    path = make_quantised(name, tiny_models, family)
    with start_in_process(path, prefix=PREFIX, dtype="bfloat16") as blend:
        blends_within(blend, EXACT_BF16)


@pytest.mark.gpu
def test_fp8_weights_are_exact_at_ratio_1(tiny_models: Path) -> None:
    """Rounded by vLLM when it loads them."""
    path = make("llama", tiny_models)
    with start_in_process(path, prefix=PREFIX, dtype="bfloat16", quantization="fp8") as blend:
        blends_within(blend, EXACT_BF16)


@pytest.mark.skipif(
    not torch.cpu._is_avx512_supported() and not torch.cuda.is_available(),
    reason="needs a GPU or AVX-512: vLLM's FP8 cache is made of it",
)
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "gemma4", "gpt_oss"))],
)
def test_an_fp8_cache_costs_its_rounding(family: str, tiny_models: Path) -> None:
    if torch.cuda.is_available() and family != "llama":
        pytest.skip("needs a GPU that was run with it")
    path = make(family, tiny_models)
    with start_in_process(path, prefix=PREFIX, dtype="bfloat16", kv_cache_dtype="fp8") as blend:
        blends_within(blend, 0.1)


def blends_within(blend: CacheBlend, tolerance: float) -> None:
    assert blend.model_check.passed, blend.model_check.detail
    blend.ingest([p.ids for p in PARTS if p.stored], progress=False)
    plain = blend.generate(PROMPT, mode="full", **FULL_LOGPROBS)
    exact = blend.generate(PROMPT, recompute_ratio=1.0, **FULL_LOGPROBS)
    assert exact.report.blended and exact.report.tokens_reused == 0, exact.report.detail
    error = (logprobs(exact)[0] - logprobs(plain)[0]).abs().max()
    assert error <= tolerance
    naive = blend.generate(PROMPT, mode="reuse", **FULL_LOGPROBS)
    assert naive.report.blended and naive.report.tokens_recomputed == 0
    apart = (logprobs(naive)[0] - logprobs(plain)[0]).abs().max()
    assert apart > max(2 * tolerance, 1e-2), "reuse must differ from full"
    for selector in ("query", "hkvd"):
        some = blend.generate(PROMPT, recompute_ratio=0.2, selector=selector, **FULL_LOGPROBS)
        assert some.report.blended and 0 < some.report.tokens_recomputed < 0.25 * len(IDS)


def test_rounded_queries_are_read_with_their_scale() -> None:
    layer = SimpleNamespace(_q_scale=torch.tensor(0.5))
    keys = torch.randn(3, 2, 32, dtype=torch.bfloat16)
    query = torch.randn(3, 4, 32, dtype=torch.bfloat16)
    assert compat.plain_query(layer, query, keys) is query
    rounded = (query / 0.5).to(torch.float8_e4m3fn)
    read = compat.plain_query(layer, rounded, keys)
    assert read.dtype == keys.dtype
    torch.testing.assert_close(read, query, atol=0.02, rtol=0.07)
