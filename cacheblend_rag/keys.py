"""Content keys: what a chunk's KV depends on, and nothing else.

A key never depends on the prompt a chunk was first seen in, so reuse does not decay over time, and
changed text, another model, ingest prefix or tenant is simply another key. With the ingest prefix
``document`` it does not depend on the document either, which the KV does: a prompt that contains
the chunk does not say where it is from, and must find it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

FORMAT = 3  # of all that is stored: raise it when KV, names or files change meaning


class KeySpace(NamedTuple):
    """All that chunks of one engine and one ingest prefix share.

    Attributes:
        fingerprint: of the loaded weights, dtype and layout, from the engine.
        prefix_ids: the ingest prefix.
        namespace: tenant salt.
        by_document: chunks stand behind what comes before them in their own documents, in place of
            the end of ``prefix_ids``. Which documents these are is no part of the key: a prompt
            does not say.
    """

    fingerprint: str
    prefix_ids: tuple[int, ...]
    namespace: str = ""
    by_document: bool = False

    def to_plain(self) -> list[Any]:
        """Lists, numbers and texts, for an RPC."""
        return [list(field) if isinstance(field, tuple) else field for field in self]

    @classmethod
    def from_plain(cls, data: Sequence[Any]) -> KeySpace:
        """The key space that ``to_plain`` wrote."""
        fingerprint, prefix, namespace, by_document = data
        return cls(fingerprint, tuple(prefix), namespace, by_document)

    @property
    def shared_prefix(self) -> tuple[int, ...] | None:
        """What every chunk was computed behind; None where that differs from chunk to chunk."""
        return None if self.by_document else self.prefix_ids

    def prompt_prefix_key(self, token_ids: Sequence[int]) -> str:
        """The key of a prompt prefix, which stands behind nothing."""
        return self._replace(prefix_ids=(), by_document=False).key(token_ids)

    def key(self, token_ids: Sequence[int]) -> str:
        """64 hexadecimal digits for a chunk of these token ids."""
        return chunk_key(self, token_ids)


def chunk_key(space: KeySpace, token_ids: Sequence[int]) -> str:
    """sha256 over the key space and the chunk's token ids."""
    digest = hashlib.sha256()
    kind = "document/" if space.by_document else ""  # no fingerprint: those are hexadecimal
    head = f"cacheblend/{FORMAT}/{kind}{space.fingerprint}/{len(space.prefix_ids)}/"
    digest.update(head.encode())
    digest.update(hashlib.sha256(space.namespace.encode()).digest())
    digest.update(array("q", space.prefix_ids).tobytes())
    digest.update(array("q", token_ids).tobytes())
    return digest.hexdigest()
