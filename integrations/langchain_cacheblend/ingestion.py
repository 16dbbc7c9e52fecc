"""``CacheBlendIngestion``: computes the KV of documents where LangChain ingests them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import BaseDocumentTransformer, Document
from langchain_core.prompts import BasePromptTemplate, format_document

from cacheblend_rag import CacheBlend, IngestReport
from cacheblend_rag.document import Piece, texts_before
from cacheblend_rag.shared import SharedEngine
from langchain_cacheblend.settings import EngineSettings


class CacheBlendIngestion(BaseDocumentTransformer):
    """Put it after the splitter: documents pass unchanged, and their KV is computed.

    What is stored already is skipped, so it costs little to run it again. With the engine's
    ``ingest_prefix="document"``, each document is computed behind what precedes it in its source:
    those of one ``source`` (and ``page``), by ``start_index``, else as they are given.

    Args:
        llm: the model that will answer, or a running engine.
        document_prompt: how your chain writes a document into its prompt, where that is not its
            ``page_content`` alone.
        show_progress: a bar while KV is computed.
    """

    def __init__(
        self,
        llm: EngineSettings | CacheBlend,
        *,
        document_prompt: BasePromptTemplate[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.engine = SharedEngine.from_running(llm) if isinstance(llm, CacheBlend) else llm.engine
        self.document_prompt = document_prompt
        self.show_progress = show_progress

    def transform_documents(self, documents: Sequence[Document], **_: Any) -> Sequence[Document]:
        self.ingest(documents)
        return documents

    async def atransform_documents(
        self, documents: Sequence[Document], **_: Any
    ) -> Sequence[Document]:
        await asyncio.to_thread(self.ingest, documents)
        return documents

    def ingest(
        self, documents: Sequence[Document], ids: Sequence[str | None] | None = None
    ) -> IngestReport:
        """Compute the KV of documents; returns what was done.

        Args:
            documents: as the splitter made them.
            ids: what to forget them by; their own where None.
        """
        names = [document.id for document in documents] if ids is None else ids
        texts = list(map(self.text_of, documents))
        left_context = (
            texts_before(list(map(_piece, documents))) if self.engine.by_document else None
        )
        return self.engine.ingest(texts, names, left_context, progress=self.show_progress)

    def check(self, documents: Sequence[Document]) -> None:
        """Before a vector store takes them: that ``ingest`` does.

        Raises:
            PromptError: it does not; names the document.
        """
        self.engine.check(list(map(self.text_of, documents)), list(map(_name, documents)))

    def text_of(self, document: Document) -> str:
        """The text of a document as prompts will contain it."""
        if self.document_prompt is None:
            return document.page_content
        return format_document(document, self.document_prompt)


def _name(document: Document) -> str | None:
    name = document.id or document.metadata.get("source")
    return None if name is None else str(name)


def _piece(document: Document) -> Piece:
    """A document as a piece of its source. Loaders of PDF files bring a document a page, and what a
    splitter makes of it counts from the page's start.
    """
    source, page = document.metadata.get("source"), document.metadata.get("page")
    start = document.metadata.get("start_index")
    whole = None if source is None else (str(source), page)
    return Piece(document.page_content, whole, start if isinstance(start, int) else None)
