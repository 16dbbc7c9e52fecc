"""Starting engines over tiny models, and reading their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import VOCAB

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend

GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
FULL_LOGPROBS: dict[str, Any] = {**GREEDY, "logprobs": -1}


def start(path: Path, *, prefix: tuple[int, ...] = (), engine: str = "batch", **changes: Any) -> CacheBlend:
    """A float32 engine on token ids with small blocks and full log-probabilities."""
    config = changes.pop("config", None) or BlendConfig(ingest_prefix=prefix)
    options = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_logprobs": VOCAB,
        "block_size": 32,
        **changes,
    }
    return CacheBlend(path, config=config, engine=engine, **options)


def logprobs(result: BlendResult) -> torch.Tensor:
    """float32 [steps, vocab] of a result asked for with FULL_LOGPROBS."""
    assert result.logprobs is not None
    return torch.tensor([[at[token] for token in range(VOCAB)] for at in result.logprobs])


def selected(blend: CacheBlend, result: BlendResult) -> list[int]:
    """The positions that the engine recomputed for ``result``."""
    [outcome] = blend._engine.rpc("cacheblend_outcome", result.request_id, True)
    return list(outcome["selected"])
