"""``CacheBlendIngestion``: computes the KV of nodes where LlamaIndex ingests them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.indices.base import BaseIndex
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.storage.docstore.types import BaseDocumentStore

from cacheblend_rag import CacheBlend, IngestReport, PromptError
from cacheblend_rag.document import Piece, texts_before
from cacheblend_rag.shared import SharedEngine, may_have_kv
from llama_index_cacheblend import relay
from llama_index_cacheblend.llm import CacheBlendLLM


class CacheBlendIngestion(TransformComponent):
    """Put it last among the transformations: nodes pass unchanged, and their KV is computed.

    What is computed is what a prompt will contain: the node's text with its metadata, as LlamaIndex
    writes it for an LLM. It is computed in this process, also for a pipeline with ``num_workers``,
    and once: what is stored is skipped. With the engine's ``ingest_prefix="document"``, each node
    is computed behind what precedes it in its document, as far as its neighbours hold it.

    Args:
        llm: the LLM that will answer, or a running engine.
        metadata_mode: ``MetadataMode.NONE`` for query engines that put text between metadata and
            text, as ``CitationQueryEngine`` does: then the text alone is found.
        metadata_key: for a ``MetadataReplacementPostProcessor``, the key whose value will stand in
            the prompt in place of the text.
        show_progress: a bar while KV is computed.
    """

    model_config = ConfigDict(extra="forbid")

    metadata_mode: MetadataMode = Field(default=MetadataMode.LLM)
    metadata_key: str | None = Field(default=None)
    show_progress: bool = Field(default=True)
    _engine: SharedEngine = PrivateAttr()
    _relay: relay.Relay | None = PrivateAttr(default=None)
    # in a worker process: how to reach the one that pickled us, and what it is called there
    _address: Any = PrivateAttr(default=None)
    _identity: str | None = PrivateAttr(default=None)

    def __init__(self, llm: CacheBlendLLM | CacheBlend | SharedEngine, **fields: Any) -> None:
        super().__init__(**fields)
        if isinstance(llm, CacheBlend):
            llm = SharedEngine.from_running(llm)
        self._engine = llm.engine if isinstance(llm, CacheBlendLLM) else llm

    @classmethod
    def class_name(cls) -> str:
        return "CacheBlendIngestion"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Its fields, and the name of model and store: LlamaIndex's ingestion cache keys by them.

        So a cache that was filled for another model, or for a store that is gone, is not hit.
        """
        identity = self._identity or self._engine.identity()
        return {**super().to_dict(**kwargs), "identity": identity}

    # ---- as a transformation -------------------------------------------------------------------

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        batch = self._batch(nodes)
        if self._address is not None:
            relay.send(self._address, batch)
        else:
            self._ingest(batch)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def text_of(self, node: BaseNode) -> str:
        """The text of a node as prompts will contain it."""
        if self.metadata_key is not None:
            if self.metadata_key not in node.metadata:
                raise PromptError(
                    f"node {node.node_id} has no metadata {self.metadata_key!r}; metadata_key "
                    "names what a MetadataReplacementPostProcessor will put into the prompt"
                )
            node = node.model_copy()
            node.set_content(str(node.metadata[self.metadata_key]))
        return node.get_content(metadata_mode=self.metadata_mode).strip()

    # ---- outside a pipeline --------------------------------------------------------------------

    def ingest(self, nodes: Iterable[BaseNode]) -> IngestReport:
        """Compute the KV of nodes that go through no pipeline; returns what was done."""
        return self._ingest(self._batch(list(nodes)))

    def check(self, nodes: Sequence[BaseNode]) -> None:
        """Before a vector store takes them: that ``ingest`` does.

        Raises:
            PromptError: it does not; names the node's document.
        """
        self._engine.check(list(map(self.text_of, nodes)), list(map(document_of, nodes)))

    def backfill(self, index: BaseIndex[Any]) -> IngestReport:
        """Compute what is missing of an index that was built before, or without this.

        Raises:
            PromptError: the index's stores can't list its nodes.
        """
        return self.ingest(_nodes_of(index))

    def forget(self, ref_doc_id: str) -> int:
        """Drop the KV of a document, but for chunks that other documents share.

        Returns:
            Chunks dropped.

        Raises:
            PromptError: no chunks are registered for the document; see ``gc``.
        """
        return self._engine.forget([ref_doc_id])

    def chunks_of(self, nodes: Iterable[BaseNode]) -> set[tuple[str, str]]:
        """Document and key of each node's chunk, for ``forget_chunks``."""
        texts = [(document_of(node), self.text_of(node)) for node in nodes]
        return {(d, self._engine.blend().key(text)) for d, text in texts if may_have_kv(text)}

    def forget_chunks(self, chunks: Iterable[tuple[str, str]]) -> int:
        """Drop the KV of single nodes, but for texts that other documents share. Another node of
        the same document and text loses it too, which costs time only.

        Returns:
            Chunks dropped.
        """
        return self._engine.forget_chunks(chunks)

    def gc(self, docstore: BaseDocumentStore) -> int:
        """Drop the KV of all that ``docstore`` does not hold: every other chunk of this model and
        namespace, so it must be the only docstore that uses them.

        Returns:
            Chunks dropped.
        """
        texts = [self.text_of(node) for node in docstore.docs.values()]
        return self._engine.blend().delete_except(text for text in texts if may_have_kv(text))

    def _batch(self, nodes: Sequence[BaseNode]) -> relay.Batch:
        # what stands in place of a node's text (a window of sentences, say) has no place of its own
        placed = self._engine.by_document and self.metadata_key is None
        return relay.Batch(
            [self.text_of(node) for node in nodes],
            [document_of(node) for node in nodes],
            texts_before_nodes(nodes) if placed else None,
        )

    def _ingest(self, batch: relay.Batch) -> IngestReport:
        return self._engine.ingest(*batch, progress=self.show_progress)

    # ---- copies and worker processes -----------------------------------------------------------

    def __deepcopy__(self, memo: object = None) -> CacheBlendIngestion:
        return self.__copy__()

    def __copy__(self) -> CacheBlendIngestion:
        return type(self)(self._engine, **self._fields())

    def __reduce__(self) -> tuple[Any, ...]:
        if self._address is None and self._relay is None:
            self._relay = relay.Relay(self._ingest)
        address = self._address if self._relay is None else self._relay.address
        identity = self._identity or self._engine.identity()
        return _revive, (type(self), self._engine, self._fields(), os.getpid(), address, identity)

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in type(self).model_fields}


