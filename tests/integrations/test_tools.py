"""Tools and reasoning in both frameworks: scripted answers, read by vLLM's real parsers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from chat_models import with_tools
from fake_engine import fake_blend, sent
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel
from scripted import NAMES, THOUGHT, call, says, script

from cacheblend_rag import CacheBlend, ConfigError, PromptError
from langchain_cacheblend import ChatCacheBlend
from llama_index_cacheblend import CacheBlendLLM

NORTH = call(pier="north", day=3)
THOUGHTS = "The user wants a time."
ARGUMENTS = {"pier": "north", "day": 3}


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheBlend]:
    folder = with_tools(tmp_path_factory.mktemp("tools"))
    with pytest.MonkeyPatch.context() as patch, fake_blend(patch, model=folder, **NAMES) as made:
        yield made


def agent_of(blend: CacheBlend) -> None:
    """The model asks the timetable, and then says what it was told."""

    def answer(prompt: str) -> str:
        asked = prompt.rpartition("<|im_start|>user\n")[2]
        return f"{THOUGHT}At ten." if "<tool_response>" in asked else THOUGHT + NORTH

    script(blend, answer)


def prompt_of(blend: CacheBlend) -> str:
    """The text of the last prompt."""
    return str(blend.tokenizer.decode(list(sent(blend)[-1].token_ids)))


# ---- LangChain -----------------------------------------------------------------------------------


@tool
def timetable(pier: str, day: int = 0) -> str:
    """Departures from a pier."""
    return json.dumps([f"{pier} 10:00", day])


@pytest.fixture
def chat(blend: CacheBlend) -> ChatCacheBlend:
    return ChatCacheBlend.from_engine(blend, max_tokens=200)


async def in_all_ways(model: Any, asked: Any) -> list[AIMessage]:
    pieces = list(model.stream(asked))
    apieces = [piece async for piece in model.astream(asked)]
    streamed, astreamed = pieces[0], apieces[0]
    for piece in pieces[1:]:
        streamed += piece
    for piece in apieces[1:]:
        astreamed += piece
    return [model.invoke(asked), await model.ainvoke(asked), streamed, astreamed]


async def test_langchain_calls_and_thoughts(chat: ChatCacheBlend, blend: CacheBlend) -> None:
    says(blend, THOUGHT + NORTH)
    for message in await in_all_ways(chat.bind_tools([timetable]), "When?"):
        [found] = message.tool_calls
        assert (found["name"], found["args"]) == ("timetable", ARGUMENTS)
        assert found["id"]
        assert message.additional_kwargs["reasoning_content"].strip() == THOUGHTS
        kinds = [block["type"] for block in message.content_blocks]
        assert {"reasoning", "tool_call"} <= set(kinds)
        assert THOUGHTS not in str(message.content)
        assert message.response_metadata["finish_reason"] == "tool_calls"
    says(blend, THOUGHT + "At ten.")
    for message in await in_all_ways(chat, "When?"):
        assert (str(message.text).strip(), message.tool_calls) == ("At ten.", [])
        assert message.additional_kwargs["reasoning_content"].strip() == THOUGHTS


@pytest.mark.parametrize(
    ("choice", "sent_choice"),
    [
        ("any", "required"),
        (True, "required"),
        ("timetable", {"type": "function", "function": {"name": "timetable"}}),
        ({"type": "function", "function": {"name": "timetable"}}, None),
    ],
)
def test_langchain_choices(
    chat: ChatCacheBlend, blend: CacheBlend, choice: Any, sent_choice: Any
) -> None:
    says(blend, NORTH)
    model = chat.bind_tools([timetable], tool_choice=choice)
    assert model.invoke("When?").tool_calls[0]["args"] == ARGUMENTS
    held = sent(blend)[-1].sampling["structured_outputs"]
    assert "timetable" in str(held.structural_tag or held.json)
    assert chat.options(None, {"tool_choice": choice})["tool_choice"] == (sent_choice or choice)


def test_langchain_refuses_what_is_no_tool(chat: ChatCacheBlend) -> None:
    with pytest.raises(ConfigError, match="no tool"):
        chat.bind_tools([3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="'other', and the tools are timetable"):
        chat.bind_tools([timetable], tool_choice="other").invoke("When?")


async def test_langchain_a_call_that_is_cut_off_is_invalid(
    chat: ChatCacheBlend, blend: CacheBlend
) -> None:
    says(blend, NORTH)
    for message in (
        chat.bind_tools([timetable], max_tokens=16).invoke("When?"),
        await chat.bind_tools([timetable], max_tokens=16).ainvoke("When?"),
    ):
        assert message.tool_calls == []
        [found] = message.invalid_tool_calls
        assert found["name"] == "timetable"
        assert message.response_metadata["finish_reason"] == "length"


@pytest.mark.parametrize("version", ["v0", "v1"])
async def test_langchain_an_agent(blend: CacheBlend, version: str) -> None:
    agent_of(blend)
    model = ChatCacheBlend.from_engine(blend, max_tokens=200, output_version=version)
    agent: Any = create_agent(model, [timetable])
    asked = {"messages": [HumanMessage("When does the ferry leave?")]}
    for found in (agent.invoke(asked), await agent.ainvoke(asked)):
        kinds = [type(message) for message in found["messages"]]
        assert kinds == [HumanMessage, AIMessage, ToolMessage, AIMessage]
        assert str(found["messages"][-1].text).strip() == "At ten."
    prompt = prompt_of(blend)
    assert f"<think>\n{THOUGHTS}" in prompt.replace("\n\n", "\n")
    assert '<tool_call>{"name": "timetable", "arguments": {"pier": "north", "day": 3}}' in prompt
    assert '<tool_response>["north 10:00", 3]</tool_response>' in prompt


# ---- LlamaIndex ----------------------------------------------------------------------------------


def departures(pier: str, day: int = 0) -> str:
    """Departures from a pier."""
    return json.dumps([f"{pier} 10:00", day])


TOOLS = [FunctionTool.from_defaults(departures, name="timetable")]


@pytest.fixture
def llm(blend: CacheBlend) -> CacheBlendLLM:
    return CacheBlendLLM.from_engine(blend, max_tokens=200)


async def test_llama_index_calls_and_thoughts(llm: CacheBlendLLM, blend: CacheBlend) -> None:
    says(blend, f"{THOUGHT}Look.{NORTH}")
    assert llm.metadata.is_function_calling_model
    streamed = list(llm.stream_chat_with_tools(TOOLS, "When?"))
    astream = await llm.astream_chat_with_tools(TOOLS, "When?")
    astreamed = [response async for response in astream]
    whole = [llm.chat_with_tools(TOOLS, "When?"), await llm.achat_with_tools(TOOLS, "When?")]
    for response in (*whole, streamed[-1], astreamed[-1]):
        kinds = [type(block) for block in response.message.blocks]
        assert kinds == [ThinkingBlock, TextBlock, ToolCallBlock]
        thought: Any = response.message.blocks[0]
        assert thought.content.strip() == THOUGHTS
        assert (response.message.content or "").strip() == "Look."
        [found] = llm.get_tool_calls_from_response(response)
        assert (found.tool_name, found.tool_kwargs) == ("timetable", ARGUMENTS)
        assert found.tool_id
    parts = [llm.get_tool_calls_from_response(r, error_on_no_tool_call=False) for r in streamed]
    arguments = [found[0].tool_kwargs for found in parts if found]
    assert arguments[0] != arguments[-1] == ARGUMENTS
    thoughts = "".join(r.additional_kwargs.get("thinking_delta", "") for r in streamed)
    assert thoughts.strip() == THOUGHTS
    assert "".join(r.delta or "" for r in streamed).strip() == "Look."
    assert llm.predict_and_call(TOOLS, "When?").response == '["north 10:00", 3]'


async def test_llama_index_thoughts_of_completions(llm: CacheBlendLLM, blend: CacheBlend) -> None:
    says(blend, THOUGHT + "At ten.")
    stream = await llm.astream_complete("When?")
    last = [response async for response in stream][-1]
    for response in (llm.complete("When?"), await llm.acomplete("When?"), last):
        assert response.text.strip() == "At ten."
        assert response.additional_kwargs["thinking"].strip() == THOUGHTS


def test_llama_index_choices(llm: CacheBlendLLM, blend: CacheBlend) -> None:
    says(blend, NORTH)
    for more in ({"tool_required": True}, {"tool_choice": "timetable"}, {"tool_choice": "any"}):
        llm.chat_with_tools(TOOLS, "When?", **more)
        held = sent(blend)[-1].sampling["structured_outputs"]
        assert "timetable" in str(held.structural_tag or held.json)
    llm.chat_with_tools(TOOLS, "When?", allow_parallel_tool_calls=True)
    assert "structured_outputs" not in sent(blend)[-1].sampling
    says(blend, f"{NORTH}\n{call(pier='south')}")
    both = llm.chat_with_tools(TOOLS, "When?", allow_parallel_tool_calls=True)
    assert len(llm.get_tool_calls_from_response(both)) == 2
    one = llm.chat_with_tools(TOOLS, "When?")
    assert len(llm.get_tool_calls_from_response(one)) == 1


def test_llama_index_answers_that_hold_no_call(llm: CacheBlendLLM, blend: CacheBlend) -> None:
    says(blend, f"{THOUGHT}At ten.")
    response = llm.chat_with_tools(TOOLS, "When?")
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="called no tool"):
        llm.get_tool_calls_from_response(response)
    says(blend, NORTH)
    cut = llm.chat_with_tools(TOOLS, "When?", max_tokens=16)
    with pytest.raises(ValueError, match="raise max_tokens"):
        llm.get_tool_calls_from_response(cut)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex's own
@pytest.mark.parametrize("streaming", [False, True])
async def test_llama_index_an_agent(llm: CacheBlendLLM, blend: CacheBlend, streaming: bool) -> None:
    agent_of(blend)
    agent = FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming)
    found = await agent.run("When does the ferry leave?")
    assert str(found).strip() == "At ten."
    prompt = prompt_of(blend)
    assert f"<think>\n{THOUGHTS}" in prompt.replace("\n\n", "\n")
    assert '<tool_call>{"name": "timetable", "arguments": {"pier": "north", "day": 3}}' in prompt
    assert '<tool_response>["north 10:00", 3]</tool_response>' in prompt


class Departure(BaseModel):
    """When a ferry leaves."""

    pier: str
    day: int


def test_llama_index_structured_output_by_a_call(blend: CacheBlend) -> None:
    says(blend, call("Departure", pier="north", day=3))
    mode = PydanticProgramMode.FUNCTION
    llm = CacheBlendLLM.from_engine(blend, max_tokens=200, pydantic_program_mode=mode)
    found = llm.structured_predict(Departure, PromptTemplate("When?"))
    assert found == Departure(pier="north", day=3)


def test_llama_index_refuses_calls_of_other_llms(llm: CacheBlendLLM) -> None:
    other = ChatMessage(role=MessageRole.ASSISTANT, additional_kwargs={"tool_calls": [object()]})
    with pytest.raises(PromptError, match="ToolCallBlock"):
        llm.chat([ChatMessage("When?"), other])


def test_llama_index_prompts_of_ones_own_call_no_tools(blend: CacheBlend) -> None:
    own = CacheBlendLLM.from_engine(blend, messages_to_prompt=str)
    assert not own.metadata.is_function_calling_model
    with pytest.raises(PromptError, match="pass chat messages"):
        own.chat_with_tools(TOOLS, "When?")
