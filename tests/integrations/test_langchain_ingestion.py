"""KV of LangChain's documents is computed and dropped with them, the indexing API included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.prompts import PromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import VectorStoreIntegrationTests
from langchain_text_splitters import RecursiveCharacterTextSplitter

from cacheblend_rag import BlendConfig, ConfigError, PromptError, StoreError
from cacheblend_rag.prefix import NEUTRAL_TEXT
from langchain_cacheblend import (
    CacheBlendIngestion,
    CacheBlendVectorStore,
    ChatCacheBlend,
    RetrievalHandler,
)


@pytest.fixture
def ingestion(engines: list[FakeEngine]) -> CacheBlendIngestion:
    llm = ChatCacheBlend(model=str(MODEL))
    llm.blend  # noqa: B018 - starts it, so that what is stored at start is not counted below
    return CacheBlendIngestion(llm, show_progress=False)


@pytest.fixture
def stored(ingestion: CacheBlendIngestion, engines: list[FakeEngine]) -> Callable[[], int]:
    """How many chunks are stored beside those the engine stored when it started."""
    at_start = len(engines[0].stored)
    return lambda: len(engines[0].stored) - at_start


@pytest.fixture
def store(ingestion: CacheBlendIngestion) -> CacheBlendVectorStore:
    return CacheBlendVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), ingestion)


def documents(names: str) -> list[Document]:
    """A document a letter, each long enough to be stored."""
    return [
        Document(page_content=f"The story of {name}. " * 12, metadata={"source": name})
        for name in names
    ]


async def test_documents_pass_unchanged(
    ingestion: CacheBlendIngestion, stored: Callable[[], int]
) -> None:
    given = documents("abc")
    assert ingestion.transform_documents(given) is given
    assert given == documents("abc")
    assert stored() == 3
    assert await ingestion.atransform_documents(documents("cd")) == documents("cd")
    assert stored() == 4


def test_text_is_what_the_chain_writes(engines: list[FakeEngine]) -> None:
    llm = ChatCacheBlend(model=str(MODEL))
    prompt = PromptTemplate.from_template("{source}: {page_content}")
    made = CacheBlendIngestion(llm.blend, document_prompt=prompt)
    assert made.text_of(documents("a")[0]).startswith("a: The story of a.")


def test_documents_are_computed_behind_what_precedes_them(engines: list[FakeEngine]) -> None:
    """Of one source, by where they start in it; text that two of them share stands once."""
    config = BlendConfig(ingest_prefix="document")
    llm = ChatCacheBlend(model=str(MODEL), blend_config=config)
    text = " ".join(f"Sentence {n} is about rivers and clocks." for n in range(20))
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=320, chunk_overlap=80, add_start_index=True, separators=[" "]
    )
    given = splitter.create_documents([text], [{"source": "a"}])
    alone = Document(page_content="Nothing else is known of this. " * 8)
    ingestion = CacheBlendIngestion(llm, show_progress=False)
    report = ingestion.ingest([*reversed(given), alone])
    [engine] = engines
    for document, key in zip([*reversed(given), alone], report.keys, strict=True):
        start = document.metadata.get("start_index", 0)
        behind = engine.tokenizer.decode(engine.behind[key])
        assert behind.endswith(text[:start].rstrip()[-300:] + "\n\n" if start else NEUTRAL_TEXT)
    assert len({len(engine.behind[key]) for key in report.keys}) == 1


def test_what_is_retrieved_is_brought_nearer(
    store: CacheBlendVectorStore, engines: list[FakeEngine]
) -> None:
    store.add_documents(documents("abc"))
    handler = RetrievalHandler(store.ingestion)
    found = store.as_retriever(search_kwargs={"k": 2}).invoke("?", config={"callbacks": [handler]})
    expected = store.ingestion.engine.blend().ingest([d.page_content for d in found]).keys
    for _ in range(100):
        if engines[0].prefetched == expected:
            break
        time.sleep(0.05)
    assert engines[0].prefetched == expected


# --- the indexing API -----------------------------------------------------------------------------


def counts(result: Any) -> tuple[int, int, int]:
    return result["num_added"], result["num_skipped"], result["num_deleted"]


def test_index_adds_skips_and_deletes(
    store: CacheBlendVectorStore, stored: Callable[[], int]
) -> None:
    records = InMemoryRecordManager("test")
    records.create_schema()

    def run(given: Sequence[Document], cleanup: Any) -> tuple[int, int, int]:
        return counts(
            index(given, records, store, cleanup=cleanup, source_id_key="source",
                  key_encoder="sha256")
        )  # fmt: skip

    assert run(documents("abc"), "incremental") == (3, 0, 0)
    assert stored() == 3
    assert run(documents("abc"), "incremental") == (0, 3, 0)
    changed = documents("a")
    changed[0].page_content += "With another end."
    assert run(changed, "incremental") == (1, 0, 1)
    assert stored() == 3
    assert run(documents("b"), "full") == (0, 1, 2)
    assert stored() == 1
    assert [d.metadata["source"] for d in store.similarity_search("?", k=9)] == ["b"]


async def test_aindex(store: CacheBlendVectorStore, stored: Callable[[], int]) -> None:
    records = InMemoryRecordManager("test")
    await records.acreate_schema()
    options: Any = {"cleanup": "full", "key_encoder": "sha256"}
    assert counts(await aindex(documents("abc"), records, store, **options)) == (3, 0, 0)
    assert counts(await aindex(documents("c"), records, store, **options)) == (0, 1, 2)
    assert stored() == 1


# --- the store ------------------------------------------------------------------------------------


async def test_shared_texts_stay_until_the_last_is_deleted(
    store: CacheBlendVectorStore, stored: Callable[[], int]
) -> None:
    text = documents("a")[0].page_content
    one, two = store.add_texts([text, text])
    assert stored() == 1
    store.delete([one])
    assert stored() == 1
    await store.adelete([two])
    assert stored() == 0
    await store.aadd_texts([text], [{"k": 1}], ids=["x"])
    assert stored() == 1
    assert store.get_by_ids(["x"])[0].metadata == {"k": 1}


def test_documents_of_an_earlier_session_are_forgotten_too(
    store: CacheBlendVectorStore, stored: Callable[[], int]
) -> None:
    [name] = store.inner.add_documents(documents("a"))
    store.ingestion.engine.blend().ingest([documents("a")[0].page_content], progress=False)
    assert stored() == 1
    store.delete([name])
    assert stored() == 0


@pytest.mark.parametrize("text", ["", " \n", "caf\udce9"])
async def test_a_document_without_kv_is_deleted(
    store: CacheBlendVectorStore, stored: Callable[[], int], text: str
) -> None:
    inner: Any = store.inner
    [story], ids = documents("a"), ["none", "a"]
    for in_loop in (False, True):
        inner.add_documents([story, story], ids=ids)  # of which there is no record
        inner.store["none"]["text"] = text
        store.ingestion.engine.blend().ingest([story.page_content], progress=False)
        assert stored() == 1
        done = await store.adelete(ids) if in_loop else store.delete(ids)
        assert done is not False
        assert not store.get_by_ids(ids) and stored() == 0


async def test_searches_are_the_inner_store_s(store: CacheBlendVectorStore) -> None:
    store.add_documents(documents("abcd"))
    inner, vector = store.inner, [0.5] * 8
    assert store.embeddings is inner.embeddings
    same: list[tuple[str, Any]] = [
        ("similarity_search", "?"),
        ("similarity_search_with_score", "?"),
        ("similarity_search_by_vector", vector),
        ("max_marginal_relevance_search", "?"),
    ]
    for name, query in same:
        expected = getattr(inner, name)(query, k=2)
        assert getattr(store, name)(query, k=2) == expected
        assert await getattr(store, f"a{name}")(query, k=2) == expected
    found = store.as_retriever(search_type="mmr", search_kwargs={"k": 2}).invoke("?")
    assert found == inner.max_marginal_relevance_search("?", k=2)
    with pytest.raises(ConfigError, match="inner vector store first"):
        CacheBlendVectorStore.from_texts(["a"], store.embeddings)


class TestStandard(VectorStoreIntegrationTests):
    """LangChain's own suite for vector stores."""

    @pytest.fixture
    def vectorstore(self, ingestion: CacheBlendIngestion) -> CacheBlendVectorStore:
        return CacheBlendVectorStore(InMemoryVectorStore(self.get_embeddings()), ingestion)