def _revive(
    cls: type[CacheBlendIngestion],
    engine: SharedEngine,
    fields: dict[str, Any],
    pid: int,
    address: Any,
    identity: str,
) -> CacheBlendIngestion:
    revived = cls(engine, **fields)
    if os.getpid() != pid:
        revived._address, revived._identity = address, identity
    return revived


def document_of(node: BaseNode) -> str:
    """What a node's chunk is forgotten by: its document, or itself where it has none."""
    return node.ref_doc_id or node.node_id


def texts_before_nodes(nodes: Sequence[BaseNode]) -> list[str | None]:
    """Of each node, what stands before it in its document, as far as the others tell; None where
    nothing does. They are ordered by where they start in it, or by what each follows.
    """
    ordered = _by_previous(nodes)
    left_context = texts_before([_piece(node) for node in ordered])
    found = {node.node_id: text for node, text in zip(ordered, left_context, strict=True)}
    return [found[node.node_id] for node in nodes]


def _piece(node: BaseNode) -> Piece:
    # nodes cut out of another node count from its start
    document = (node.ref_doc_id, node.parent_node and node.parent_node.node_id)
    return Piece(
        node.get_content(metadata_mode=MetadataMode.NONE),
        document if node.ref_doc_id else None,
        getattr(node, "start_char_idx", None),
    )


def _by_previous(nodes: Sequence[BaseNode]) -> list[BaseNode]:
    """Each node behind the one it follows, where that is among them, and otherwise as given."""
    waiting = {node.node_id: node for node in nodes}
    ordered: list[BaseNode] = []
    for node in nodes:
        chain: list[BaseNode] = []
        at = waiting.pop(node.node_id, None)
        while at is not None:
            chain.append(at)
            at = waiting.pop(at.prev_node.node_id, None) if at.prev_node else None
        ordered += reversed(chain)
    return ordered


def _nodes_of(index: BaseIndex[Any]) -> list[BaseNode]:
    if nodes := list(index.docstore.docs.values()):
        return nodes
    store = getattr(index, "vector_store", None)
    with listing(store):
        return list(store.get_nodes(None)) if store is not None else []


@contextmanager
def listing(store: object) -> Iterator[None]:
    """While a vector store lists nodes. Stores say in many ways that they can't: not implemented,
    not without a filter, not before a collection exists.

    Raises:
        PromptError: it can't.
    """
    try:
        yield
    except OSError:  # no answer is not the answer that it can't
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise PromptError(
            f"{type(store).__name__} can't list its nodes ({cause}); pass them to ingest() instead"
        ) from error
