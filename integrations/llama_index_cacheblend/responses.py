"""Our results as LlamaIndex's responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)

from cacheblend_rag import BlendResult
from cacheblend_rag.engine import EngineOutput
from cacheblend_rag.tools import ToolCallPiece, joined
from llama_index_cacheblend.calling import block_of


class PartialAnswer(NamedTuple):
    """An answer so far, and what is new in it.

    Attributes:
        text, reasoning, calls: so far, calls in pieces.
        delta, thought: new text and new reasoning; None where the answer came as a whole.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallPiece, ...] = ()
    delta: str | None = None
    thought: str | None = None

    def then(self, piece: EngineOutput) -> PartialAnswer:
        """With what a stream brought next."""
        return PartialAnswer(
            self.text + piece.text,
            self.reasoning + piece.reasoning,
            (*self.calls, *piece.tool_calls),
            piece.text,
            piece.reasoning,
        )


def whole(result: BlendResult) -> PartialAnswer:
    """All of an answer."""
    calls = (ToolCallPiece(i, *call) for i, call in enumerate(result.tool_calls))
    return PartialAnswer(result.text, result.reasoning, tuple(calls))


def completion(answer: PartialAnswer, tail: Mapping[str, Any]) -> CompletionResponse:
    """A completion. Reasoning is in ``additional_kwargs``: LlamaIndex has no other place."""
    thought = {"thinking": answer.reasoning} if answer.reasoning else {}
    return CompletionResponse(
        text=answer.text, delta=answer.delta, additional_kwargs=thought, **tail
    )


def chat(answer: PartialAnswer, tail: Mapping[str, Any]) -> ChatResponse:
    """A chat answer: reasoning, text and calls are blocks of the message, in this order."""
    message = ChatMessage(role=MessageRole.ASSISTANT, content=answer.text)
    if answer.reasoning or answer.calls:
        thoughts = [ThinkingBlock(content=answer.reasoning)] if answer.reasoning else []
        texts = [TextBlock(text=answer.text)] if answer.text else []
        message.blocks = [*thoughts, *texts, *map(block_of, joined(answer.calls))]
    new = {"thinking_delta": answer.thought} if answer.thought else {}
    return ChatResponse(message=message, delta=answer.delta, additional_kwargs=new, **tail)


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
