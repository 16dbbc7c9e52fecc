"""What LangChain retrieves, brought nearer while the prompt is still being written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document

from langchain_cacheblend.ingestion import CacheBlendIngestion


class PrefetchHandler(BaseCallbackHandler):
    """A callback that brings the KV of retrieved documents from disk to memory.

    For stores with both (``file:///kv?memory=4GiB``): ``chain.invoke(..., config={"callbacks":
    [PrefetchHandler(ingestion)]})``. No answer depends on it.

    Args:
        ingestion: knows the engine, and how documents are written into prompts.
    """

    def __init__(self, ingestion: CacheBlendIngestion) -> None:
        self.ingestion = ingestion

    def on_retriever_end(self, documents: Sequence[Document], **_: Any) -> None:
        self.ingestion.engine.prefetch([self.ingestion.text_of(found) for found in documents])
