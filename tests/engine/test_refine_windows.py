"""Where refinement is refused. A file of its own, as its engine must stand alone in its process."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import start
from tiny import Words, make

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]


@pytest.mark.slow
def test_a_model_with_windows_is_not_refined(tiny_models: Path) -> None:
    words = Words(41)
    prefix, chunks = words(4), [words(n) for n in (70, 100, 64, 90)]
    prompt = words(9) + sum(chunks, ()) + words(25)
    with start(make("gemma2", tiny_models), prefix=prefix) as blend:
        blend.ingest(chunks, progress=False)
        report = blend.generate(prompt, refine="idle", max_tokens=40).report
        assert report.blended and not report.refined and not report.tokens_refined
        assert "not tested with sliding windows" in report.refine_detail