# --- what fails leaves nothing behind -------------------------------------------------------------


def fill(engine: FakeEngine, patch: pytest.MonkeyPatch) -> None:
    """From here on the KV store is full."""
    rpc = engine.rpc

    def full(method: str, *args: Any) -> list[Any]:
        if method == "cacheblend_ingest":
            raise StoreError("the disk is full")
        return rpc(method, *args)

    patch.setattr(engine, "rpc", full)


def found(store: CacheBlendVectorStore) -> set[str]:
    """The sources of the documents that the inner store has."""
    return {document.metadata["source"] for document in store.similarity_search("?", k=99)}


async def test_a_text_that_cannot_be_ingested_is_named_before_anything_is_added(
    store: CacheBlendVectorStore, stored: Callable[[], int]
) -> None:
    bad = [*documents("ab"), Document("caf\udce9 " * 40, metadata={"source": "c.pdf"})]
    with pytest.raises(PromptError, match=r"character 3 of text 3 of 3, of document 'c.pdf'"):
        store.add_documents(bad)
    with pytest.raises(PromptError, match="text 3 of 3"):
        await store.aadd_documents(bad)
    with pytest.raises(PromptError, match="text 2 of 2"):
        store.add_texts(["Hello", "caf\udce9"])
    with pytest.raises(PromptError, match="text 2 of 2"):
        await store.aadd_texts(["Hello", "caf\udce9"])
    with pytest.raises(PromptError, match="text 3 of 3"):
        store.ingestion.transform_documents(bad)
    assert (found(store), stored()) == (set(), 0)


