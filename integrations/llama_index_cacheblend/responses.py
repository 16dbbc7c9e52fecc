"""Our results as LlamaIndex's responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LogProb,
    MessageRole,
)

from cacheblend_rag import BlendResult


def completion(text: str, delta: str | None, tail: Mapping[str, Any]) -> CompletionResponse:
    """A completion: ``text`` so far, and ``delta``, what is new in it."""
    return CompletionResponse(text=text, delta=delta, **tail)


def chat(text: str, delta: str | None, tail: Mapping[str, Any]) -> ChatResponse:
    """A chat answer: ``text`` so far, and ``delta``, what is new in it."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, **tail)


def tail(result: BlendResult, tokenizer: Any, not_found: list[str] | None) -> dict[str, Any]:
    """What the last or only response carries: token counts where LlamaIndex looks for them, the
    report, and log-probabilities where they were asked for.

    Args:
        result: the answer.
        tokenizer: the model's.
        not_found: retrieved nodes that are not in the prompt, if that is known.
    """
    prompt, answer = len(result.prompt_token_ids), len(result.token_ids)
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }
    report = result.report.to_dict()
    if not_found is not None:
        report["retrieved_not_found"] = not_found
    raw = {
        "usage": usage,
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "cacheblend": report,
    }
    if result.logprobs is None:
        return {"raw": raw}
    return {"raw": raw, "logprobs": _logprobs(result.logprobs, tokenizer)}


def _logprobs(rows: Sequence[Mapping[int, float]], tokenizer: Any) -> list[list[LogProb]]:
    """A list a token of the answer, the likeliest first."""
    return [
        [
            LogProb(token=text, logprob=value, bytes=list(text.encode()))
            for token, value in sorted(row.items(), key=lambda item: -item[1])
            if (text := tokenizer.decode([token])) is not None
        ]
        for row in rows
    ]
