"""Prompts of every form to the token ids that a plain vLLM would compute. Nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from cacheblend_rag.errors import EmptyTextError, PromptError, PromptTooLongError
from cacheblend_rag.token_ids import are_token_ids, token_ids

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Messages


def is_prompt(value: object) -> TypeGuard[Prompt]:
    """Whether ``value`` is one prompt (text, token ids or chat messages), not several."""
    if isinstance(value, str):
        return True
    return are_token_ids(value) or (
        isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)
    )


def tokenize(prompt: Prompt, tokenizer: Any, *, max_model_len: int) -> tuple[int, ...]:
    """Token ids of a prompt: text with the tokenizer's special tokens, chat messages through the
    model's own template, token ids as they are.

    Raises:
        PromptError: not a prompt, a message without text, or a tokenizer without a chat template.
        EmptyTextError: no tokens.
        PromptTooLongError: no room for a first token.
    """
    ids = tuple(_ids(prompt, tokenizer))
    if not ids:
        raise EmptyTextError("the prompt is empty; pass text, chat messages or token ids")
    if len(ids) >= max_model_len:
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens and the model's context {max_model_len}, one of "
            "which is needed for the answer. Retrieve fewer or shorter chunks, or raise "
            "max_model_len if the model allows it"
        )
    return ids


def render_chat(messages: Messages, tokenizer: Any) -> str:
    """The text of chat messages in the model's own template, up to where the answer starts.

    Raises:
        PromptError: no template, or a message that is not text.
    """
    if not getattr(_need(tokenizer), "chat_template", None):
        raise PromptError(
            "chat messages need a chat template and this model's tokenizer has none; pass the "
            "prompt as text instead"
        )
    plain = [{**message, "content": _text(message.get("content"))} for message in messages]
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))


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


def checked(text: str) -> str:
    """``text`` itself, which tokenizers can take.

    Raises:
        PromptError: half of a character, as in names of files that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start]
        raise PromptError(
            f"character {error.start}, after {near!r}, is a lone surrogate "
            f"({text[error.start]!a}), which no tokenizer takes. It is half of a character, or a "
            "byte of a file name that is not UTF-8; replace it: "
            "text.encode(errors='replace').decode()"
        ) from error
    return text


def _ids(prompt: Prompt, tokenizer: Any) -> Sequence[int]:
    if isinstance(prompt, str):
        return list(_need(tokenizer).encode(checked(prompt))) if prompt else []
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        text = render_chat(prompt, tokenizer)  # type: ignore[arg-type]
        return list(tokenizer.encode(checked(text), add_special_tokens=False))
    return token_ids(prompt)


def _need(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise PromptError(
            "this engine was started with skip_tokenizer_init, so it takes token ids only"
        )
    return tokenizer


def _text(content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts: Sequence[Any] = content if isinstance(content, Sequence) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise PromptError(
                f"a message has content of type {kind!r}; only text can be served here. Send "
                "prompts with images to vLLM directly"
            )
    return "\n".join(str(part["text"]) for part in parts)
