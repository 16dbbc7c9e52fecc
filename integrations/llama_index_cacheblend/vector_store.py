"""``CacheBlendVectorStore``: another vector store, whose nodes' KV comes and goes with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from cacheblend_rag import PromptError
from cacheblend_rag.undo import on_failure
from llama_index_cacheblend.ingestion import CacheBlendIngestion, document_of, listing

_log = logging.getLogger(__name__)


class CacheBlendVectorStore(BasePydanticVectorStore):
    """Everything is done by ``inner``; adding also computes KV, and deleting drops it.

    An index's every way in and out passes through its vector store, ``insert_nodes`` and deletes
    included, which no transformation sees.

    Args:
        inner: the vector store that keeps and finds the nodes.
        ingestion: what computes KV.
    """

    inner: BasePydanticVectorStore = Field(description="Keeps and finds the nodes.")
    _ingestion: CacheBlendIngestion = PrivateAttr()
    # of nodes added through this object: for inner stores that can't list what they hold
    _chunks: dict[str, tuple[str, str]] = PrivateAttr(default_factory=dict)

    def __init__(self, inner: BasePydanticVectorStore, ingestion: CacheBlendIngestion) -> None:
        fields: dict[str, Any] = {
            "inner": inner,
            "stores_text": inner.stores_text,
            "is_embedding_query": inner.is_embedding_query,
        }
        super().__init__(**fields)
        self._ingestion = ingestion

    @classmethod
    def class_name(cls) -> str:
        return "CacheBlendVectorStore"

    @property
    def client(self) -> Any:
        return self.inner.client

    # ---- add -----------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        self._ingestion.check(nodes)
        old = self._listed([node.node_id for node in nodes], None)
        ids = self.inner.add(list(nodes), **kwargs)
        self._compute(nodes, old)
        return ids

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        self._ingestion.check(nodes)
        old = await self._alisted([node.node_id for node in nodes], None)
        ids = await self.inner.async_add(list(nodes), **kwargs)
        await asyncio.to_thread(self._compute, nodes, old)
        return ids

    def _compute(self, nodes: Sequence[BaseNode], old: list[BaseNode] | None) -> None:
        """Compute KV. Where that fails, what is new goes from the inner store again: the caller
        sees that nothing was added, and so would never delete it.
        """
        nodes = [node for node in nodes if self._ingestion.text_of(node)]
        with on_failure(lambda: self._take_out(nodes, old)):
            report = self._ingestion.ingest(nodes)
        for node, key in zip(nodes, report.keys, strict=False):  # no keys: nothing is blended
            if key:
                self._chunks[node.node_id] = (document_of(node), key)

    def _take_out(self, nodes: Sequence[BaseNode], old: list[BaseNode] | None) -> None:
        known = self._chunks if old is None else {node.node_id for node in old}
        if new := [node.node_id for node in nodes if node.node_id not in known]:
            with suppress(NotImplementedError):
                self.inner.delete_nodes(new)

    # ---- delete --------------------------------------------------------------------------------

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        self.inner.delete(ref_doc_id, **delete_kwargs)
        self._forget(ref_doc_id)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        await self.inner.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(self._forget, ref_doc_id)

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        listed = self._listed(node_ids, filters)
        self.inner.delete_nodes(node_ids, filters, **delete_kwargs)
        self._forget_nodes(node_ids, filters, listed)

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        listed = await self._alisted(node_ids, filters)
        await self.inner.adelete_nodes(node_ids, filters, **delete_kwargs)
        await asyncio.to_thread(self._forget_nodes, node_ids, filters, listed)

    def clear(self) -> None:
        listed = self._listed(None, None)
        self.inner.clear()
        self._forget_all(listed)

    async def aclear(self) -> None:
        listed = await self._alisted(None, None)
        await self.inner.aclear()
        await asyncio.to_thread(self._forget_all, listed)

    def _listed(
        self, node_ids: list[str] | None, filters: MetadataFilters | None
    ) -> list[BaseNode] | None:
        """Nodes that are about to be deleted; None where the inner store can't list any."""
        if node_ids == [] and filters is None:  # of which some stores list all that they have
            return []
        with self._listing():
            return self.inner.get_nodes(node_ids, filters)
        return None

    async def _alisted(
        self, node_ids: list[str] | None, filters: MetadataFilters | None
    ) -> list[BaseNode] | None:
        if node_ids == [] and filters is None:
            return []
        with self._listing():
            return await self.inner.aget_nodes(node_ids, filters)
        return None

    @contextmanager
    def _listing(self) -> Iterator[None]:
        try:
            with listing(self.inner):
                yield
        except PromptError as error:
            _log.info("%s", error)

    def _forget(self, document: str) -> None:
        self._chunks = {n: chunk for n, chunk in self._chunks.items() if chunk[0] != document}
        try:
            self._ingestion.forget(document)
        except PromptError:
            _log.warning(
                "%s was deleted, but no KV is registered for it: what there is stays until "
                "CacheBlendIngestion.gc(docstore) is called.",
                document,
            )

    def _forget_all(self, listed: list[BaseNode] | None) -> None:
        self._forget_nodes(list(self._chunks), None, listed)
        if listed is None:
            _log.warning(
                "%s was cleared and can't list what it had: the KV of nodes that were not added "
                "through this object stays until CacheBlendIngestion.gc(docstore) is called.",
                type(self.inner).__name__,
            )

    def _forget_nodes(
        self,
        node_ids: list[str] | None,
        filters: MetadataFilters | None,
        listed: list[BaseNode] | None,
    ) -> None:
        if listed is None:
            # filters may spare some of the ids, and only the inner store knows which
            known = [] if filters is not None else [n for n in node_ids or [] if n in self._chunks]
            chunks = {self._chunks.pop(node_id) for node_id in known}
            if filters is not None or len(known) < len(node_ids or []):
                _log.warning(
                    "Nodes were deleted that %s can't list and that were not added through this "
                    "object; their KV stays until their document is deleted or "
                    "CacheBlendIngestion.gc(docstore) is called.",
                    type(self.inner).__name__,
                )
        else:
            chunks = self._ingestion.chunks_of(listed)
            for node in listed:
                self._chunks.pop(node.node_id, None)
        self._ingestion.forget_chunks(chunks.difference(self._chunks.values()))

    # ---- find ----------------------------------------------------------------------------------

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        return self.inner.get_nodes(node_ids, filters)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        return await self.inner.aget_nodes(node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return self.inner.query(query, **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return await self.inner.aquery(query, **kwargs)

    def persist(self, persist_path: str, fs: Any = None) -> None:
        self.inner.persist(persist_path, fs)
