"""Stored chunks and the documents that consist of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

from cacheblend_rag import ingest
from cacheblend_rag.front.base import Front

_PAGE = 10_000  # keys in one answer of a store
_NONE = frozenset[str]()

logger = logging.getLogger("vllm.cacheblend_rag")


class Documents(Front):
    """Finds, registers and forgets what is stored."""

    def _has_store(self) -> bool:
        """Whether the store is open. That of an embedded engine which does not blend is closed."""
        return self.model_check.passed

    def _can_forget(self) -> bool:
        """``_has_store``; the log says where something stays that should go."""
        if not self._has_store():
            logger.warning(
                "nothing was forgotten: the store is not open, as this engine does not blend (%s). "
                "What it holds stays, and an engine that blends will find it. Forget it there",
                self.model_check.detail,
            )
            return False
        return True

    def prefetch(self, texts: str | Sequence[str | Sequence[int]]) -> None:
        """Start bringing chunks from a slow tier of the store nearer, ahead of the prompt that will
        contain them. Texts that are not stored are passed over.
        """
        self._check_open()
        keys = [c.key for c in self._numbered(ingest.as_list(texts))]
        if self.model_check.passed and keys:
            self._engine.rpc("cacheblend_prefetch", keys)

    def forget(self, texts: str | Sequence[str | Sequence[int]]) -> None:
        """Drop chunks from the store and the index; absent ones are ignored."""
        self._check_open()
        self.forget_keys(c.key for c in self._numbered(ingest.as_list(texts)))

    def forget_keys(self, keys: Iterable[str]) -> int:
        """``forget`` chunks by the keys that ``IngestReport`` and reports name; returns how many
        of them were there.
        """
        self._check_open()
        keys = ingest.chunk_keys(keys, "keys")
        if not (keys and self._can_forget()):
            return 0
        absent = set.union(*map(set, self._ask_stores("cacheblend_missing", keys)))
        self._engine.rpc("cacheblend_forget", keys)
        self._sync()
        return len(keys) - len(absent)

    def key(self, text: str | Sequence[int]) -> str:
        """The key that ``ingest`` stores a chunk under.

        Raises:
            PromptError, EmptyTextError: as ``ingest`` does.
        """
        return self._chunk(text).key

    def register_documents(self, documents: Mapping[str, Iterable[str]]) -> None:
        """Note which chunks each document (any text) consists of, by their keys, and of those noted
        before; for ``forget_documents``. Stores on disk and remote ones keep this for later engines
        and other machines too, under a hash of the document's name.
        """
        self._check_open()
        rows = ingest.keys_by_document(documents)
        if rows and self._has_store():
            named = [(self._documents + name, keys) for name, keys in rows]
            self._engine.rpc("cacheblend_register", named)

    def registered_documents(self, documents: str | Iterable[str]) -> set[str]:
        """Those of ``documents`` that chunks are noted for."""
        self._check_open()
        names = ingest.document_names(documents)
        if not (names and self._has_store()):
            return set()
        found = self._engine.rpc("cacheblend_registered", [self._documents + n for n in names])
        start = len(self._documents)
        return {name[start:] for name in itertools.chain.from_iterable(found)}

    def forget_documents(
        self, documents: str | Iterable[str], only: Iterable[str] | None = None
    ) -> int:
        """Forget the chunks that these documents consist of, or those of them whose keys are in
        ``only``, but for what other documents consist of; returns how many were there.
        """
        self._check_open()
        names = ingest.document_names(documents)
        if not (names and self._can_forget()):
            return 0
        keys = None if only is None else list(only)
        named = [self._documents + name for name in names]
        count, forgotten = 0, set[str]()
        # A note goes when its chunk has gone: where that fails, a second call finds what is left.
        # Asked again until nothing is: two who forget what they share may each be told late.
        while left := self._to_forget(named, keys, forgotten):
            count += self.forget_keys(left)
            forgotten |= left
        return count

    def _to_forget(
        self, named: Sequence[str], only: Sequence[str] | None, forgotten: AbstractSet[str] = _NONE
    ) -> set[str]:
        """Drop the notes on documents, as ``KVStore.unregister`` of each rank does."""
        left = self._engine.rpc("cacheblend_unregister", named, only, sorted(forgotten))
        return set(itertools.chain.from_iterable(left)) - forgotten

    def delete_except(self, texts: Iterable[str | Sequence[int]]) -> int:
        """Forget every chunk of this model and namespace that is not among ``texts``; returns how
        many were forgotten, those that other processes stored among them.
        """
        self._check_open()
        kept = {c.key for c in self._numbered(ingest.as_list(texts))}
        return self.forget_keys(self.stored() - kept)

    def stored(self) -> set[str]:
        """The keys of all chunks of this model, namespace and ingest prefix that are stored, by
        whichever process.

        Raises:
            StoreError: the store cannot be asked.
        """
        self._check_open()
        if not self._has_store():
            return set()
        return set(itertools.chain.from_iterable(self._stored_pages(fresh=True)))

    def _stored_pages(
        self,
        after: str = "",
        size: int = _PAGE,
        document: str | None = None,
        *,
        fresh: bool = False,
    ) -> Iterator[list[str]]:
        """Keys of stored chunks in order, behind ``after``, or those of a document. Where ranks
        have stores of their own, those that all have.

        Args:
            fresh: have stores listed anew, which takes a while where they are large.
        """
        space = self._space.to_plain()
        while True:
            ranks = self._ask_stores("cacheblend_page", space, after, size, document, fresh)
            last = min((keys[-1] for keys in ranks if len(keys) == size), default=None)
            common = set.intersection(*map(set, ranks))
            yield sorted(key for key in common if last is None or key <= last)
            if last is None:
                return
            after, fresh = last, False
