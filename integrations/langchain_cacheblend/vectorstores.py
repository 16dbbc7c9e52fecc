"""``CacheBlendVectorStore``: another vector store, whose documents' KV comes and goes with them."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from cacheblend_rag import ConfigError
from cacheblend_rag.shared import may_have_kv
from cacheblend_rag.undo import on_failure
from langchain_cacheblend.ingestion import CacheBlendIngestion


class CacheBlendVectorStore(VectorStore):
    """Everything is done by ``inner``; adding also computes KV, and deleting drops it.

    Works with LangChain's indexing API (``index()``), which is why it is a vector store.

    Args:
        inner: the vector store that keeps and finds the documents.
        ingestion: what computes KV.
    """

    def __init__(self, inner: VectorStore, ingestion: CacheBlendIngestion) -> None:
        self.inner, self.ingestion = inner, ingestion
        self._added: set[str] = set()  # through this object: what deleting all is about

    @property
    def embeddings(self) -> Embeddings | None:
        return self.inner.embeddings

    # ---- add -----------------------------------------------------------------------------------

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        self.ingestion.check(documents)
        old = self._present(kwargs.get("ids") or [d.id for d in documents if d.id])
        ids = self.inner.add_documents(documents, **kwargs)
        self._compute(documents, ids, old)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        self.ingestion.check(documents)
        given = kwargs.get("ids") or [d.id for d in documents if d.id]
        old = await asyncio.to_thread(self._present, given)
        ids = await self.inner.aadd_documents(documents, **kwargs)
        await asyncio.to_thread(self._compute, documents, ids, old)
        return ids

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        documents = _documents(texts := list(texts), metadatas)
        self.ingestion.check(documents)
        old = self._present(ids or [])
        found = self.inner.add_texts(texts, metadatas, **_given(ids), **kwargs)
        self._compute(documents, found, old)
        return found

    async def aadd_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        documents = _documents(texts := list(texts), metadatas)
        self.ingestion.check(documents)
        old = await asyncio.to_thread(self._present, ids or [])
        found = await self.inner.aadd_texts(texts, metadatas, **_given(ids), **kwargs)
        await asyncio.to_thread(self._compute, documents, found, old)
        return found

    def _present(self, ids: Sequence[str]) -> set[str | None]:
        """Those of ``ids`` that the inner store has already, as far as it or we can tell."""
        try:
            return {document.id for document in self.inner.get_by_ids(ids)} if ids else set()
        except NotImplementedError:
            return {id_ for id_ in ids if id_ in self._added}

    def _compute(
        self, documents: Sequence[Document], ids: Sequence[str], old: Container[str | None]
    ) -> None:
        """Compute KV. Where that fails, what is new goes from the inner store again: the caller
        sees that nothing was added, and so would never delete it.
        """
        with on_failure(lambda: self._take_out([id_ for id_ in ids if id_ not in old])):
            self.ingestion.ingest(documents, ids)
        self._added.update(ids)

    def _take_out(self, new: list[str]) -> None:
        if new:
            with suppress(NotImplementedError):
                self.inner.delete(new)

    # ---- delete --------------------------------------------------------------------------------

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        old = self._unrecorded(ids)
        done = self.inner.delete(ids, **kwargs)
        self._forget(ids, old)
        return done

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        old = await asyncio.to_thread(self._unrecorded, ids)
        done = await self.inner.adelete(ids, **kwargs)
        await asyncio.to_thread(self._forget, ids, old)
        return done

    def _unrecorded(self, ids: list[str] | None) -> list[str]:
        """Texts of documents whose chunks the KV store has no record of."""
        known = self.ingestion.engine.registered_documents(ids or [])
        unknown = [id_ for id_ in ids or [] if id_ not in known]
        try:
            documents = self.inner.get_by_ids(unknown) if unknown else []
        except NotImplementedError:
            documents = []
        return list(filter(may_have_kv, map(self.ingestion.text_of, documents)))

    def _forget(self, ids: list[str] | None, old: Sequence[str]) -> None:
        engine = self.ingestion.engine
        gone = self._added.copy() if ids is None else set(ids)
        self._added -= gone
        engine.forget(engine.registered_documents(gone))
        if old:
            engine.blend().forget(old)

    # ---- find ----------------------------------------------------------------------------------

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return self.inner.get_by_ids(ids)

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        return await self.inner.aget_by_ids(ids)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return self.inner.similarity_search(query, k, **kwargs)

    async def asimilarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return await self.inner.asimilarity_search(query, k, **kwargs)

    def similarity_search_with_score(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.similarity_search_with_score(*args, **kwargs)

    async def asimilarity_search_with_score(self, *args: Any, **kwargs: Any) -> Any:
        return await self.inner.asimilarity_search_with_score(*args, **kwargs)

    def similarity_search_with_relevance_scores(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.similarity_search_with_relevance_scores(*args, **kwargs)

    async def asimilarity_search_with_relevance_scores(self, *args: Any, **kwargs: Any) -> Any:
        return await self.inner.asimilarity_search_with_relevance_scores(*args, **kwargs)

    def similarity_search_by_vector(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.similarity_search_by_vector(*args, **kwargs)

    async def asimilarity_search_by_vector(self, *args: Any, **kwargs: Any) -> Any:
        return await self.inner.asimilarity_search_by_vector(*args, **kwargs)

    def max_marginal_relevance_search(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.max_marginal_relevance_search(*args, **kwargs)

    async def amax_marginal_relevance_search(self, *args: Any, **kwargs: Any) -> Any:
        return await self.inner.amax_marginal_relevance_search(*args, **kwargs)

    def max_marginal_relevance_search_by_vector(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.max_marginal_relevance_search_by_vector(*args, **kwargs)

    async def amax_marginal_relevance_search_by_vector(self, *args: Any, **kwargs: Any) -> Any:
        return await self.inner.amax_marginal_relevance_search_by_vector(*args, **kwargs)

    @classmethod
    def from_texts(cls, *args: Any, **kwargs: Any) -> CacheBlendVectorStore:
        """Not possible without an engine.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "make the inner vector store first, then CacheBlendVectorStore(inner, ingestion), and "
            "add texts to that"
        )


def _given(ids: list[str] | None) -> dict[str, Any]:
    return {} if ids is None else {"ids": ids}


def _documents(texts: Sequence[str], metadatas: list[dict[str, Any]] | None) -> list[Document]:
    rows = zip(texts, metadatas or [{}] * len(texts), strict=True)
    return [Document(page_content=text, metadata=metadata) for text, metadata in rows]
