"""Prompts of every form to the token ids that a plain vLLM would compute. Nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from cacheblend_rag.engine.base import ChatRenderer
from cacheblend_rag.errors import EmptyTextError, PromptError, PromptTooLongError
from cacheblend_rag.token_ids import are_token_ids, token_ids
from cacheblend_rag.tools import ToolUse

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


def is_prompt(value: object) -> TypeGuard[Prompt]:
    """Whether ``value`` is one prompt (text, token ids or chat messages), not several."""
    if isinstance(value, str):
        return True
    return are_token_ids(value) or are_messages(value)


def are_messages(value: object) -> TypeGuard[Messages]:
    """Whether ``value`` is a prompt of chat messages."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and isinstance(value[0], Mapping)
    )


def owned(prompt: Prompt) -> Prompt:
    """A copy that is read later, whatever the caller does with ``prompt`` meanwhile."""
    if isinstance(prompt, str) or are_token_ids(prompt):
        return copy.copy(prompt)
    return copy.deepcopy(prompt)


def tokenize(
    prompt: Prompt,
    tokenizer: Any,
    chat: ChatRenderer,
    arguments: Mapping[str, Any],
    *,
    max_model_len: int,
    tools: ToolUse | None = None,
) -> tuple[int, ...]:
    """Token ids of a prompt: text with the tokenizer's special tokens, chat messages as the
    engine's own chat has them, token ids as they are.

    Args:
        prompt: text, messages or token ids.
        tokenizer: for text.
        chat: for messages.
        arguments: of the chat template, by name.
        max_model_len: tokens that prompt and answer may have together.
        tools: that the chat template describes to the model.

    Raises:
        PromptError: not a prompt, messages that are not text or that the template refuses, tools
            with a prompt of another kind, or no tokenizer.
        ConfigError: an argument that the template does not have.
        EmptyTextError: no tokens.
        PromptTooLongError: no room for a first token.
    """
    check_takes_tools(prompt, tools)
    if isinstance(prompt, str):
        ids = tuple(_need(tokenizer).encode(checked(prompt))) if prompt else ()
    elif are_messages(prompt):
        _need(tokenizer)
        ids = chat.render(checked_messages(prompt), arguments, tools=tools)
    else:
        ids = token_ids(prompt)
    return fitting(ids, max_model_len)


def check_takes_tools(prompt: object, tools: ToolUse | None) -> None:
    """Only a chat template says how tools are described.

    Raises:
        PromptError: tools, and a prompt that is no chat messages.
    """
    if tools is not None and not are_messages(prompt):
        raise PromptError(
            "tools go through the model's chat template, and this prompt is text or token ids; "
            'pass chat messages: [{"role": "user", "content": "..."}]'
        )


def fitting(ids: tuple[int, ...], max_model_len: int) -> tuple[int, ...]:
    """``ids`` themselves, which leave room for an answer.

    Raises:
        EmptyTextError: there are none.
        PromptTooLongError: no room for a first token.
    """
    if not ids:
        raise EmptyTextError("the prompt is empty; pass text, chat messages or token ids")
    if len(ids) >= max_model_len:
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens and the model's context {max_model_len}, one of "
            "which is needed for the answer. Retrieve fewer or shorter chunks, or raise "
            "max_model_len if the model allows it"
        )
    return ids


def checked_messages(messages: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    """``messages`` themselves, each with a role and with text.

    Raises:
        PromptError: one that is something else, by its number.
    """
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"message {number} is no dict with role and content, but {type(message).__name__}"
            )
        if not isinstance(message.get("role"), str):
            raise PromptError(
                f'message {number} has no role; give it one: {{"role": "user", "content": "..."}}'
            )
        for text in _texts(message.get("content"), number):
            checked(text, f"message {number}")
    return messages


def tokenize_chunk(chunk: str | Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a chunk alone: stripped text without special tokens, or ids as they are.

    Raises:
        EmptyTextError: nothing but white space.
    """
    if not isinstance(chunk, str):
        ids = token_ids(chunk)
    else:
        ids = tuple(_need(tokenizer).encode(checked(chunk).strip(), add_special_tokens=False))
    if not ids:
        raise EmptyTextError("a chunk is empty; leave empty texts out of ingest()")
    return ids


def checked(text: str, of: str = "the text") -> str:
    """``text`` itself, which tokenizers can take.

    Raises:
        PromptError: half of a character, as in names of files that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at, near = error.start, text[max(0, error.start - 20) : error.start]
        raise PromptError(
            f"character {at} of {of}, after {near!r}, is a lone surrogate ({text[at]!a}), which no "
            "tokenizer takes. It is half of a character, or a byte of a file name that is not "
            "UTF-8; replace it: text.encode(errors='replace').decode()"
        ) from error
    return text


def _need(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise PromptError(
            "this engine was started with skip_tokenizer_init, so it takes token ids only"
        )
    return tokenizer


def _texts(content: object, number: int) -> list[str]:
    """The texts that a message's content consists of."""
    if content is None or isinstance(content, str):
        return [content or ""]
    return [
        _text(part, number) for part in (content if isinstance(content, Sequence) else [content])
    ]


def _text(part: object, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if not isinstance(part, Mapping) or kind != "text":
        raise PromptError(
            f"message {number} has content of type {kind!r}; only text can be served here. Send "
            "prompts with images to vLLM directly"
        )
    if not isinstance(part.get("text"), str):
        raise PromptError(
            f"message {number} has a part of type 'text' without a text; give it one: "
            '{"type": "text", "text": "..."}'
        )
    return str(part["text"])
