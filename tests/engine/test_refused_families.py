"""A family that cannot blend is served as vLLM alone serves it, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import FULL_LOGPROBS, logprobs, plain_engine, start
from tiny import REFUSED, Words, make

from cacheblend_rag.errors import CacheBlendError

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
