"""Where prompts may be given as embeddings, vLLM embeds the tokens of all others before a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from blending import PARTS, PREFIX, blends_as_the_reference
from engines import start_in_process
from reference import Reference
from tiny import make

pytestmark = [pytest.mark.vllm]


def test_prompts_of_tokens_blend(tiny_models: Path) -> None:
    path = make("llama", tiny_models)
    with start_in_process(path, prefix=PREFIX, enable_prompt_embeds=True) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        blend.ingest([p.ids for p in PARTS if p.stored], progress=False)
        blends_as_the_reference(blend, Reference(path, PREFIX))
