"""Latent attention and LoRA on a GPU, whose kernels take 16 bits only: as near to the reference as
rounding lets it be. Exactness is shown on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapters import make_adapter
from blending import PARTS, PREFIX, PROMPT, QUESTION, forget_prompts
from engines import FULL_LOGPROBS, logprobs, selected, start_in_process
from reference import Answer, Reference
from tiny import LATENT_DENSE, make
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.lora.request import LoRARequest

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend
from cacheblend_rag.config import PROPAGATION_LENGTH
from cacheblend_rag.engine import connectors

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]

FRESH = [i for i, stored in enumerate(p.stored for p in PARTS for _ in p.ids) if not stored]


class Family(NamedTuple):
    """An engine that has stored the chunks, and the reference in float32."""

    blend: CacheBlend
    reference: Reference
    full: Answer


# by name of vLLM's backend: kernels of these read latents for one query a sequence
BY_ROW = ("TRITON_MLA", "FLASHMLA")
# those compiled, and in CUDA graphs, are as a GPU's user gets them
KINDS = [
    *LATENT_DENSE, "lora", *(f"{name} compiled" for name in (*LATENT_DENSE, "lora")),
    *(f"deepseek_v2-dense {backend}" for backend in BY_ROW),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[Family]:
    name, *how = request.param.split()
    adapts, compiled = name == "lora", "compiled" in how
    backend = next((word for word in how if word in BY_ROW), None)
    path = merged = make("llama" if adapts else name, tiny_models)
    # the width of a block that all kernels take
    options: dict[str, Any] = {"dtype": "bfloat16", "block_size": 64}
    if compiled:
        options["enforce_eager"] = False
    if backend is not None:
        options["attention_backend"] = backend
    if adapts:
        adapter, merged = make_adapter(path, 1)
        options |= {"enable_lora": True, "max_lora_rank": 8}
    reference = Reference(merged, PREFIX)
    # An engine with vLLM's V1 runner forbids what its V2 runner does as it starts in the same
    # process.
    set_cudagraph_capturing_enabled(True)
    with start_in_process(path, prefix=PREFIX, **options) as plain:
        assert plain.model_check.passed, plain.model_check.detail
        blend = plain
        if not adapts:
            executors = connectors.ours(get_kv_transfer_group()).worker_state.executors
            assert not executors.reason, executors.reason
        if adapts:
            config = BlendConfig(ingest_prefix=PREFIX, blend_if="always")
            blend = plain.with_config(config, LoRARequest("adapter", 1, str(adapter)))
        blend.ingest([p.ids for p in PARTS if p.stored], progress=False)
        yield Family(blend, reference, reference.full(PROMPT, 1))


@pytest.fixture(autouse=True)
def nothing_cached(family: Family) -> None:
    forget_prompts(family.blend)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the log-probabilities of a first token, their mean distance."""
    return float((one[0] - other[0]).abs().mean())


def nearer(result: BlendResult, answer: Answer, full: Answer) -> None:
    """To the reference's blend than the full prefill is, by far."""
    assert result.report.blended, result.report.detail
    off = distance(logprobs(result), answer.logprobs)
    assert off < distance(full.logprobs, answer.logprobs) / 3


def test_ratio_1_is_a_full_prefill_but_for_rounding(family: Family, record_property: Any) -> None:
    blend, _, full = family
    plain = blend.generate(PROMPT, mode="full", **FULL_LOGPROBS)
    exact = blend.generate(PROMPT, recompute_ratio=1.0, **FULL_LOGPROBS)
    assert exact.report.blended and exact.report.tokens_reused == 0, exact.report.detail
    rounding = distance(logprobs(plain), full.logprobs)
    off = distance(logprobs(exact), logprobs(plain))
    record_property("ratio 1", f"{off:.1e}")
    record_property("rounding of a plain prefill", f"{rounding:.1e}")
    assert off < 3 * rounding


def test_blends_are_the_references_but_for_rounding(family: Family) -> None:
    blend, reference, full = family
    naive = blend.generate(PROMPT, mode="reuse", **FULL_LOGPROBS)
    nearer(naive, reference.blend(PARTS, QUESTION, FRESH, 1), full)
    for selector in ("query", "hkvd"):
        some = blend.generate(PROMPT, recompute_ratio=0.2, selector=selector, **FULL_LOGPROBS)
        rows = selected(blend, some)
        assert set(FRESH) < set(rows)
        moved = reference.blend(PARTS, QUESTION, rows, 1, propagation_length=PROPAGATION_LENGTH)
        nearer(some, moved, full)


def test_a_blend_beside_others_is_as_alone(family: Family) -> None:
    """Beside a plain prefill without context, which vLLM's kernels treat in another way."""
    blend, _, full = family
    prompts = [PROMPT, PROMPT[:70], PROMPT[3:]]
    options = {"recompute_ratio": 0.2, "propagation_length": 0, **FULL_LOGPROBS}
    alone = []
    for prompt in prompts:
        forget_prompts(blend)
        alone.append(blend.generate(prompt, **options))
    forget_prompts(blend)
    rounding = distance(
        logprobs(blend.generate(PROMPT, mode="full", **FULL_LOGPROBS)), full.logprobs
    )
    forget_prompts(blend)
    for one, beside in zip(alone, blend.generate(prompts, **options), strict=True):
        assert one.report.blended is beside.report.blended
        assert distance(logprobs(beside), logprobs(one)) < 5 * rounding
