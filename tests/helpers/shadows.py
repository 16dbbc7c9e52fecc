"""Prompts whose answers are computed again, and what vLLM itself says of them."""

from __future__ import annotations

import time
from typing import Any

import torch
from engines import FULL_LOGPROBS, logprobs
from tiny import Words

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend
from cacheblend_rag.shadow.report import ShadowReport

words = Words(11)
PREFIX, CHUNKS = words(4), [words(70), words(64), words(90)]
PROMPT = (*words(40), *(t for chunk in CHUNKS for t in chunk), *words(20))
SAMPLING: dict[str, Any] = {**FULL_LOGPROBS, "max_tokens": 12}
CONFIG = BlendConfig(ingest_prefix=PREFIX, blend_if="always", recompute_ratio=0.05, shadow=1.0)


def computed(blend: CacheBlend, result: BlendResult) -> ShadowReport:
    """The shadow of an answer, once it is there."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        found = blend.shadow(result)
        assert found is not None
        if found.state != "waiting":
            return found
        time.sleep(0.05)
    raise AssertionError("the answer was never computed again")


def forced(blend: CacheBlend, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """[tokens, vocab] log-probabilities of vLLM's own prefills behind each token of the answer."""
    options: dict[str, Any] = {**SAMPLING, "max_tokens": 1, "mode": "full"}
    prompts = [(*prompt, *answer[:n]) for n in range(len(answer))]
    return torch.cat([logprobs(r) for r in blend.generate(prompts, **options)])
