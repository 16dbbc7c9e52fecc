"""KV is computed wherever LlamaIndex ingests nodes, stays in step with them, and changes none."""

from __future__ import annotations

import asyncio
import copy
import logging
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import (
    BaseNode,
    MetadataMode,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore
from llama_index.vector_stores.faiss import FaissVectorStore
from llama_matrix import EMBED, documents, split

from cacheblend_rag import BlendConfig, PromptError, StoreError
from cacheblend_rag.prefix import NEUTRAL_TEXT
from llama_index_cacheblend import (
    CacheBlendIngestion,
    CacheBlendLLM,
    CacheBlendVectorStore,
    relay,
)
from llama_index_cacheblend.ingestion import texts_before_nodes

SPLITTER = SentenceSplitter(chunk_size=256, chunk_overlap=0)


@pytest.fixture
def llm(engines: list[FakeEngine]) -> CacheBlendLLM:
    made = CacheBlendLLM(model=str(MODEL), engine_args={"max_model_len": 2048})
    made.blend  # noqa: B018 - starts it, so that what is stored at start is not counted below
    return made


@pytest.fixture
def hook(llm: CacheBlendLLM) -> CacheBlendIngestion:
    return CacheBlendIngestion(llm, show_progress=False)


@pytest.fixture
def store(llm: CacheBlendLLM, engines: list[FakeEngine]) -> Callable[[], int]:
    """How many chunks are stored beside those the engine stored when it started."""
    at_start = len(engines[0].stored)
    return lambda: len(engines[0].stored) - at_start


def pipeline(hook: CacheBlendIngestion, **options: Any) -> IngestionPipeline:
    return IngestionPipeline(transformations=[SPLITTER, hook], **options)


def test_nodes_pass_unchanged(hook: CacheBlendIngestion, store: Callable[[], int]) -> None:
    nodes = split()
    left_context = [node.model_dump() for node in nodes]
    assert hook(nodes) is nodes
    assert [node.model_dump() for node in nodes] == left_context
    assert store() == len(nodes)


async def test_acall_leaves_the_loop_free(
    hook: CacheBlendIngestion, store: Callable[[], int]
) -> None:
    nodes = split()
    assert await hook.acall(nodes) is nodes
    assert store() == len(nodes)


def test_the_stripped_text_with_metadata_is_computed(hook: CacheBlendIngestion) -> None:
    node = TextNode(text="  body \n", metadata={"a": 1, "b": 2}, excluded_llm_metadata_keys=["b"])
    assert hook.text_of(node) == "a: 1\n\n  body"
    alone = CacheBlendIngestion(hook._engine, metadata_mode=MetadataMode.NONE)
    assert alone.text_of(node) == "body"
    windowed = CacheBlendIngestion(hook._engine, metadata_key="b")
    assert windowed.text_of(node) == "a: 1\n\n2"
    with pytest.raises(PromptError, match="MetadataReplacementPostProcessor"):
        CacheBlendIngestion(hook._engine, metadata_key="window").text_of(node)


def test_empty_nodes_are_passed_over_and_too_long_ones_named(hook: CacheBlendIngestion) -> None:
    nodes = [TextNode(text=" "), *split()[:1]]
    assert hook(nodes) is nodes
    with pytest.warns(UserWarning, match="smaller chunks"):
        hook([TextNode(text="word " * 3000)])


# --- what stands before a node in its document ----------------------------------------------------


@pytest.fixture
def by_document(engines: list[FakeEngine]) -> CacheBlendIngestion:
    config = BlendConfig(ingest_prefix="document")
    return CacheBlendIngestion(CacheBlendLLM(str(MODEL), blend_config=config), show_progress=False)


def text_behind(engine: FakeEngine, key: str) -> str:
    return str(engine.tokenizer.decode(engine.behind[key]))


@pytest.mark.parametrize("overlap", [0, 40])
def test_nodes_are_computed_behind_what_precedes_them(
    by_document: CacheBlendIngestion, engines: list[FakeEngine], overlap: int
) -> None:
    splitter = SentenceSplitter(chunk_size=128, chunk_overlap=overlap)
    nodes = splitter.get_nodes_from_documents(documents())
    whole = {document.doc_id: document.text for document in documents()}
    report = by_document.ingest(list(reversed(nodes)))
    seen = 0
    for node, key in zip(reversed(nodes), report.keys, strict=True):
        assert isinstance(node, TextNode) and node.start_char_idx is not None
        left_context = whole[node.ref_doc_id][: node.start_char_idx].split()  # type: ignore[index]
        behind = text_behind(engines[0], key)
        if left_context:
            seen += 1
            assert behind.split()[-60:] == left_context[-60:] or len(left_context) < 60
        else:
            assert behind.endswith(NEUTRAL_TEXT)
    assert seen > 3


def test_nodes_without_a_place_stand_behind_those_they_follow() -> None:
    source = RelatedNodeInfo(node_id="d")
    nodes = [TextNode(id_=name, text=name) for name in "abc"]
    for node, previous in zip(nodes, [None, *nodes], strict=False):
        node.relationships[NodeRelationship.SOURCE] = source
        if previous:
            node.relationships[NodeRelationship.PREVIOUS] = previous.as_related_node_info()
    a, b, c = nodes
    assert texts_before_nodes([c, a, b]) == ["a\n\nb\n\n", None, "a\n\n"]
    assert texts_before_nodes([c, a]) == [None, "c\n\n"], "the one between is missing"
    del b.relationships[NodeRelationship.PREVIOUS]
    assert texts_before_nodes([a, b, TextNode(text="alone")]) == [None, "a\n\n", None]
    b.relationships[NodeRelationship.PARENT] = a.as_related_node_info()
    assert texts_before_nodes([a, b]) == [None, None], "cut out of another node"


def test_windows_have_no_place(by_document: CacheBlendIngestion, engines: list[FakeEngine]) -> None:
    windowed = CacheBlendIngestion(by_document._engine, metadata_key="k", show_progress=False)
    nodes = split(128)[:2]
    for number, node in enumerate(nodes):
        node.metadata["k"] = f"{number} " + "A sentence and those around it. " * 8
    for key in windowed.ingest(nodes).keys:
        assert text_behind(engines[0], key).endswith(NEUTRAL_TEXT)


@pytest.mark.filterwarnings("ignore:Removing unpickleable")
def test_worker_processes_send_what_precedes_nodes(
    by_document: CacheBlendIngestion, engines: list[FakeEngine]
) -> None:
    pipeline(by_document).run(documents=documents(), num_workers=2)
    engine = engines[0]
    behind = [text_behind(engine, key) for key in engine.ingested]
    assert sum(not text.endswith(NEUTRAL_TEXT) for text in behind) > 3


# --- pipelines ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Removing unpickleable")
def test_worker_processes_have_it_computed_here(
    hook: CacheBlendIngestion, engines: list[FakeEngine], store: Callable[[], int]
) -> None:
    """The workers run as processes of their own, which have no fake engine: a real one would fail
    to start here in no time, or start, and either would show.
    """
    made = pipeline(hook).run(documents=documents(), num_workers=2)
    assert store() == len(made) > 3
    assert len(engines) == 1
    asyncio.run(pipeline(hook).arun(documents=documents(), num_workers=2))
    assert store() == len(made)


def test_who_leaves_at_the_door_holds_up_nobody() -> None:
    taken = list[relay.Batch]()
    held = relay.Relay(taken.append)
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as knocks:
            knocks.connect(held.address)
    batch = relay.Batch(["a text"], [None], None)
    sends = threading.Thread(target=relay.send, args=(held.address, batch), daemon=True)
    sends.start()
    sends.join(5)
    assert not sends.is_alive() and taken == [batch]
    held.close()


def test_errors_of_worker_processes_are_ours(
    hook: CacheBlendIngestion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(hook._engine.blend(), "_ingest", full)
    alone = IngestionPipeline(transformations=[hook])
    with pytest.raises(StoreError, match="full"):
        alone.run(documents=documents(), num_workers=2)


def test_ingestion_cache_is_hit_only_for_the_same_model_and_store(
    hook: CacheBlendIngestion, engines: list[FakeEngine], store: Callable[[], int]
) -> None:
    cache = IngestionCache()
    first = pipeline(hook, cache=cache).run(documents=documents())
    engines[0].ingested.clear()
    assert len(pipeline(hook, cache=cache).run(documents=documents())) == len(first)
    hook._engine.close()

    again = CacheBlendLLM(model=str(MODEL), engine_args={"max_model_len": 2048})
    pipeline(CacheBlendIngestion(again, show_progress=False), cache=cache).run(
        documents=documents()
    )
    assert len(engines) == 2
    assert len(engines[1].stored) >= len(first)  # memory is empty in a new engine: no hit


def test_identity_names_settings_model_and_store(
    tmp_path: Any, engines: list[FakeEngine], hook: CacheBlendIngestion
) -> None:
    assert hook.to_dict() == copy.deepcopy(hook).to_dict()
    other = CacheBlendIngestion(hook._engine, metadata_mode=MetadataMode.NONE, show_progress=False)
    assert other.to_dict() != hook.to_dict()
    hook._engine.close()

    folder = tmp_path / "kv"
    folder.mkdir()
    marker = folder / "cacheblend-store.json"
    seen = set()
    for number in range(3):
        if number != 1:
            marker.unlink(missing_ok=True)
            marker.write_text("{}")
        config = BlendConfig(store=f"file://{folder}")
        with CacheBlendLLM(model=str(MODEL), blend_config=config) as llm:
            seen.add(CacheBlendIngestion(llm).to_dict()["identity"])
    assert len(seen) == 2  # the same store has the same name in another session, a new one has not
    config = BlendConfig(store=f"file://{folder}", ingest_prefix="document")
    with CacheBlendLLM(model=str(MODEL), blend_config=config) as llm:
        assert CacheBlendIngestion(llm).to_dict()["identity"] not in seen


def test_docstore_upserts_compute_only_what_changed(
    hook: CacheBlendIngestion, engines: list[FakeEngine]
) -> None:
    upserting = pipeline(
        hook,
        docstore=SimpleDocumentStore(),
        vector_store=SimpleVectorStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
        disable_cache=True,
    )
    made = upserting.run(documents=documents())
    engines[0].ingested.clear()
    assert upserting.run(documents=documents()) == []
    changed = documents()
    changed[0] = Document(text=changed[0].text + " One more sentence.", id_=changed[0].doc_id)
    assert 0 < len(upserting.run(documents=changed)) < len(made)
    assert 0 < len(engines[0].ingested) < len(made)


# --- beside pipelines -----------------------------------------------------------------------------


def index_of(nodes: Sequence[BaseNode], **options: Any) -> VectorStoreIndex:
    return VectorStoreIndex(list(nodes), embed_model=EMBED, **options)


def test_backfill(hook: CacheBlendIngestion, store: Callable[[], int]) -> None:
    nodes = split()
    report = hook.backfill(index_of(nodes))
    assert report.computed == store() == len(nodes)
    assert hook.backfill(index_of(nodes)).present == len(nodes)


def test_backfill_where_nodes_can_t_be_listed(hook: CacheBlendIngestion) -> None:
    faiss = pytest.importorskip("faiss")
    vectors = FaissVectorStore(faiss_index=faiss.IndexFlatIP(8))
    index = index_of([], storage_context=StorageContext.from_defaults(vector_store=vectors))
    with pytest.raises(PromptError, match=r"FaissVectorStore .* ingest\(\)"):
        hook.backfill(index)


def test_forget_leaves_what_others_share(
    hook: CacheBlendIngestion, store: Callable[[], int]
) -> None:
    shared = split()[0].get_content()
    one, two = Document(text=shared, id_="one"), Document(text=shared, id_="two")
    hook([one, two])
    assert store() == 1
    assert hook.forget("one") == 0
    assert store() == 1
    assert hook.forget("two") == 1
    assert store() == 0
    with pytest.raises(PromptError, match=r"gc\(\)"):
        hook.forget("two")


def test_gc_drops_what_the_docstore_lacks(
    hook: CacheBlendIngestion, store: Callable[[], int]
) -> None:
    nodes = split()
    hook(nodes)
    docstore = SimpleDocumentStore()
    docstore.add_documents(nodes[:2])
    assert hook.gc(docstore) == len(nodes) - 2
    assert store() == 2


async def test_vector_store_computes_and_forgets(
    hook: CacheBlendIngestion, store: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    nodes = split()
    storage = StorageContext.from_defaults(
        vector_store=CacheBlendVectorStore(SimpleVectorStore(), hook)
    )
    index = index_of(nodes[:3], storage_context=storage)
    assert store() == 3
    index.insert_nodes(nodes[3:])  # which no transformation sees
    assert store() == len(nodes)

    first, *others = sorted({node.ref_doc_id or "" for node in nodes})
    of_first = sum(node.ref_doc_id == first for node in nodes)
    index.delete_ref_doc(first)
    assert store() == len(nodes) - of_first
    await index.adelete_ref_doc(others[0])
    retriever = index.as_retriever(similarity_top_k=100)
    assert {found.node.ref_doc_id for found in retriever.retrieve("?")} == set(others[1:])

    with caplog.at_level(logging.WARNING):
        storage.vector_store.delete("never seen")
    assert "gc(docstore)" in caplog.text
    storage.vector_store.clear()
    assert store() == 0


class Listing(SimpleVectorStore):
    """An inner store that can list its nodes, as most can that keep their text."""

    _nodes: dict[str, BaseNode] = PrivateAttr(default_factory=dict)

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        self._nodes.update((node.node_id, node) for node in nodes)
        return super().add(nodes)

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        found = [n for n in self._nodes.values() if node_ids is None or n.node_id in node_ids]
        return [n for n in found if filters is None or n.metadata["k"] == filters.filters[0].value]


def embedded(*texts: str, **metadata: Any) -> list[BaseNode]:
    return [
        TextNode(text=f"The story of {text}. " * 12, embedding=[1.0] * 8, metadata=metadata)
        for text in texts
    ]


@pytest.mark.parametrize("inner", [SimpleVectorStore, Listing])
async def test_single_nodes_are_forgotten(
    inner: type[SimpleVectorStore],
    hook: CacheBlendIngestion,
    store: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    vectors = CacheBlendVectorStore(inner(), hook)
    nodes = embedded("one", "two", "three", "one")  # nodes without a document are their own
    vectors.add(nodes)
    assert store() == 3
    vectors.delete_nodes([nodes[0].node_id])
    assert store() == 3  # the last one has the same text
    await vectors.adelete_nodes([nodes[1].node_id, nodes[3].node_id])
    assert store() == 1
    assert not caplog.records
    await vectors.aclear()
    assert store() == 0


def test_nodes_of_an_earlier_session_are_forgotten_if_they_can_be_listed(
    hook: CacheBlendIngestion, store: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    inner, kept = Listing(), SimpleVectorStore()
    nodes = [*embedded("one", k="a"), *embedded("two", k="b"), *embedded("three", k="b")]
    CacheBlendVectorStore(inner, hook).add(nodes)
    CacheBlendVectorStore(kept, hook).add(nodes)
    filters = MetadataFilters(filters=[MetadataFilter(key="k", value="a")])
    CacheBlendVectorStore(inner, hook).delete_nodes(filters=filters)
    assert store() == 2
    CacheBlendVectorStore(inner, hook).delete_nodes([nodes[1].node_id])
    assert store() == 1
    assert not caplog.records
    CacheBlendVectorStore(kept, hook).delete_nodes([nodes[2].node_id])
    assert store() == 1
    assert "SimpleVectorStore can't list" in caplog.text
    CacheBlendVectorStore(inner, hook).clear()
    assert store() == 0


class NewCollection(Listing):
    """As Qdrant's: there is nothing to ask before something is added."""

    def get_nodes(self, *which: Any) -> list[BaseNode]:
        if not self._nodes:
            raise LookupError("404 Not Found: collection")  # of its client, so of any kind
        return super().get_nodes(*which)


class NotWithoutFilter(Listing):
    """As PGVector's, which takes no ids for all nodes, and lists them only if asked so."""

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        assert node_ids is not None or filters is not None
        return super().get_nodes(node_ids or None, filters)


@pytest.mark.parametrize("of", [NewCollection, NotWithoutFilter])
@pytest.mark.parametrize("in_loop", [False, True], ids=["thread", "loop"])
async def test_what_an_inner_store_can_t_list_it_still_takes_and_clears(
    of: type[Listing],
    in_loop: bool,
    hook: CacheBlendIngestion,
    store: Callable[[], int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    inner = of()
    vectors = CacheBlendVectorStore(inner, hook)
    nodes = embedded("one", "two")
    if in_loop:
        await vectors.async_add(nodes)
        await vectors.adelete_nodes([])
    else:
        vectors.add(nodes)
        vectors.delete_nodes([])
    assert store() == 2, "none was named"
    await vectors.aclear() if in_loop else vectors.clear()
    assert store() == 0 and not inner.data.embedding_dict
    assert ("NotWithoutFilter was cleared and can't list" in caplog.text) == (
        of is NotWithoutFilter
    )


def test_backfill_says_why_nodes_can_t_be_listed(hook: CacheBlendIngestion) -> None:
    storage = StorageContext.from_defaults(vector_store=NewCollection())
    index = index_of([], storage_context=storage)
    with pytest.raises(PromptError, match=r"NewCollection .*LookupError: 404.* ingest\(\)"):
        hook.backfill(index)


@pytest.mark.parametrize("text", [" ", "caf\udce9"])
def test_nodes_without_kv_are_deleted(
    hook: CacheBlendIngestion, store: Callable[[], int], text: str
) -> None:
    inner = Listing()
    [node] = embedded("one")
    CacheBlendVectorStore(inner, hook).add([node])
    [other] = embedded("other")
    other.set_content(text)  # type: ignore[attr-defined]
    inner.add([other])
    CacheBlendVectorStore(inner, hook).delete_nodes([node.node_id, other.node_id])
    assert store() == 0


def test_clearing_one_store_leaves_the_other_s(
    hook: CacheBlendIngestion, store: Callable[[], int]
) -> None:
    one, two = (CacheBlendVectorStore(SimpleVectorStore(), hook) for _ in range(2))
    one.add(embedded("one"))
    two.add(embedded("two"))
    one.clear()
    assert store() == 1


# --- what fails leaves nothing behind -------------------------------------------------------------


def with_vectors(nodes: Sequence[BaseNode]) -> list[BaseNode]:
    return [node.model_copy(update={"embedding": [0.0] * 8}) for node in nodes]


async def test_a_node_that_cannot_be_ingested_is_named_before_anything_is_added(
    hook: CacheBlendIngestion, store: Callable[[], int]
) -> None:
    vectors = SimpleVectorStore()
    wrapped = CacheBlendVectorStore(vectors, hook)
    bad = TextNode(text="One fish. " * 40, id_="bad", metadata={"file_path": "caf\udce9.pdf"})
    nodes = with_vectors([*split()[:2], bad])
    said = "character 14 of text 3 of 3, of document 'bad'"
    with pytest.raises(PromptError, match=said):
        wrapped.add(nodes)
    with pytest.raises(PromptError, match=said):
        await wrapped.async_add(nodes)
    with pytest.raises(PromptError, match=said):
        hook(nodes)
    assert (vectors.data.embedding_dict, store()) == ({}, 0)


async def test_a_full_store_leaves_no_node_behind(
    hook: CacheBlendIngestion, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = SimpleVectorStore()
    wrapped = CacheBlendVectorStore(vectors, hook)
    nodes = with_vectors(split()[:3])
    wrapped.add(nodes[:1])
    rpc = engines[0].rpc

    def full(method: str, *args: Any) -> list[Any]:
        if method == "cacheblend_ingest":
            raise StoreError("the disk is full")
        return rpc(method, *args)

    monkeypatch.setattr(engines[0], "rpc", full)
    with pytest.raises(StoreError):
        wrapped.add(nodes)
    with pytest.raises(StoreError):
        await wrapped.async_add(nodes)
    assert set(vectors.data.embedding_dict) == {nodes[0].node_id}


def test_a_too_long_node_stops_no_other(
    hook: CacheBlendIngestion, store: Callable[[], int]
) -> None:
    nodes = [*split()[:2], TextNode(text="word " * 3000)]
    with pytest.warns(UserWarning, match="1 of 3 texts"):
        assert hook(nodes) == nodes
    assert store() == 2
