"""A family that cannot blend is served as vLLM alone serves it, and says why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import FULL_LOGPROBS, logprobs, plain_engine, start
from tiny import REFUSED, Words, make

from cacheblend_rag.engine import compat
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_process")]

words = Words(1)
PREFIX = words(4)
CHUNKS = [words(size) for size in (37, 50, 130, 38)]
PROMPT = words(9) + CHUNKS[2] + CHUNKS[0] + words(3) + CHUNKS[1] + CHUNKS[3] + words(40)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_family_answers_exactly(name: str, tiny_models: Path) -> None:
    path = make(name, tiny_models)
    dtype = "bfloat16"  # all that vLLM's CPU kernels take
    options = {"prefix": PREFIX, "block_size": None, "dtype": dtype}
    try:
        with plain_engine(path, dtype) as plain:
            expected = plain(PROMPT)
    except Exception as error:
        with pytest.raises(CacheBlendError):
            start(path, **options)
        torch.set_default_dtype(torch.float32)  # vLLM's failed loading leaves the model's behind
        pytest.skip(f"this vLLM can't serve it without us either: {error}")
    with start(path, **options) as blend:
        assert not blend.model_check.passed
        report = blend.ingest(CHUNKS, progress=False)
        assert report.computed == 0 and report.reason is blend.model_check.reason is not None
        result = blend.generate(PROMPT, **FULL_LOGPROBS)
        assert not result.report.blended and result.report.detail == blend.model_check.detail
        got = logprobs(result)
    assert result.token_ids == expected.tokens
    torch.testing.assert_close(got, expected.logprobs, atol=0, rtol=0)


@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("config", [{"index_topk": 64}, {}])
def test_latent_attention_is_refused_where_it_was_not_tested(
    config: dict[str, int], is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that an indexer picks have a cache of their own; a GPU has other kernels."""
    monkeypatch.setattr(compat, "_is_cpu", lambda: is_cpu)
    model: Any = SimpleNamespace(use_mla=True, hf_text_config=SimpleNamespace(**config))
    refused = compat.model_refusal(model)
    assert (refused is None) is (is_cpu and not config)
    assert refused is None or refused.reason is Reason.MLA
    options: Any = SimpleNamespace(
        lora_config=object(),
        speculative_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1),
    )
    adapters = compat.engine_refusal(options)
    assert (adapters is None) is is_cpu
    assert adapters is None or adapters.reason is Reason.LORA
