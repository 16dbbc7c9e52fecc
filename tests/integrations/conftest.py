"""LlamaIndex finds its own tokenizer's files where it ships them, also in worker processes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def _shipped_tokenizers() -> Path:
    spec = importlib.util.find_spec("llama_index.core")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "_static" / "tiktoken_cache"


os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(_shipped_tokenizers()))
