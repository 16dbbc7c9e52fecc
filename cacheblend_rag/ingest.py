"""From texts to stored chunk KV: what is new is computed, in batches, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cacheblend_rag.errors import ConfigError, PromptError, PromptTooLongError
from cacheblend_rag.reason import Reason

Before = str | Sequence[int] | None  # what stands before a chunk: text, token ids, or unknown


class Chunk(NamedTuple):
    """Token ids of a chunk, the key they give, and what stands before it in its document."""

    key: str
    token_ids: tuple[int, ...]
    context: tuple[int, ...] = ()  # takes the place of as many last tokens of the ingest prefix


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingestion did.

    Attributes:
        chunks: texts given; the four counts below add up to it.
        computed: prefilled and stored now.
        present: in the store before.
        repeated: given more than once.
        too_short: below ``min_chunk_tokens``: never reused, so not stored.
        tokens: computed now, without the prefix.
        bytes: of KV stored now, over all ranks.
        seconds: of the whole call.
        reason: why nothing was computed, where the model is served without blending; None else.
        detail: the same as a sentence.
        keys: key of each text, in order; empty string where it was too short.
    """

    chunks: int
    computed: int = 0
    present: int = 0
    repeated: int = 0
    too_short: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    reason: Reason | None = None
    detail: str = ""
    keys: Sequence[str] = ()


def distinct(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Each key once, in order."""
    return list({chunk.key: chunk for chunk in chunks}.values())


def as_list(texts: object) -> list[Any]:
    """Chunks as given to ``CacheBlend.ingest``: one text, or several texts or token ids.

    Raises:
        PromptError: something else.
    """
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | bytearray | Mapping) or not isinstance(texts, Iterable):
        raise PromptError(
            f"pass a text, or a list of texts or of token ids, not {type(texts).__name__}"
        )
    return list(texts)


def for_each(
    texts: Sequence[object], before: str | Sequence[Before] | None, ingest_prefix: object
) -> Sequence[Before]:
    """``before`` as given to ``CacheBlend.ingest``, one for each of ``texts``.

    Raises:
        ConfigError: it was given, and ``ingest_prefix`` has no use for it.
        PromptError: it is not one for each.
    """
    if before is None:
        return [None] * len(texts)
    if ingest_prefix != "document":
        raise ConfigError(
            f"before was given, but with ingest_prefix={ingest_prefix!r} no chunk is computed "
            "behind its document: set BlendConfig(ingest_prefix='document'), or leave before out"
        )
    given = [before] if isinstance(before, str) else list(before)
    if len(given) != len(texts):
        raise PromptError(
            f"before has {len(given)} texts for {len(texts)} chunks; give one for each, None where "
            "nothing is known"
        )
    return given


def batches(chunks: Sequence[Chunk], max_tokens: int) -> Iterator[list[Chunk]]:
    """Chunks of at most ``max_tokens`` together, their contexts included; a longer one goes alone.
    Those of a batch share what they are computed behind, up to their contexts.
    """
    batch: list[Chunk] = []
    size = 0
    for chunk in sorted(chunks, key=lambda c: len(c.context)):
        tokens = len(chunk.context) + len(chunk.token_ids)
        if batch and (size + tokens > max_tokens or len(chunk.context) != len(batch[0].context)):
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += tokens
    if batch:
        yield batch


def check_length(chunk: Chunk, prefix_tokens: int, max_model_len: int) -> None:
    """Raise PromptTooLongError for a chunk that fits no prompt behind the ingest prefix."""
    room = max_model_len - prefix_tokens
    if len(chunk.token_ids) > room:
        raise PromptTooLongError(
            f"a chunk has {len(chunk.token_ids)} tokens; behind the ingest prefix of "
            f"{prefix_tokens} the model's context of {max_model_len} has room for {room}. "
            "Split documents into smaller chunks"
        )
