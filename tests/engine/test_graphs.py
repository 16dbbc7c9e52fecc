"""What is decided about CUDA graphs, which needs no GPU."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("triton", reason="this platform has no Triton")


def test_a_size_that_runs_badly_is_padded_to_a_larger_one() -> None:
    from cacheblend_rag.engine.graphs import _quickest

    seconds = {32: 7.0, 64: 7.1, 96: 12.0, 128: 11.0, 160: 8.0, 192: 9.0}
    assert _quickest(seconds) == {32: 32, 64: 64, 96: 160, 128: 160, 160: 160, 192: 192}
    assert _quickest({32: 5.0, 64: 5.0}) == {32: 32, 64: 64}, "no more rows than needed"
    assert _quickest({32: None, 64: 5.0, 96: None}) == {32: 64, 64: 64, 96: 96}, "not captured"
