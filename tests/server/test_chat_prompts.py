"""Chat prompts of a server's clients are those of its own chat endpoint, whatever its options."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_models import MISTRAL_FILES, NO_SYSTEM, THINKING_HEAD, TOOLS, with_tekken, with_template
from fake_engine import MODEL, renderer

from cacheblend_rag.engine.base import ParserNames
from cacheblend_rag.errors import ConfigError, PromptError, PromptTooLongError
from cacheblend_rag.tools import tool_use

pytest.importorskip("vllm")

from cacheblend_rag.engine.served_chat import ServedChat

# as templates of models that take images: what a message says is a list
PARTS = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}[{{ part['text'] }}]{% endfor %}<|im_end|>
{% endfor %}<|im_start|>assistant\n"""
ASKED = [{"role": "user", "content": "When does the ferry leave?"}]
TALK = [
    {"role": "user", "content": "One "},
    {"role": "assistant", "content": "Two\n"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALLED = [
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "weather",
             "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "content": "Rain"},
]  # fmt: skip


class Server:
    """vLLM's own chat endpoint and tokenisation, over an engine that only notes its prompts."""

    def __init__(self, folder: Path, mode: str = "auto", **options: Any) -> None:
        from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
        from vllm.entrypoints.openai.models.protocol import BaseModelPath
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
        from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
        from vllm.renderers.online_renderer import OnlineRenderer

        vllm = renderer(str(folder), mode)
        self.noted: list[list[int]] = []
        client: Any = SimpleNamespace(
            model_config=vllm.model_config,
            renderer=vllm,
            input_processor=None,
            errored=False,
            check_admission=lambda n: None,
            generate=self._generate,
        )
        models = OpenAIServingModels(client, [BaseModelPath(name="m", model_path="m")])
        common: dict[str, Any] = {
            "chat_template": None,
            "chat_template_content_format": "auto",
            "request_logger": None,
        }
        ours = {n: v for n, v in options.items() if n in _OF_TOKENISATION}
        online = OnlineRenderer(vllm.model_config, vllm, **common | options)
        self.tokenisation = ServingTokenization(models, online, **common | ours)
        self.chat = OpenAIServingChat(
            client, models, "assistant", online_renderer=online, **common | options
        )
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.ours = ServedChat(online, self.run, ParserNames())

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        waiting: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return waiting.result(60)

    async def _generate(self, prompt: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
        self.noted.append(list(prompt["prompt_token_ids"]))
        raise _Noted
        yield

    def answered(self, **body: Any) -> list[int]:
        """The prompt that its chat endpoint has computed for a request."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        with pytest.raises(_Noted):
            self.run(self.chat.create_chat_completion(ChatCompletionRequest(**body)))
        return self.noted.pop()

    def tokenised(self, **body: Any) -> list[int]:
        """The same by vLLM's own ``/tokenize``."""
        from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

        request: Any = SimpleNamespace(headers={})
        found = self.run(self.tokenisation.create_tokenize(TokenizeChatRequest(**body), request))
        return list(found.tokens)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)


_OF_TOKENISATION = (
    "chat_template",
    "chat_template_content_format",
    "default_chat_template_kwargs",
    "trust_request_chat_template",
)


class _Noted(Exception):
    """The prompt is all that is wanted."""


@pytest.fixture
def serving() -> Iterator[Any]:
    made: list[Server] = []

    def start(*args: Any, **options: Any) -> Server:
        made.append(Server(*args, **options))
        return made[-1]

    yield start
    for server in made:
        server.close()


def same(
    server: Server, messages: list[dict[str, Any]], arguments: Mapping[str, Any], **tools: Any
) -> tuple[int, ...]:
    """The ids of all three, which are the same."""
    body: dict[str, Any] = {"messages": copy.deepcopy(messages), **tools}
    if arguments:
        body["chat_template_kwargs"] = dict(arguments)
    found = server.ours.render(messages, arguments, tools=tool_use(tools))
    assert list(found) == server.answered(**copy.deepcopy(body))
    if tools.get("tool_choice") != "none":  # vLLM's own /tokenize shows such tools in any case
        tokenised = {name: value for name, value in body.items() if name != "tool_choice"}
        assert list(found) == server.tokenised(**tokenised)
    return found


@pytest.mark.parametrize("messages", [ASKED, TALK], ids=["one", "several"])
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"chat_template": THINKING_HEAD}, {}),
        ({"chat_template": THINKING_HEAD}, {"enable_thinking": True}),
        (
            {
                "chat_template": THINKING_HEAD,
                "default_chat_template_kwargs": {"enable_thinking": True},
            },
            {},
        ),
        (
            {
                "chat_template": THINKING_HEAD,
                "default_chat_template_kwargs": {"enable_thinking": True},
            },
            {"enable_thinking": False},
        ),
        ({"default_chat_template_kwargs": {"no_such": 1}}, {}),
        ({"chat_template": NO_SYSTEM}, {}),
        ({"chat_template": PARTS}, {}),
        ({"chat_template_content_format": "openai", "chat_template": PARTS}, {}),
        ({"trust_request_chat_template": True}, {}),
    ],
    ids=[
        "none",
        "template",
        "argument",
        "default",
        "default and argument",
        "unknown default",
        "alternating",
        "parts",
        "parts by name",
        "trust",
    ],
)
def test_options_of_the_server(
    serving: Any,
    options: dict[str, Any],
    arguments: dict[str, Any],
    messages: list[dict[str, Any]],
) -> None:
    same(serving(MODEL, **options), messages, arguments)


