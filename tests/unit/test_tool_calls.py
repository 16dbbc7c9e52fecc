"""Calls of tools and reasoning: scripted answers, read by vLLM's real parsers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from chat_models import MISTRAL_FILES, server_chat, with_tekken, with_template, with_tools
from fake_engine import fake_blend, sent
from scripted import NAMES, THOUGHT, TIMETABLE, call, says

from cacheblend_rag import BlendResult, CacheBlend, ConfigError, PromptError
from cacheblend_rag.engine.base import ParserNames
from cacheblend_rag.engine.parsers import check_can_call, check_names
from cacheblend_rag.tools import ToolCall, ToolCallPiece, joined, tool_use

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "When does the ferry leave?"}]
NAMED = {"type": "function", "function": {"name": "timetable"}}
NORTH = call(pier="north", day=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tools(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def blend(folder: Path) -> Iterator[CacheBlend]:
    with pytest.MonkeyPatch.context() as patch, fake_blend(patch, model=folder, **NAMES) as made:
        yield made


async def four_ways(blend: CacheBlend, **options: Any) -> list[BlendResult]:
    """The same answer by all four methods."""
    options = {"max_tokens": 200, **options}
    stream = blend.stream(ASKED, **options)
    told = "".join(stream)
    astream = blend.astream(ASKED, **options)
    atold = "".join([piece async for piece in astream])
    whole = blend.generate(ASKED, **options)
    assert told == atold == whole.text
    return [whole, stream.result, await blend.agenerate(ASKED, **options), astream.result]


def calls_of(result: BlendResult) -> list[tuple[str, Any]]:
    assert all(found.id for found in result.tool_calls)
    return [(found.name, found.kwargs()) for found in result.tool_calls]


# ---- what comes of an answer ---------------------------------------------------------------------


async def test_a_call(blend: CacheBlend) -> None:
    says(blend, NORTH)
    for result in await four_ways(blend, tools=[TIMETABLE]):
        assert calls_of(result) == [("timetable", {"pier": "north", "day": 3})]
        assert (result.text, result.reasoning) == ("", "")
        assert result.finish_reason == "tool_calls"
        assert blend.tokenizer.decode(list(result.token_ids)) == NORTH


async def test_thoughts_words_and_two_calls(blend: CacheBlend) -> None:
    says(blend, f"{THOUGHT}Let me look.\n{NORTH}\n{call(pier='south')}")
    for result in await four_ways(blend, tools=[TIMETABLE]):
        assert [kwargs["pier"] for _, kwargs in calls_of(result)] == ["north", "south"]
        assert len({found.id for found in result.tool_calls}) == 2
        assert result.reasoning.strip() == "The user wants a time."
        assert result.text.strip() == "Let me look."


async def test_thoughts_alone_are_apart_without_tools(blend: CacheBlend) -> None:
    says(blend, THOUGHT + "At ten.")
    for result in await four_ways(blend):
        assert (result.text.strip(), result.tool_calls) == ("At ten.", ())
        assert result.reasoning.strip() == "The user wants a time."
        assert result.finish_reason == "stop"


def test_a_call_comes_bit_by_bit(blend: CacheBlend) -> None:
    says(blend, NORTH)
    stream = blend.stream(ASKED, tools=[TIMETABLE], max_tokens=200)
    for _ in stream:
        pass
    pieces = [piece for output in stream.pieces for piece in output.tool_calls]
    assert len(pieces) > 4
    assert (pieces[0].name, bool(pieces[0].id)) == ("timetable", True)
    assert {piece.number for piece in pieces} == {0}
    assert json.loads("".join(piece.arguments for piece in pieces)) == {"pier": "north", "day": 3}


def test_an_answer_that_is_cut_off(blend: CacheBlend) -> None:
    says(blend, NORTH)
    whole = len(blend.generate(ASKED, tools=[TIMETABLE], max_tokens=200).token_ids)
    cut = blend.generate(ASKED, tools=[TIMETABLE], max_tokens=whole - 4)
    assert cut.finish_reason == "length"
    [found] = cut.tool_calls
    assert found.kwargs() is None
    assert found.arguments.startswith('{"pier": "north"')


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_choice_holds_decoding_to_calls(blend: CacheBlend, choice: Any) -> None:
    says(blend, NORTH)
    for result in await four_ways(blend, tools=[TIMETABLE], tool_choice=choice):
        assert calls_of(result) == [("timetable", {"pier": "north", "day": 3})]
        assert result.finish_reason == ("tool_calls" if choice == "required" else "stop")
    held = sent(blend)[-1].sampling["structured_outputs"]
    assert "timetable" in str(held.structural_tag or held.json)


async def test_no_choice_is_no_call(blend: CacheBlend) -> None:
    says(blend, NORTH)
    for result in await four_ways(blend, tools=[TIMETABLE], tool_choice="none"):
        assert (result.text, result.tool_calls) == (NORTH, ())


async def test_one_call_at_a_time(blend: CacheBlend) -> None:
    says(blend, f"{NORTH}\n{call(pier='south')}")
    for result in await four_ways(blend, tools=[TIMETABLE], parallel_tool_calls=False):
        assert [kwargs["pier"] for _, kwargs in calls_of(result)] == ["north"]


def test_several_prompts_are_read_each_by_its_own_parser(blend: CacheBlend) -> None:
    says(blend, NORTH)
    results = blend.generate([ASKED, ASKED, ASKED], tools=[TIMETABLE], max_tokens=200)
    assert [calls_of(r) for r in results] == [[("timetable", {"pier": "north", "day": 3})]] * 3


def test_the_engine_is_told_where_reasoning_ends(blend: CacheBlend) -> None:
    """It holds an answer to a form from there on: thoughts are free."""
    held = {"structured_outputs": {"json": {"type": "object"}}}
    blend.generate(ASKED, **held)
    assert sent(blend)[-1].reasoning["reasoning_ended"] is False
    silent = {"enable_thinking": False}
    blend.generate(ASKED, chat_template_kwargs=silent, **held)
    about = sent(blend)[-1].reasoning
    assert about["reasoning_ended"] is True
    assert about["reasoning_parser_kwargs"]["chat_template_kwargs"]["enable_thinking"] is False


def test_without_parsers_an_answer_is_what_the_model_wrote(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = fake_blend(monkeypatch, model=folder)
    says(blend, THOUGHT + NORTH)
    result = blend.generate(ASKED, max_tokens=200)
    assert (result.text, result.reasoning, result.tool_calls) == (THOUGHT + NORTH, "", ())
    assert "skip_special_tokens" not in sent(blend)[-1].sampling


# ---- the prompt ----------------------------------------------------------------------------------

CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "timetable", "arguments": '{"pier": "north"}'},
        }
    ],
}
TOLD = {"role": "tool", "tool_call_id": "abcdefghi", "content": '["10:00"]'}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": ASKED,
    "system": [{"role": "system", "content": "Be brief."}, *ASKED],
    "called": [*ASKED, CALLED, TOLD],
    "answered": [*ASKED, CALLED, TOLD, {"role": "assistant", "content": "At ten."}, *ASKED],
}


@pytest.mark.parametrize("choice", [None, "auto", "required", "none", NAMED], ids=str)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_vllm_s_server(blend: CacheBlend, name: str, choice: Any) -> None:
    says(blend, NORTH)
    asked, tools = CONVERSATIONS[name], {"tools": [TIMETABLE], "tool_choice": choice}
    expected = server_chat(Path(blend.info.model), asked, tools)
    assert expected != blend.tokenize(asked)
    for mode in ("blend", "full", "off"):
        result = blend.generate(asked, mode=mode, max_tokens=200, **tools)
        assert result.prompt_token_ids == expected == sent(blend)[-1].token_ids
    assert blend.tokenize(asked, **tools) == expected
    text = blend.tokenizer.decode(list(expected))
    assert '"name": "timetable", "description": "Departures from a pier."' in text


def test_calls_and_thoughts_of_before_are_in_the_prompt(blend: CacheBlend) -> None:
    thought = [*ASKED, {**CALLED, "reasoning": "They want a time."}, TOLD]
    for tools in ({}, {"tools": [TIMETABLE]}):
        ids = blend.tokenize(thought, **tools)
        assert ids == server_chat(Path(blend.info.model), thought, tools)
        text = blend.tokenizer.decode(list(ids))
        assert "<think>\nThey want a time.\n</think>" in text
        assert '{"name": "timetable", "arguments": {"pier": "north"}}</tool_call>' in text
        assert '<tool_response>["10:00"]</tool_response>' in text


def test_arguments_of_the_template_reach_it_beside_tools(blend: CacheBlend) -> None:
    silent = {"enable_thinking": False}
    tools = {"tools": [TIMETABLE]}
    ids = blend.tokenize(ASKED, chat_template_kwargs=silent, **tools)
    assert ids == server_chat(Path(blend.info.model), ASKED, tools, **silent)
    assert ids != blend.tokenize(ASKED, **tools)
    with pytest.raises(ConfigError, match="no argument 'enable_thinkin'"):
        blend.generate(ASKED, chat_template_kwargs={"enable_thinkin": False}, **tools)


@pytest.mark.parametrize("tekken", MISTRAL_FILES)
def test_ids_of_mistral_s_own_tokenizer(
    tekken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_tekken(tmp_path, tekken)
    options = {"tokenizer_mode": "mistral", "tool_call_parser": "mistral"}
    blend = fake_blend(monkeypatch, model=folder, **options)
    tools = {"tools": [TIMETABLE]}
    for name in ("one", "called", "answered"):
        expected = server_chat(folder, CONVERSATIONS[name], tools, "mistral", "mistral")
        assert blend.tokenize(CONVERSATIONS[name], **tools) == expected
        assert blend.generate(CONVERSATIONS[name], **tools).prompt_token_ids == expected


# ---- what is refused -----------------------------------------------------------------------------


def test_a_model_without_a_parser_says_how_to_name_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = fake_blend(monkeypatch, model=folder)
    for ask in (blend.generate, blend.stream):
        with pytest.raises(ConfigError, match=r"tool_call_parser.*--tool-call-parser.*hermes"):
            ask(ASKED, tools=[TIMETABLE])
    with pytest.raises(ConfigError, match="models of type llama, usually 'llama3_json'"):
        blend.generate(ASKED, tools=[TIMETABLE])
    none = blend.generate(ASKED, tools=[TIMETABLE], tool_choice="none")
    assert none.prompt_token_ids == blend.tokenize(ASKED, tools=[TIMETABLE])


def test_a_model_whose_chat_only_the_server_knows() -> None:
    with pytest.raises(ConfigError, match="gpt-oss has a chat format of its own"):
        check_can_call(ParserNames("openai", ""), None, "gpt_oss")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (ParserNames("hermess", ""), "tool_call_parser.*Did you mean 'hermes'"),
        (ParserNames("", "qwen33"), "reasoning_parser.*Did you mean 'qwen3'"),
    ],
)
def test_parsers_that_vllm_does_not_have(names: ParserNames, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_names(names)


def test_a_parser_of_ones_own(tmp_path: Path, folder: Path) -> None:
    plugin = tmp_path / "own_parser.py"
    plugin.write_text(
        "from vllm.tool_parsers import ToolParserManager\n"
        "from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser\n"
        "class Own(Hermes2ProToolParser): pass\n"
        "ToolParserManager.register_module('own_parser', module=Own)\n"
    )
    check_names(ParserNames("own_parser", ""), str(plugin))
    with pytest.MonkeyPatch.context() as patch:
        blend = fake_blend(patch, model=folder, tool_call_parser="own_parser")
        says(blend, NORTH)
        assert calls_of(blend.generate(ASKED, tools=[TIMETABLE], max_tokens=200))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": "timetable"}, "must be a list"),
        ({"tools": [{"name": "timetable"}]}, "tool 1 is"),
        ({"tools": [TIMETABLE, {"type": "code", "function": {"name": "a"}}]}, "tool 2 is"),
        ({"tool_choice": "required"}, "without tools"),
        ({"tools": [TIMETABLE], "tool_choice": "timetable"}, "must be one of none, auto"),
        (
            {"tools": [TIMETABLE], "tool_choice": {"function": {"name": "other"}}},
            "'other', and the tools are timetable",
        ),
        ({"tools": [TIMETABLE], "parallel_tool_calls": "no"}, "must be True or False"),
    ],
)
def test_tools_that_are_none(blend: CacheBlend, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        blend.generate(ASKED, **options)
    with pytest.raises(ConfigError, match=says):
        blend.astream(ASKED, **options)


def test_tools_need_messages(blend: CacheBlend) -> None:
    for prompt in ("When?", [1, 2, 3]):
        with pytest.raises(PromptError, match="pass chat messages"):
            blend.generate(prompt, tools=[TIMETABLE])
    with pytest.raises(ConfigError, match="no option 'tool'"):
        blend.tokenize(ASKED, tool=TIMETABLE)
    assert blend.tokenize(ASKED, tools=[], tool_choice="none") == blend.tokenize(ASKED)


def test_a_template_that_refuses_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if tools %}{{ raise_exception('No tools here') }}{% endif %}{{ messages }}"
    blend = fake_blend(monkeypatch, model=with_template(tmp_path, template), **NAMES)
    with pytest.raises(PromptError, match="No tools here"):
        blend.tokenize(ASKED, tools=[TIMETABLE])


# ---- pure ----------------------------------------------------------------------------------------


def test_pieces_make_up_calls() -> None:
    pieces = [
        ToolCallPiece(1, "b", "second", ""),
        ToolCallPiece(0, "a", "first", '{"x"'),
        ToolCallPiece(0, None, None, ": 1}"),
        ToolCallPiece(1, None, None, "[1]"),
    ]
    assert joined(pieces) == (ToolCall("a", "first", '{"x": 1}'), ToolCall("b", "second", "[1]"))
    assert joined([]) == ()
    assert [found.kwargs() for found in joined(pieces)] == [{"x": 1}, None]
    assert ToolCall("a", "none", "").kwargs() == {}


def test_later_changes_of_tools_are_not_seen() -> None:
    tools = [json.loads(json.dumps(TIMETABLE))]
    use = tool_use({"tools": tools})
    tools[0]["function"]["name"] = "other"
    assert use is not None
    assert use.tools == (TIMETABLE,)
    assert use.body() == {"tools": [TIMETABLE]}
