"""LoRA on a model whose values are its keys before rotation.

vLLM adds what an adapter says of ``k_proj`` to keys only. So its own answers are not those of
merged weights, and ours are its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from blending import PARTS, PREFIX, PROMPT, blends_as_the_reference, forget_prompts
from engines import EXACT, FULL_LOGPROBS, logprobs, start_in_process
from reference import Reference
from tiny import make

from cacheblend_rag import BlendConfig

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CHUNKS = [p.ids for p in PARTS if p.stored]
CONFIG = BlendConfig(ingest_prefix=PREFIX, blend_if="always")


@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "o_proj"), ("k_proj",)])
def test_gemma_4(tiny_models: Path, targets: tuple[str, ...]) -> None:
    from vllm.lora.request import LoRARequest

    path = make("gemma4", tiny_models / targets[0])
    folder, merged = make_adapter(path, 1, targets)
    reference = Reference(merged, PREFIX)
    with start_in_process(path, prefix=PREFIX, enable_lora=True, max_lora_rank=8) as plain:
        assert plain.model_check.passed, plain.model_check.detail
        front = plain.with_config(CONFIG, LoRARequest("adapter", 1, str(folder)))
        front.ingest(CHUNKS, progress=False)
        if "k_proj" not in targets:
            blends_as_the_reference(front, reference)
            return
        own = front.generate(PROMPT, mode="full", **FULL_LOGPROBS)
        forget_prompts(plain)
        exact = front.generate(PROMPT, recompute_ratio=1.0, **FULL_LOGPROBS)
        assert exact.report.blended, exact.report.detail
        torch.testing.assert_close(logprobs(exact), logprobs(own), atol=EXACT, rtol=0)
        of_merged = reference.full(PROMPT, 1).logprobs
        assert (logprobs(own)[0] - of_merged[0]).abs().max() > 0.1, "vLLM has mended it"
