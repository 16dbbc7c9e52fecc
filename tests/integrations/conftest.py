"""One real engine for all tests here; and LlamaIndex finds the tokenizer files that it ships."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, install

from cacheblend_rag import CacheBlend
from cacheblend_rag.shared import SharedEngine


def _shipped_tokenizers() -> Path:
    spec = importlib.util.find_spec("llama_index.core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "_static" / "tiktoken_cache"


os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(_shipped_tokenizers()))


@pytest.fixture(scope="session")
def real(embedded: Path) -> Iterator[CacheBlend]:
    """SmolLM2-135M-Instruct on the CPU, in an engine that serves many requests at once."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(max(1, min(4, cores))))  # unlike tiny models
        # float32: the same answer in every batch
        blend = CacheBlend(embedded, dtype="float32", max_model_len=4096, block_size=32)
    with blend:
        yield blend


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    """From here on engines are fake ones; those that were started, in order."""
    SharedEngine.close_all()  # what LangChain's own suites left
    yield install(monkeypatch)
    SharedEngine.close_all()
