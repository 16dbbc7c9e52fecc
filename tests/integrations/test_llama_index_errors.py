"""What our engine refuses is raised by LlamaIndex's engines: no answer over part of the context."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from llama_index.core import get_response_synthesizer
from llama_index.core.agent.workflow import ReActAgent
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.schema import BaseNode, NodeWithScore, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool
from llama_matrix import QUESTION, Retrieve, engine, split
from pydantic import BaseModel

from cacheblend_rag import CacheBlendError, ConfigError, PromptError, PromptTooLongError
from llama_index_cacheblend import CacheBlendLLM

THAI = "เรือข้ามฟากเที่ยวสุดท้ายออกเวลายี่สิบสองนาฬิกา " * 30  # tiktoken counts half of our tokens
STREAMS = ("compact", "refine", "tree_summarize", "simple_summarize")
MODES = (*STREAMS, "accumulate", "compact_accumulate")
# sampling of the LLM, the question, and the error
REFUSED: dict[str, tuple[dict[str, Any], str, type[CacheBlendError]]] = {
    "unknown option": ({"temperatur": 0.5}, QUESTION, ConfigError),
    "several answers": ({"n": 2}, QUESTION, ConfigError),
    "wrong type": ({"top_p": "much"}, QUESTION, ConfigError),
    "lone surrogate": ({}, "caf\udce9?", PromptError),
}


class Answer(BaseModel):
    """An answer."""

    text: str


def model(**fields: Any) -> CacheBlendLLM:
    return CacheBlendLLM(model=str(MODEL), engine_args={"max_model_len": 2048}, **fields)


def scored(nodes: Sequence[BaseNode]) -> list[NodeWithScore]:
    return [NodeWithScore(node=node, score=1.0) for node in nodes]


async def drained(asked: Awaitable[Any], name: str) -> list[str]:
    """The pieces of a streamed answer."""
    pieces = getattr(await asked, name)
    return [piece async for piece in (pieces() if callable(pieces) else pieces)]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("mode", MODES)
async def test_every_response_mode_raises(mode: str, name: str, engines: list[FakeEngine]) -> None:
    sampling, question, error = REFUSED[name]
    llm, nodes = model(sampling=sampling), scored(split()[:3])
    for options in ({}, {"use_async": True}, {"output_cls": Answer}):
        if "output_cls" in options and "accumulate" in mode:
            continue
        synthesizer = get_response_synthesizer(llm=llm, response_mode=mode, **options)  # type: ignore[arg-type]
        with pytest.raises(error):
            synthesizer.synthesize(question, nodes)
        with pytest.raises(error):
            await synthesizer.asynthesize(question, nodes)
    if mode in STREAMS:
        streaming = get_response_synthesizer(llm=llm, response_mode=mode, streaming=True)  # type: ignore[arg-type]
        with pytest.raises(error):
            list(streaming.synthesize(question, nodes).response_gen)  # type: ignore[union-attr]
        with pytest.raises(error):
            await drained(streaming.asynthesize(question, nodes), "response_gen")


@pytest.mark.parametrize("mode", MODES)
async def test_no_answer_leaves_out_what_was_too_long(mode: str, engines: list[FakeEngine]) -> None:
    llm = model()
    nodes = scored([*split()[:1], *(TextNode(text=f"{i} {THAI}") for i in range(4))])
    synthesizer = get_response_synthesizer(llm=llm, response_mode=mode)  # type: ignore[arg-type]
    with pytest.raises(PromptTooLongError, match="Retrieve fewer"):
        synthesizer.synthesize(QUESTION, nodes)
    with pytest.raises(PromptTooLongError):
        await synthesizer.asynthesize(QUESTION, nodes)


# --- engines over engines -------------------------------------------------------------------------


def tool(llm: CacheBlendLLM) -> QueryEngineTool:
    return QueryEngineTool.from_defaults(engine(llm, split()[:2]), name="docs", description="x")


def test_a_router_raises(engines: list[FakeEngine]) -> None:
    good = model()
    bad = CacheBlendLLM(engine=good.engine, sampling={"temperatur": 0.5})
    selector = LLMSingleSelector.from_defaults(llm=bad)
    with pytest.raises(ConfigError):
        RouterQueryEngine(selector, [tool(good)], llm=good).query(QUESTION)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # raised twice
@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
async def test_chat_engines_raise(kind: Any, engines: list[FakeEngine]) -> None:
    bad = model(sampling={"temperatur": 0.5})
    chat = kind.from_defaults(retriever=Retrieve(split()[:2]), llm=bad)
    with pytest.raises(ConfigError):
        chat.chat(QUESTION)
    with pytest.raises(ConfigError):
        await chat.achat(QUESTION)
    with pytest.raises(ConfigError):
        list(chat.stream_chat(QUESTION).response_gen)
    with pytest.raises(ConfigError):
        await drained(chat.astream_chat(QUESTION), "async_response_gen")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's own
async def test_an_agent_and_structured_answers_raise(engines: list[FakeEngine]) -> None:
    bad = model(sampling={"temperatur": 0.5})
    with pytest.raises(ConfigError):
        await ReActAgent(tools=[tool(bad)], llm=bad).run(QUESTION)
    with pytest.raises(ConfigError):
        bad.structured_predict(Answer, PromptTemplate("When?"))
    with pytest.raises(ConfigError):
        list(bad.stream_structured_predict(Answer, PromptTemplate("When?")))
