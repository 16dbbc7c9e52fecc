"""Every way in which LangChain brings retrieved documents into a prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, dynamic_prompt
from langchain_classic.chains import (
    RetrievalQA,
    create_history_aware_retriever,
    create_retrieval_chain,
)
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.tools import create_retriever_tool
from langchain_text_splitters import RecursiveCharacterTextSplitter

from langchain_cacheblend import CacheBlendLLM, ChatCacheBlend

DATA = Path(__file__).parents[2] / "examples" / "data"
QUESTION = "When does the last ferry leave?"
RAG = ChatPromptTemplate.from_messages(
    [("system", "Use only this:\n\n{context}"), ("human", "{input}")]
)
WITH_SOURCE = PromptTemplate.from_template("Source: {source}\n{page_content}")


def document_prompt(name: str) -> PromptTemplate | None:
    """How the chain of that name writes a document, where that is not its text alone."""
    return WITH_SOURCE if "metadata" in name else None


def documents() -> list[Document]:
    splitter = RecursiveCharacterTextSplitter(chunk_size=900, chunk_overlap=0)
    files = sorted(DATA.glob("*.md"))[:3]
    return splitter.create_documents(
        [f.read_text() for f in files], [{"source": f.name} for f in files]
    )[:5]


class AsRetriever(BaseRetriever):
    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return documents()


Chain = Callable[[ChatCacheBlend, Any], Any]
retriever = RunnableLambda(lambda _: documents())


def stuff(llm: ChatCacheBlend, _: Any) -> Any:
    chain = create_stuff_documents_chain(llm, RAG)
    return chain.invoke({"context": documents(), "input": QUESTION})


def stuff_with_metadata(llm: ChatCacheBlend, _: Any) -> Any:
    chain = create_stuff_documents_chain(
        llm, RAG, document_prompt=WITH_SOURCE, document_separator="\n---\n"
    )
    return chain.invoke({"context": documents(), "input": QUESTION})


def retrieval_chain(llm: ChatCacheBlend, _: Any) -> Any:
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, RAG))
    return list(chain.stream({"input": QUESTION}))


def history_aware(llm: ChatCacheBlend, _: Any) -> Any:
    rephrase = ChatPromptTemplate.from_messages(
        [MessagesPlaceholder("chat_history"), ("human", "{input}"), ("human", "Rephrase.")]
    )
    chain = create_retrieval_chain(
        create_history_aware_retriever(llm, retriever, rephrase),
        create_stuff_documents_chain(llm, RAG),
    )
    history = [HumanMessage("Hello"), AIMessage("Hello!")]
    return chain.invoke({"input": QUESTION, "chat_history": history})


def lcel(llm: ChatCacheBlend, _: Any) -> Any:
    joined = retriever | (lambda found: "\n\n".join(d.page_content for d in found))
    chain = {"context": joined, "input": RunnablePassthrough()} | RAG | llm | StrOutputParser()
    return list(chain.stream(QUESTION))


def agent(llm: ChatCacheBlend, _: Any) -> Any:
    """LangChain's RAG agent of one call: a middleware retrieves and writes the system prompt."""

    @dynamic_prompt
    def with_context(request: ModelRequest) -> str:
        return "Use only this:\n\n" + "\n\n".join(d.page_content for d in documents())

    return create_agent(llm, tools=[], middleware=[with_context]).invoke(
        {"messages": [HumanMessage(QUESTION)]}
    )


def tool_text(llm: ChatCacheBlend, _: Any) -> Any:
    found = create_retriever_tool(AsRetriever(), "search", "searches").invoke({"query": QUESTION})
    return llm.invoke(f"{found}\n\n{QUESTION}")


def retrieval_qa(kind: str) -> Chain:
    def run(_: ChatCacheBlend, llm: CacheBlendLLM) -> Any:
        chain = RetrievalQA.from_chain_type(llm, chain_type=kind, retriever=AsRetriever())
        return chain.invoke({"query": QUESTION})

    return run


CHAINS: dict[str, Chain] = {
    "stuff": stuff,
    "stuff with metadata": stuff_with_metadata,
    "retrieval chain, streaming": retrieval_chain,
    "history-aware retriever": history_aware,
    "LCEL, streaming": lcel,
    "agent with retrieving middleware": agent,
    "retriever tool's text": tool_text,
    "RetrievalQA stuff": retrieval_qa("stuff"),
    "RetrievalQA refine": retrieval_qa("refine"),
}
