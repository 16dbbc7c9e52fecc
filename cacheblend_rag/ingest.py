"""From texts to stored chunk KV: what is new is computed, in batches, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cacheblend_rag.errors import PromptTooLongError


class Chunk(NamedTuple):
    """Token ids of a chunk and the key they give."""

    key: str
    token_ids: tuple[int, ...]


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
        reason: why nothing was computed, where the model is served without blending.
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
    reason: str = ""
    keys: Sequence[str] = ()


def distinct(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Each key once, in order."""
    return list({chunk.key: chunk for chunk in chunks}.values())


def batches(chunks: Sequence[Chunk], max_tokens: int) -> Iterator[list[Chunk]]:
    """Consecutive chunks of at most ``max_tokens`` together; a longer one goes alone."""
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if batch and size + len(chunk.token_ids) > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += len(chunk.token_ids)
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