def test_a_too_long_text_stops_no_other(
    store: CacheBlendVectorStore, stored: Callable[[], int]
) -> None:
    records = InMemoryRecordManager("r")
    records.create_schema()
    given = [*documents("ab"), Document("word " * 9000, metadata={"source": "long"})]
    with pytest.warns(UserWarning, match="1 of 3 texts"):
        index(given, records, store, cleanup="full", source_id_key="source", key_encoder="sha256")
    assert (found(store), stored()) == ({"a", "b", "long"}, 2)
    index(given[:1], records, store, cleanup="full", source_id_key="source", key_encoder="sha256")
    assert (found(store), stored()) == ({"a"}, 1)


async def test_a_full_store_leaves_no_document_behind(
    store: CacheBlendVectorStore, engines: list[FakeEngine]
) -> None:
    records = InMemoryRecordManager("r")
    records.create_schema()
    options: dict[str, Any] = {
        "cleanup": "full",
        "source_id_key": "source",
        "key_encoder": "sha256",
    }
    index(documents("a"), records, store, **options)
    with pytest.MonkeyPatch.context() as patch:
        fill(engines[0], patch)
        with pytest.raises(StoreError):
            index(documents("abc"), records, store, **options)
        with pytest.raises(StoreError):
            await aindex(documents("abc"), records, store, **options)
        with pytest.raises(StoreError):
            store.add_texts(["Hello " * 60], [{"source": "x"}])
        [old] = [document.id for document in store.similarity_search("?", k=9)]
        with pytest.raises(StoreError):  # what was there before stays
            store.add_documents([documents("d")[0].model_copy(update={"id": old})])
        assert found(store) == {"d"}
    index(documents("ab"), records, store, **options)
    assert found(store) == {"d", "b"}