def test_the_options_tell(serving: Any) -> None:
    """Or the test above would show nothing."""
    on, off = {"enable_thinking": True}, {"enable_thinking": False}
    head = {"chat_template": THINKING_HEAD}
    found = {
        same(serving(MODEL), ASKED, {}),
        same(serving(MODEL, **head), ASKED, {}),
        same(serving(MODEL, **head, default_chat_template_kwargs=on), ASKED, {}),
        same(serving(MODEL, **head, default_chat_template_kwargs=on), ASKED, off),
        same(serving(MODEL, chat_template=PARTS), ASKED, {}),
        same(serving(MODEL, chat_template=PARTS, chat_template_content_format="string"), TALK, {}),
    }
    assert len(found) == 6


@pytest.mark.parametrize("tekken", MISTRAL_FILES)
def test_mistral_s_own_tokenizer(serving: Any, tekken: str, tmp_path: Path) -> None:
    server = serving(with_tekken(tmp_path, tekken), "mistral")
    for messages in (ASKED, TALK):
        same(server, messages, {})


@pytest.mark.parametrize("left_out", [False, True])
def test_tools(serving: Any, left_out: bool) -> None:
    options = {"exclude_tools_when_tool_choice_none": left_out, "chat_template": TOOLS}
    server = serving(MODEL, **options, enable_auto_tools=True, tool_parser="hermes")
    tools = {"tools": [WEATHER]}
    shown = same(server, CALLED, {}, **tools, tool_choice="auto")
    without = same(server, CALLED, {})
    assert shown != without
    none = same(server, CALLED, {}, **tools, tool_choice="none")
    assert none == (without if left_out else shown)


# ---- what is refused -----------------------------------------------------------------------------


def test_what_the_endpoint_refuses(serving: Any, tmp_path: Path) -> None:
    server = serving(MODEL, chat_template=THINKING_HEAD)
    with pytest.raises(PromptError, match="--tool-call-parser"):
        server.ours.render(ASKED, {}, tools=tool_use({"tools": [WEATHER]}))
    with pytest.raises(ConfigError, match="no argument 'enable_thinkin'"):
        server.ours.render(ASKED, {"enable_thinkin": True})
    server.ours.render(ASKED, {"enable_thinking": True})
    with pytest.raises(PromptTooLongError, match="--max-model-len"):
        server.ours.render([{"role": "user", "content": "word " * 10_000}], {})
    listed = serving(MODEL, chat_template_content_format="openai")
    with pytest.raises(PromptError, match="only concatenate str"):  # as a chat request is
        listed.ours.render(ASKED, {})
    refusing = serving(MODEL, chat_template=NO_SYSTEM)
    with pytest.raises(PromptError, match="System role not supported"):
        refusing.ours.render([{"role": "system", "content": "Be brief."}, *ASKED], {})
    assert server.ours.available and refusing.ours.available


def test_a_template_for_a_model_that_has_none(serving: Any, tmp_path: Path) -> None:
    folder = with_template(tmp_path, None)
    without = serving(folder)
    assert not without.ours.available
    with pytest.raises(PromptError, match="has none"):
        without.ours.render(ASKED, {})
    given = serving(folder, chat_template=NO_SYSTEM)
    assert given.ours.available
    same(given, ASKED, {})
