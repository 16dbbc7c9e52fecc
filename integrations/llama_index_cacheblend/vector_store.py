"""``CacheBlendVectorStore``: another vector store, whose nodes' KV comes and goes with them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from llama_index_cacheblend.ingestion import CacheBlendIngestion

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
        ids = self.inner.add(list(nodes), **kwargs)
        self._ingestion.ingest(nodes)
        return ids

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        ids = await self.inner.async_add(list(nodes), **kwargs)
        await asyncio.to_thread(self._ingestion.ingest, nodes)
        return ids

    # ---- delete --------------------------------------------------------------------------------

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        self.inner.delete(ref_doc_id, **delete_kwargs)
        self._forget([ref_doc_id])

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        await self.inner.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(self._forget, [ref_doc_id])

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        self.inner.delete_nodes(node_ids, filters, **delete_kwargs)
        self._nodes_deleted()

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        await self.inner.adelete_nodes(node_ids, filters, **delete_kwargs)
        self._nodes_deleted()

    def clear(self) -> None:
        self.inner.clear()
        self._forget(self._ingestion.documents())

    async def aclear(self) -> None:
        await self.inner.aclear()
        await asyncio.to_thread(self._forget, self._ingestion.documents())

    def _forget(self, documents: Sequence[str]) -> None:
        on_record = set(self._ingestion.documents())
        for document in documents:
            if document in on_record:
                self._ingestion.forget(document)
            else:
                _log.warning(
                    "%s was deleted, but its KV stays: it was ingested before this engine was "
                    "started. Use CacheBlendIngestion.gc(docstore) to drop it.",
                    document,
                )

    def _nodes_deleted(self) -> None:
        _log.warning(
            "Nodes were deleted one by one; their KV stays until their document is deleted or "
            "CacheBlendIngestion.gc(docstore) is called."
        )

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
