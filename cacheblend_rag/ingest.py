"""From texts to stored chunk KV: what is new is computed, in batches, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from cacheblend_rag.errors import ConfigError, PromptError
from cacheblend_rag.reason import Reason
from cacheblend_rag.store.base import is_key

Owners = Mapping[str, Sequence[str]]  # documents by the key of a chunk of theirs
LeftContext = str | Sequence[int] | None  # what stands before a chunk: text, token ids, or unknown


T = TypeVar("T")


class Chunk(NamedTuple):
    """Token ids of a chunk, the key they give, and what stands before it in its document."""

    key: str
    token_ids: tuple[int, ...]
    context: tuple[int, ...] = ()  # takes the place of as many last tokens of the ingest prefix


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What an ingestion did.

    Attributes:
        chunks: texts given; the five counts below add up to it.
        computed: prefilled now, and stored but for those in ``not_stored``.
        present: in the store before.
        repeated: given more than once.
        too_short: below ``min_chunk_tokens``: never reused, so not stored.
        too_long: more tokens than fit a prompt: never reused, so not stored.
        not_stored: why the store did not keep a chunk that was computed, by its key.
        tokens: computed now, without the prefix.
        bytes: of KV stored now.
        seconds: of the whole call.
        reason: why nothing was computed, where the model is served without blending; None else.
        detail: the same as a sentence.
        keys: key of each text, in order; empty string where it was too short or too long.
    """

    chunks: int
    computed: int = 0
    present: int = 0
    repeated: int = 0
    too_short: int = 0
    too_long: int = 0
    not_stored: Mapping[str, str] = field(default_factory=dict)
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
    texts: Sequence[object], left_context: str | Sequence[LeftContext] | None, ingest_prefix: object
) -> Sequence[LeftContext]:
    """``left_context`` as given to ``CacheBlend.ingest``, one for each of ``texts``.

    Raises:
        ConfigError: it was given, and ``ingest_prefix`` has no use for it.
        PromptError: it is not one for each.
    """
    if left_context is None:
        return [None] * len(texts)
    if ingest_prefix != "document":
        raise ConfigError(
            f"left_context was given, but with ingest_prefix={ingest_prefix!r} no chunk is "
            "computed after its document: set BlendConfig(ingest_prefix='document'), or leave it "
            "out"
        )
    return one_for_each(texts, left_context, "left_context")


def one_for_each(
    texts: Sequence[object], given: str | Sequence[T | None] | None, name: str
) -> Sequence[T | None]:
    """What was given as ``name``, one for each of ``texts``.

    Raises:
        PromptError: it is not one for each, or no list.
    """
    if given is None:
        return [None] * len(texts)
    rows = _several(given, name)
    if len(rows) != len(texts):
        raise PromptError(
            f"{name} has {len(rows)} texts for {len(texts)} chunks; give one for each, None where "
            "nothing is known"
        )
    return rows


def document_for_each(
    texts: Sequence[object], documents: str | Sequence[str | None] | None
) -> Sequence[str | None]:
    """``documents`` as given to ``CacheBlend.ingest``, one for each of ``texts``.

    Raises:
        PromptError: they are not one for each, or one is no text.
    """
    names: Sequence[str | None] = one_for_each(texts, documents, "documents")
    for name in names:
        if name is not None:
            _check_document(name)
    return names


def document_names(documents: object) -> list[str]:
    """Documents as named by a caller: one, or several.

    Raises:
        PromptError: something that is no text.
    """
    names = _several(documents, "documents")
    for name in names:
        _check_document(name)
    return list(dict.fromkeys(names))


def keys_by_document(documents: object) -> list[tuple[str, list[str]]]:
    """Documents as given to ``CacheBlend.register_documents``.

    Raises:
        PromptError: something else than lists of keys by texts.
    """
    if not isinstance(documents, Mapping):
        raise PromptError(
            f"documents are a dict of keys by document, not {type(documents).__name__}"
        )
    rows = []
    for name, keys in documents.items():
        _check_document(name)
        rows.append((name, chunk_keys(keys, f"documents[{name!r}]")))
    return rows


def chunk_keys(keys: object, name: str) -> list[str]:
    """Keys as ``IngestReport`` has them, each once; without the empty ones of what is not stored.

    Raises:
        PromptError: something that is no key.
    """
    if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
        raise PromptError(f"{name} must be a list of keys, not {type(keys).__name__}")
    found = [key for key in dict.fromkeys(keys) if key != ""]
    for key in found:
        if not isinstance(key, str) or not is_key(key):
            raise PromptError(
                f"{name} has {key!r}, which is no key of a chunk; IngestReport.keys and reports "
                "have them"
            )
    return found


def _check_document(name: object) -> None:
    if not isinstance(name, str):
        raise PromptError(f"documents has {name!r}; the name of a document is a text, str(name)")


def _several(given: object, name: str) -> list[Any]:
    """One text as a list of it, and several things as a list of them."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, bytes | bytearray | Mapping) or not isinstance(given, Iterable):
        raise PromptError(f"{name} is a list with one for each text, not {type(given).__name__}")
    return list(given)


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


def grouped(
    rows: Iterable[T], size_of: Callable[[T], int], most: Callable[[], int]
) -> Iterator[list[T]]:
    """``rows`` in order, in lists whose sizes are at most ``most()`` together; a larger row goes
    alone.
    """
    batch: list[T] = []
    size = 0
    for row in rows:
        own = size_of(row)
        if batch and size + own > most():
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += own
    if batch:
        yield batch


class ByLength(NamedTuple):
    """Chunks worth storing, and how many are not."""

    useful: list[Chunk]
    too_short: int
    too_long: int


def by_length(chunks: Sequence[Chunk], least: int, most: int) -> ByLength:
    """Tell chunks by their tokens: fewer than ``least`` are never reused, more than ``most`` fit no
    prompt behind the ingest prefix.
    """
    sizes = [len(chunk.token_ids) for chunk in chunks]
    return ByLength(
        [c for c, size in zip(chunks, sizes, strict=True) if least <= size <= most],
        sum(size < least for size in sizes),
        sum(size > most and size >= least for size in sizes),
    )


@contextmanager
def naming(which: str) -> Iterator[None]:
    """Say of an error which text it is about."""
    try:
        yield
    except PromptError as error:
        raise type(error)(f"{which}: {error}") from error


def owners(chunks: Sequence[Chunk], documents: Sequence[str | None]) -> Owners:
    """The documents that each chunk belongs to, by its key."""
    found: dict[str, list[str]] = {}
    for chunk, document in zip(chunks, documents, strict=True):
        if document is not None:
            found.setdefault(chunk.key, []).append(document)
    return found


def by_document(chunks: Iterable[Chunk], owners: Owners) -> dict[str, list[str]]:
    """The keys of ``chunks`` by the documents they belong to."""
    found: dict[str, list[str]] = {}
    for chunk in chunks:
        for document in owners.get(chunk.key, ()):
            found.setdefault(document, []).append(chunk.key)
    return found
