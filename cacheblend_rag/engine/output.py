"""vLLM's request outputs as ours."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from cacheblend_rag.engine.base import EngineOutput, EngineRequest
from cacheblend_rag.plan import PARAMS_KEY


def to_prompt(request: EngineRequest) -> dict[str, Any]:
    """vLLM's tokens prompt."""
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.token_ids)}
    if request.cache_salt is not None:
        prompt["cache_salt"] = request.cache_salt
    return prompt


def to_output(output: Any) -> EngineOutput:
    """One piece from vLLM's RequestOutput in delta mode."""
    piece = output.outputs[0]
    engine: Mapping[str, Any] = {}
    if output.finished:
        engine = (output.kv_transfer_params or {}).get(PARAMS_KEY) or {
            "prefix_cached": output.num_cached_tokens or 0
        }
    logprobs = piece.logprobs
    return EngineOutput(
        text=piece.text,
        token_ids=tuple(piece.token_ids),
        finish_reason=piece.finish_reason,
        stop_reason=piece.stop_reason,
        logprobs=[{t: lp.logprob for t, lp in at.items()} for at in logprobs] if logprobs else None,
        engine=engine,
        at=time.perf_counter(),
    )
