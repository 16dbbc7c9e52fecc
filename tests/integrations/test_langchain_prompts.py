"""LangChain's prompts reach the engine unchanged, and the chunks in them are found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import MODEL, FakeEngine, index_of, plans, sent
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_matrix import CHAINS, document_prompt, documents

from langchain_cacheblend import CacheBlendIngestion, CacheBlendLLM, ChatCacheBlend


@pytest.fixture
def llm(engines: list[FakeEngine]) -> Iterator[ChatCacheBlend]:
    with ChatCacheBlend(model=str(MODEL)) as made:
        yield made


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
@pytest.mark.parametrize("name", CHAINS)
def test_chunks_are_found(name: str, llm: ChatCacheBlend) -> None:
    ingestion = CacheBlendIngestion(llm, document_prompt=document_prompt(name), show_progress=False)
    assert list(ingestion.transform_documents(documents())) == documents()
    blend = llm.blend

    CHAINS[name](llm, CacheBlendLLM(engine=llm.engine))

    found = sum(
        match.end - match.start
        for request in sent(blend)
        for match in index_of(blend).locate(request.token_ids)
    )
    total = sum(len(llm.get_token_ids(ingestion.text_of(d).strip())) for d in documents())
    assert 0.99 <= found / total <= 1
    assert plans(blend)[-1] is not None


def test_messages_become_what_the_template_makes_of_them(llm: ChatCacheBlend) -> None:
    messages: list[BaseMessage] = [HumanMessage("One"), AIMessage("Two\n"), HumanMessage(" Three ")]
    llm.invoke(messages)
    plain = [("user", "One"), ("assistant", "Two\n"), ("user", " Three ")]
    expected = llm.blend.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in plain],
        tokenize=False,
        add_generation_prompt=True,
    )
    [request] = sent(llm.blend)
    assert llm.blend.tokenizer.decode(request.token_ids) == expected


def test_text_goes_in_as_it_is(llm: ChatCacheBlend) -> None:
    completion = CacheBlendLLM(engine=llm.engine)
    assert completion.invoke("Once upon a time") == "A short answer."
    [request] = sent(llm.blend)
    assert llm.blend.tokenizer.decode(request.token_ids) == "Once upon a time"
