"""The ingest prefix: the tokens a chunk is computed behind, whose own KV is dropped again.

A chunk computed all alone starts with an attention sink it will not have in a prompt. Behind the
prompt prefix of real prompts and a neutral text, its KV is closer to what a full prefill gives.
With ``document``, what stands before the chunk in its own document takes the neutral text's place,
token for token, so that every chunk starts at the same position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engine.base import ChatRenderer
from cacheblend_rag.errors import ConfigError, PromptError
from cacheblend_rag.prompt import checked
from cacheblend_rag.token_ids import token_ids

BEFORE_CHARS = 4096  # of what stands before a chunk; the neutral text, as many tokens, has 1,175
MOST_AUTO = 1024  # tokens of the prefix that `auto` may choose
_WORDS = ("Apple", "Zebra")  # of users: what stands before them is the prompt prefix

NEUTRAL_TEXT = """\
The material below was gathered from several places and is given in no special order. A passage \
may be a whole page, a paragraph or only a few lines. It may come from a manual, a letter, a \
news report or a table, and it may have been written long before or after the one beside it. \
Each passage was kept as it was found, with its own names, dates, units and spelling, and none \
of them was changed to fit the others.

Nothing here is meant to be complete. One passage can repeat what another one says, add a detail \
to it, or speak of something else altogether. Where two of them differ, both are kept. Titles, \
headings and numbers belong to the passage in which they stand. A word such as "it", "they" or \
"the former" points to something in the same passage or in one that came before.

Read slowly, from the first line to the last, and take note of who did what, where and when, how \
much of it there was, and what followed from it. Keep the order of events apart from the order \
in which they are told. Small things can turn out to matter: a second name, a year, a place on a \
map, a condition under which a rule holds. When a passage ends, the next one begins on a new \
line.

"""


def ingest_prefix(
    config: BlendConfig, tokenizer: Any, chat: ChatRenderer | None, *, positions: int
) -> tuple[int, ...]:
    """Token ids of the ingest prefix that ``config`` asks for. They are part of every chunk's key,
    so they are the same on every day: the prompt prefix is the timeless one.

    ``auto`` leaves the neutral text out where the prefix would take more than ``MOST_AUTO`` tokens
    or half of the positions. That of ``document`` is what a chunk without one is computed behind.

    Args:
        positions: those that the model itself was made for. How many of them an engine serves
            (``max_model_len``) changes nothing, so that all engines of a model share their chunks.

    Raises:
        ConfigError: the prefix fills half of the positions or more, or ``document`` was asked for
            without a tokenizer.
    """
    kind = config.ingest_prefix
    if kind == "document" and tokenizer is None:
        raise ConfigError(
            "ingest_prefix='document' needs a tokenizer, and this engine was started with "
            "skip_tokenizer_init; leave that out, or choose another ingest_prefix"
        )
    if not isinstance(kind, str):
        ids = kind
    elif kind == "none" or tokenizer is None:
        ids = ()
    elif kind == "bos":
        ids = _bos(tokenizer)
    else:
        ids = prompt_prefix_ids(config, tokenizer, chat, timeless=True)
        whole = ids + tuple(tokenizer.encode(NEUTRAL_TEXT, add_special_tokens=False))
        fits = len(whole) <= MOST_AUTO and len(whole) * 2 < positions
        if kind == "document" or (kind == "auto" and fits):
            ids = whole
    if len(ids) * 2 >= positions:
        raise ConfigError(
            f"the ingest prefix has {len(ids)} tokens, half of the model's {positions} positions "
            "or more; shorten ingest_prefix or system_prompt"
        )
    return ids


def document_context(
    left_context: str | Sequence[int] | None, neutral_ids: Sequence[int], tokenizer: Any
) -> tuple[int, ...]:
    """Token ids that stand in for ``neutral_ids``, as many of them: the last ones of
    ``left_context``, behind the end of the neutral text where they are fewer. Empty where nothing
    is known.

    A text ends in a blank line here, whatever it ends in: a chunk's own tokens are those of a text
    at the beginning of a line.
    """
    ids: Sequence[int] = ()
    if isinstance(left_context, str):
        if text := checked(left_context).rstrip()[-BEFORE_CHARS:]:
            ids = tokenizer.encode(text + "\n\n", add_special_tokens=False)
    elif left_context is not None:
        ids = token_ids(left_context)
    if not ids:
        return ()
    return (*neutral_ids[len(ids) :], *ids)[-len(neutral_ids) :]


def prompt_prefix_ids(
    config: BlendConfig, tokenizer: Any, chat: ChatRenderer | None, *, timeless: bool = False
) -> tuple[int, ...]:
    """Token ids that the chat template and the system prompt put before the user's first word.

    Args:
        config: has the system prompt and the template's arguments.
        tokenizer, chat: the engine's; None where it has none.
        timeless: with a date that never changes, where the template writes today's.

    Raises:
        ConfigError: the template takes no system prompt, and one was asked for.
    """
    if tokenizer is None:
        return ()
    if chat is None or not chat.available:
        return _bos(tokenizer)

    def prompt_prefix(system_prompt: str | None) -> tuple[int, ...]:
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        first, second = (
            chat.render(
                [*system, {"role": "user", "content": word}],
                config.chat_template_kwargs,
                timeless=timeless,
            )
            for word in _WORDS
        )
        return _common(first, second)

    if config.system_prompt is not None:
        try:
            return prompt_prefix(config.system_prompt)
        except PromptError as error:
            raise ConfigError(f"system_prompt can't be used with this model: {error}") from error
    for likely in dict.fromkeys((config.likely_system_prompt, None)):
        with suppress(PromptError):  # it takes none; only closeness depends on the prompt prefix
            return prompt_prefix(likely)
    return _bos(tokenizer)


def _common(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """How both begin: what stands before that in which they differ."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return tuple(token for token, _ in pairs)


def _bos(tokenizer: Any) -> tuple[int, ...]:
    bos = getattr(tokenizer, "bos_token_id", None)
    return (int(bos),) if bos is not None else ()
