"""Calls of tools and reasoning over HTTP: what comes is what comes without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")
from chat_models import with_tools
from fake_engine import fake_blend
from fake_server import FakeServer, Fault, serving
from langchain_core.messages import AIMessageChunk
from llama_index.core.tools import FunctionTool
from scripted import NAMES, THOUGHT, TIMETABLE, call, says
from vllm.sampling_params import SamplingParams

from cacheblend_rag import BlendResult, CacheBlend, ConfigError, PromptError, ServerError
from cacheblend_rag.client.failures import pause
from cacheblend_rag.client.http import checked_retries
from cacheblend_rag.shared import SharedEngine
from langchain_cacheblend import ChatCacheBlend
from llama_index_cacheblend import CacheBlendLLM

ASKED: Any = [{"role": "user", "content": "When does the ferry leave?"}]
NORTH = call(pier="north", day=3)
SAID = {
    "call": NORTH,
    "thought": THOUGHT + "At ten.",
    "all": f"{THOUGHT}Look.\n{NORTH}\n{NORTH}",
}


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheBlend]:
    folder = with_tools(tmp_path_factory.mktemp("tools"))
    with pytest.MonkeyPatch.context() as patch, fake_blend(patch, model=folder, **NAMES) as blend:
        yield blend


@pytest.fixture(scope="module")
def server(behind: CacheBlend) -> Iterator[FakeServer]:
    with serving(behind) as found:
        yield found
    SharedEngine.close_all()


@pytest.fixture
def remote(server: FakeServer) -> Iterator[CacheBlend]:
    server.reset()
    with CacheBlend.connect(server.url, timeout=20) as blend:
        yield blend


def told(result: BlendResult) -> Any:
    """What is the same in every run: calls have ids of their own."""
    calls = [(found.name, found.arguments) for found in result.tool_calls]
    assert len({found.id for found in result.tool_calls} - {""}) == len(calls)
    plain = replace(result, report=None, request_id="", tool_calls=())  # type: ignore[arg-type]
    return plain, calls


async def four_ways(blend: CacheBlend, **options: Any) -> list[Any]:
    stream = blend.stream(ASKED, **options)
    pieces = [(p.text, p.reasoning, p.token_ids) for p in (stream.pieces[-1] for _ in stream)]
    astream = blend.astream(ASKED, **options)
    apieces = [(p.text, p.reasoning, p.token_ids) async for p in _pieces(astream)]
    assert pieces == apieces
    whole = [blend.generate(ASKED, **options), await blend.agenerate(ASKED, **options)]
    return [pieces, *map(told, [stream.result, astream.result, *whole])]


async def _pieces(stream: Any) -> Any:
    async for _ in stream:
        yield stream.pieces[-1]


@pytest.mark.parametrize("choice", [None, "required", "none"])
@pytest.mark.parametrize("kind", SAID)
async def test_answers_are_those_without_a_server(
    remote: CacheBlend, behind: CacheBlend, kind: str, choice: str | None
) -> None:
    says(behind, SAID[kind])
    options = {"tools": [TIMETABLE], "tool_choice": choice, "max_tokens": 200, "logprobs": 1}
    assert await four_ways(remote, **options) == await four_ways(behind, **options)


async def test_thoughts_alone(remote: CacheBlend, behind: CacheBlend, server: FakeServer) -> None:
    says(behind, THOUGHT + "At ten.")
    silent = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 200}
    for options in ({"max_tokens": 200}, silent):
        assert await four_ways(remote, **options) == await four_ways(behind, **options)
    assert server.bodies[-1]["messages"] == ASKED
    text = remote.generate("When?", max_tokens=200)  # no chat: nothing is read
    assert text.text == THOUGHT + "At ten."
    assert "prompt" in server.bodies[-1]


async def test_an_answer_is_as_long_as_without_a_server_where_nobody_says(
    remote: CacheBlend, behind: CacheBlend, server: FakeServer
) -> None:
    default = SamplingParams().max_tokens
    for asked, more in ((ASKED, {"tools": [TIMETABLE]}), (ASKED, {}), ("When?", {})):
        given: Any = more
        remote.generate(asked, **given)
        assert server.bodies[-1].get("max_tokens", default) == default
        assert ("messages" not in server.bodies[-1]) or "max_tokens" in server.bodies[-1]
    remote.generate(ASKED, max_tokens=None)
    assert server.bodies[-1]["max_tokens"] > 200


def test_ids_and_reports(remote: CacheBlend, behind: CacheBlend, server: FakeServer) -> None:
    says(behind, NORTH)
    tools: Any = {"tools": [TIMETABLE]}
    assert remote.parsers == behind.parsers == ("hermes", "qwen3")
    assert remote.tokenize(ASKED, **tools) == behind.tokenize(ASKED, **tools)
    result = remote.generate(ASKED, mode="full", max_tokens=200, **tools)
    assert result.prompt_token_ids == behind.tokenize(ASKED, **tools)
    assert result.report.reason == "mode"
    assert server.bodies[-1]["kv_transfer_params"] == {"cacheblend": {"mode": "full"}}


def test_a_server_without_parsers_says_how_to_start_one_with(
    remote: CacheBlend, behind: CacheBlend, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = behind.engine
    monkeypatch.setattr(engine.chat, "parsers", type(behind.parsers)())
    with CacheBlend.connect(server.url) as plain:
        with pytest.raises(ConfigError, match="serve MODEL --enable-auto-tool-choice --tool-call"):
            plain.generate(ASKED, tools=[TIMETABLE])
        assert plain.generate(ASKED, tools=[TIMETABLE], tool_choice="none").text
        with pytest.raises(PromptError, match="pass chat messages"):  # as without a server
            plain.generate("When?", tools=[TIMETABLE])
    with pytest.raises(PromptError, match="pass chat messages"):
        remote.generate("When?", tools=[TIMETABLE])
    with pytest.raises(ConfigError, match="must be a list"):
        remote.tokenize(ASKED, tools="timetable")  # type: ignore[arg-type]


# ---- the frameworks ------------------------------------------------------------------------------


def timetable(pier: str, day: int = 0) -> str:
    """Departures from a pier."""
    return f"{pier} {day}"


async def test_langchain(server: FakeServer, behind: CacheBlend) -> None:
    says(behind, THOUGHT + NORTH)
    model = ChatCacheBlend(url=server.url, max_tokens=200).bind_tools([timetable])
    whole = model.invoke("When?")
    full: Any = None
    async for piece in model.astream("When?"):
        assert isinstance(piece, AIMessageChunk)
        full = piece if full is None else full + piece
    for message in (whole, await model.ainvoke("When?"), full):
        [found] = message.tool_calls
        assert (found["name"], found["args"]) == ("timetable", {"pier": "north", "day": 3})
        assert message.additional_kwargs["reasoning_content"].strip() == "The user wants a time."


async def test_llama_index(server: FakeServer, behind: CacheBlend) -> None:
    says(behind, THOUGHT + NORTH)
    llm, tools = (
        CacheBlendLLM(url=server.url, max_tokens=200),
        [FunctionTool.from_defaults(timetable)],
    )
    assert llm.metadata.is_function_calling_model
    answers = [llm.chat_with_tools(tools, "When?"), await llm.achat_with_tools(tools, "When?")]
    for response in answers:
        [found] = llm.get_tool_calls_from_response(response)
        assert (found.tool_name, found.tool_kwargs) == ("timetable", {"pier": "north", "day": 3})
    assert llm.predict_and_call(tools, "When?").response == "north 3"


# ---- how often a call is tried again -------------------------------------------------------------


def test_retries_are_as_many_as_asked_for(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cacheblend_rag.client.failures._FIRST_WAIT_S", 0.001)
    for retries in (0, 1, 4):
        server.reset()
        chat = ChatCacheBlend(url=server.url, max_retries=retries)
        server.next("/completions", *[Fault(429)] * retries)
        assert chat.invoke("Hello").content is not None
        server.next("/completions", *[Fault(429)] * (retries + 1))
        with pytest.raises(ServerError, match="busy"):
            chat.invoke("Hello")
    busy = httpx.Response(429)
    assert 0 < (pause(8, busy, False, 9) or 0) <= 30.0
    assert pause(9, busy, False, 9) is None
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="max_retries"):
            checked_retries(wrong)


async def test_what_is_for_a_server_is_refused_without_one() -> None:
    for kind in (ChatCacheBlend, CacheBlendLLM):
        for name, value in {"api_key": "sk-1", "max_retries": 1}.items():
            given: Any = {name: value}
            with pytest.raises(ConfigError, match=f"{name} was given without url"):
                kind("some/model", **given)
    with pytest.raises(ConfigError, match="timeout is for a server"):
        CacheBlendLLM("some/model", timeout=3)
    await asyncio.sleep(0)
