"""Reports name what a chain retrieved and its prompts lack, however chain and model run."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from langchain_classic.chains import RetrievalQA
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore

from cacheblend_rag import ClosedError
from langchain_cacheblend import (
    CacheBlendIngestion,
    CacheBlendLLM,
    ChatCacheBlend,
    RetrievalHandler,
)

PROMPT = ChatPromptTemplate.from_template("{context}\n\n{question}")
NAMES = ["a", "b", "c"]


@pytest.fixture
def llm(engines: list[FakeEngine]) -> ChatCacheBlend:
    return ChatCacheBlend(model=str(MODEL))


@pytest.fixture
def handler(llm: ChatCacheBlend) -> RetrievalHandler:
    return RetrievalHandler(CacheBlendIngestion(llm, show_progress=False))


@pytest.fixture
def vectors() -> InMemoryVectorStore:
    found = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    found.add_documents([Document(id=n, page_content=f"The story of {n}. " * 12) for n in NAMES])
    return found


def chain(vectors: InMemoryVectorStore, llm: ChatCacheBlend, names: str) -> Runnable[str, Any]:
    """One that loses all but the named documents between retrieval and prompt."""

    def join(found: list[Document]) -> str:
        return "\n\n".join(d.page_content for d in found if d.id is not None and d.id in names)

    context = vectors.as_retriever(search_kwargs={"k": 3}) | join
    return {"context": context, "question": RunnablePassthrough()} | PROMPT | llm


def missing(answer: AIMessage | AIMessageChunk) -> list[str]:
    return sorted(answer.response_metadata["cacheblend"]["retrieved_not_found"])


async def test_all_ways_to_run_a_chain(
    llm: ChatCacheBlend, handler: RetrievalHandler, vectors: InMemoryVectorStore
) -> None:
    config: Any = {"callbacks": [handler]}
    made = chain(vectors, llm, "b")
    assert missing(made.invoke("?", config)) == ["a", "c"]
    assert missing(await made.ainvoke("?", config)) == ["a", "c"]
    assert [missing(answer) for answer in made.batch(["?", "!"], config)] == [["a", "c"]] * 2
    assert missing(list(made.stream("?", config))[-1]) == ["a", "c"]
    assert missing([piece async for piece in made.astream("?", config)][-1]) == ["a", "c"]
    assert not handler._chains  # nothing is kept of calls that ended


async def test_calls_side_by_side_are_told_apart(
    llm: ChatCacheBlend, handler: RetrievalHandler, vectors: InMemoryVectorStore
) -> None:
    config: Any = {"callbacks": [handler]}
    chains = {name: chain(vectors, llm, name) for name in NAMES * 4}
    with ThreadPoolExecutor() as pool:
        found = {n: pool.submit(made.invoke, "?", config) for n, made in chains.items()}
    for name, answer in found.items():
        assert missing(answer.result()) == sorted({*NAMES} - {name})
    answers = await asyncio.gather(*(made.ainvoke("?", config) for made in chains.values()))
    assert [missing(a) for a in answers] == [sorted({*NAMES} - {name}) for name in chains]


def test_no_retrieval_says_nothing(llm: ChatCacheBlend, handler: RetrievalHandler) -> None:
    answer = (PROMPT | llm).invoke({"context": "", "question": "?"}, {"callbacks": [handler]})
    assert "retrieved_not_found" not in answer.response_metadata["cacheblend"]
    assert "retrieved_not_found" not in llm.invoke("?").response_metadata["cacheblend"]


def test_nothing_is_kept_of_a_chain_that_failed(
    llm: ChatCacheBlend, handler: RetrievalHandler, vectors: InMemoryVectorStore
) -> None:
    llm.close()
    with pytest.raises(ClosedError):
        chain(vectors, llm, "b").invoke("?", {"callbacks": [handler]})
    assert not handler._chains


def test_a_warning_only_where_none_is_found(
    llm: ChatCacheBlend,
    handler: RetrievalHandler,
    vectors: InMemoryVectorStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config: Any = {"callbacks": [handler]}
    with caplog.at_level(logging.WARNING, "langchain_cacheblend"):
        chain(vectors, llm, "a").invoke("?", config)
        assert not caplog.records
        assert missing(chain(vectors, llm, "").invoke("?", config)) == NAMES
    assert "None of the 3 chunks" in caplog.text


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
def test_a_document_a_prompt(
    llm: ChatCacheBlend, handler: RetrievalHandler, vectors: InMemoryVectorStore
) -> None:
    """Refine asks once for each document: what the last prompt lacks, the others had."""
    seen = []

    class Noting(CacheBlendLLM):
        def _info(self, *given: Any) -> dict[str, Any]:
            seen.append(super()._info(*given))
            return seen[-1]

    made = RetrievalQA.from_chain_type(
        Noting(engine=llm.engine), chain_type="refine", retriever=vectors.as_retriever()
    )
    made.invoke({"query": "?"}, {"callbacks": [handler]})
    assert [len(info["cacheblend"]["retrieved_not_found"]) for info in seen] == [2, 1, 0]
