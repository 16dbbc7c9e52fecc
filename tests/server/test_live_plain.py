"""Stock clients of a real ``cacheblend serve``, beside vLLM's own server with the same options."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_models import TOOLS
from live_server import LiveServer
from pair import CHUNKS, Pair, ask, numbered, pair
from stock_clients import ASK, MODULES

from cacheblend_rag import CacheBlend

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = 50
ASKED = "\n\n".join([*CHUNKS, "When was the bell cast?"])


@pytest.fixture(scope="module")
def servers(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "template.jinja").write_text(TOOLS)
    template = ["--chat-template", str(folder / "template.jinja")]
    silent = ["--default-chat-template-kwargs", '{"enable_thinking": false}']
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with pair(embedded, folder, *template, *silent, *tools) as both:
        body = {"chunks": CHUNKS, "wait": True}
        assert both.ours.ask("POST", "/ingestions", json=body)["counts"]["computed"] == 6
        yield both


def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(server: LiveServer, prompt: str, **cacheblend: Any) -> Any:
    """By OpenAI's own client, as it is; 8 tokens of a greedy answer."""
    extra: dict[str, Any] = {"return_token_ids": True}
    if cacheblend:
        extra["kv_transfer_params"] = {"cacheblend": cacheblend}
    with client(server) as asking:
        return asking.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=8,
            logprobs=True,
            extra_body=extra,
        )


def said(answer: Any) -> tuple[str, list[int], list[int]]:
    [choice] = answer.choices
    return choice.message.content, choice.token_ids, answer.prompt_token_ids


def test_prompts_are_those_of_both_servers_chats(servers: Pair) -> None:
    """The template and its arguments are options of the server."""
    messages: Any = [{"role": "user", "content": ASKED}]
    for thinking in (None, True, False):
        arguments = {} if thinking is None else {"enable_thinking": thinking}
        more = {"chat_template_kwargs": arguments} if arguments else {}
        own = servers.ours.ask("POST", "/tokenize", json={"prompt": messages, **more})["token_ids"]
        body = {"messages": messages, **more}
        for server in servers:
            assert server.client.post("/tokenize", json=body).json()["tokens"] == own
            asked = {**body, "max_tokens": 1, "return_token_ids": True}
            answer = server.client.post("/v1/chat/completions", json=asked).json()
            assert answer["prompt_token_ids"] == own
        with CacheBlend.connect(servers.ours.url) as remote:
            assert list(remote.tokenize(messages, chat_template_kwargs=arguments)) == own
            result = remote.generate(messages, chat_template_kwargs=arguments, max_tokens=1)
            assert list(result.prompt_token_ids) == own
    text = servers.ours.ask("POST", "/tokenize", json={"prompt": ASKED})["token_ids"]
    plain = servers.plain.client.post("/tokenize", json={"prompt": ASKED}).json()["tokens"]
    assert text == plain


def test_cached_tokens(servers: Pair) -> None:
    stored = servers.ours.ask("POST", "/chunks/keys", json={"texts": CHUNKS})["data"]
    # less what the tokenizer merges with its surroundings at a chunk's ends
    tokens = sum(row["tokens"] for row in stored) - 2 * len(CHUNKS)
    assert all(row["stored"] for row in stored)
    for prompt in numbered(2, [range(6), range(5, -1, -1)]):
        answer = chat(servers.ours, prompt)
        report = servers.ours.ask("GET", f"/requests/{answer.id}")
        assert report["tokens_reused"] + report["tokens_recomputed"] >= tokens
        assert tokens > report["tokens_reused"] > 0.8 * tokens
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert answer.usage.prompt_tokens > cached >= tokens
        whole = chat(servers.ours, f"All of it. {prompt}", mode="reuse").usage
        assert whole.prompt_tokens > whole.prompt_tokens_details.cached_tokens >= tokens
        off = chat(servers.ours, f"None of it. {prompt}", mode="off").usage
        assert not off.prompt_tokens_details or not off.prompt_tokens_details.cached_tokens


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ASK)
def test_frameworks_openai_classes(
    servers: Pair, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unchanged: their answers are vLLM's own at ratio 1 and without blending."""
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    if importlib.util.find_spec(MODULES[name].partition(".")[0]) is None:
        pytest.skip(f"needs the dependency group clients: {MODULES[name]}")
    pytest.importorskip(MODULES[name], reason="needs the dependency group clients")
    stored = servers.ours.ask("POST", "/chunks/keys", json={"texts": CHUNKS})["data"]
    tokens = sum(row["tokens"] for row in stored) - 2 * len(CHUNKS)
    ask_it, prompt = ASK[name], f"{name}.\n\n{ASKED}"
    expected, _ = ask_it(f"{servers.plain.url}/v1", prompt, {})

    def asked(**options: Any) -> tuple[str, int]:
        extra = {"kv_transfer_params": {"cacheblend": options}} if options else {}
        return ask_it(f"{servers.ours.url}/v1", prompt, extra)

    assert asked(mode="off") == (expected, 0)
    assert asked()[1] >= tokens
    assert asked(mode="reuse")[1] >= tokens
    assert asked(recompute_ratio=1.0)[0] == expected
    assert asked(mode="off")[0] == expected


def test_streams_say_what_was_cached(servers: Pair) -> None:
    with client(servers.ours) as asking:
        pieces = list(
            asking.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": f"Think. {ASKED}"}],
                max_tokens=4,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    usage = pieces[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens
    report = servers.ours.ask("GET", f"/requests/{pieces[0].id}")
    assert report["blended"] and report["tokens_total"] == usage.prompt_tokens


def test_exact_answers_are_those_of_vllm_alone(servers: Pair) -> None:
    """Before, between and after blends, whoever asks beside."""
    chosen = random.Random(24)
    orders = [chosen.sample(range(6), chosen.randint(1, 3)) for _ in range(PROMPTS)]
    prompts = numbered(PROMPTS, orders)
    with ThreadPoolExecutor(2) as pool:
        expected = [said(answer) for answer in pool.map(lambda p: chat(servers.plain, p), prompts)]
    kinds: list[dict[str, Any]] = [{"mode": "off"}, {}, {"recompute_ratio": 1.0}, {"mode": "off"}]
    asked = [(number, kind) for number in range(PROMPTS) for kind in kinds]
    chosen.shuffle(asked)
    blended = []

    def wrong(at: tuple[int, dict[str, Any]]) -> str:
        number, kind = at
        answer = chat(servers.ours, prompts[number], **kind)
        if not kind:
            blended.append(answer.usage.prompt_tokens_details.cached_tokens)
            return "" if said(answer)[2] == expected[number][2] else f"{number}: another prompt"
        return "" if said(answer) == expected[number] else f"{number} {kind}: {said(answer)[:2]}"

    with ThreadPoolExecutor(3) as pool:
        found = [told for told in pool.map(wrong, asked) if told]
    assert not found, "\n".join(found)
    assert len(blended) == PROMPTS and min(blended) > 40


# ---- every kind of request -----------------------------------------------------------------------

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SHORT = "\n\n".join([*CHUNKS[:3], "When was the bell cast?"])
TEXT: dict[str, Any] = {"prompt": SHORT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
TALK: dict[str, Any] = {**TEXT, "messages": [{"role": "user", "content": SHORT}]}
del TALK["prompt"]
HELD = {"ignore_eos": False, "max_tokens": 60}  # to a form, which ends it
YEAR = {"type": "integer", "enum": [1874, 1875]}
SCHEMA = {"type": "object", "properties": {"year": YEAR}, "required": ["year"]}
IN_JSON = {"type": "json_schema", "json_schema": {"name": "year", "schema": SCHEMA}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": SCHEMA, "strict": True},
}
NAMED = {"type": "function", "function": {"name": "weather"}}
SAMPLED = {"n": 2, "temperature": 1, "seed": 7, "min_tokens": 6}
MESSAGES = {"model": "m", "messages": TALK["messages"], "max_tokens": 6, "temperature": 0}
RESPONSES = {"input": SHORT, "max_output_tokens": 6, "temperature": 0}
# by name: the path, the body, and why there is no blend in it; None: there is one
KINDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "text": (COMPLETIONS, TEXT, None),
    "chat": (CHAT, TALK, None),
    "n of text": (COMPLETIONS, {**TEXT, **SAMPLED}, None),
    "n of chat": (CHAT, {**TALK, **SAMPLED}, None),
    "echo": (COMPLETIONS, {**TEXT, "echo": True}, None),
    "echo in chat": (CHAT, {**TALK, "echo": True}, "prompt_logprobs"),  # it asks for them
    "echo with logprobs": (COMPLETIONS, {**TEXT, "echo": True, "logprobs": 1}, "prompt_logprobs"),
    "logprobs": (COMPLETIONS, {**TEXT, "logprobs": 2}, None),
    "logprobs in chat": (CHAT, {**TALK, "logprobs": True, "top_logprobs": 2}, None),
    "prompt_logprobs": (COMPLETIONS, {**TEXT, "prompt_logprobs": 1}, "prompt_logprobs"),
    "prompt_logprobs in chat": (CHAT, {**TALK, "prompt_logprobs": 1}, "prompt_logprobs"),
    "beams": (COMPLETIONS, {**TEXT, "use_beam_search": True, "n": 2}, "beam_search"),
    "token ids": (COMPLETIONS, {**TEXT, "prompt": [5, 6, 7, 8]}, "no_chunk_found"),
    "schema": (CHAT, {**TALK, **HELD, "response_format": IN_JSON}, None),
    "choice": (
        COMPLETIONS,
        {**TEXT, **HELD, "structured_outputs": {"choice": ["1874", "1875"]}},
        None,
    ),
    "tools": (CHAT, {**TALK, "tools": [WEATHER], "tool_choice": "auto"}, None),
    "tools that are not to be called": (
        CHAT,
        {**TALK, "tools": [WEATHER], "tool_choice": "none"},
        None,
    ),
    "a tool by name": (
        CHAT,
        {**TALK, **HELD, "tools": [WEATHER], "tool_choice": NAMED},
        None,
    ),
    "chats": (f"{CHAT}/batch", {**TALK, "messages": [TALK["messages"]]}, None),
    "responses": ("/v1/responses", RESPONSES, None),
    "messages": ("/v1/messages", MESSAGES, None),
}


# what is the connector's to say; vLLM counts with its cache, which other requests filled
_OURS_ALONE = ("kv_transfer_params", "prompt_tokens_details", "input_tokens_details")
_OF_ONE = (*_OURS_ALONE, "usage", "id", "item_id", "created", "created_at", "completed_at")
_OF_ONE += ("system_fingerprint",)
_SAID = ("text", "content", "reasoning", "arguments", "delta")


def shape(value: Any) -> Any:
    """Its names and kinds, without what is said."""
    if isinstance(value, dict):
        return {name: _shape_of(name, v) for name, v in value.items() if name not in _OURS_ALONE}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def _shape_of(name: str, value: Any) -> Any:
    # an echoed prompt's first token has none
    by_token = name == "top_logprobs" and value and "logprob" not in (value[0] or {})
    return "numbers by token" if by_token else shape(value)


def alike(one: Any, other: Any) -> bool:
    """Whether they say the same, but for rounding and for what two answers never share."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in one if name not in _OF_ONE]
        same = names == [name for name in other if name not in _OF_ONE]
        return same and all(alike(one[name], other[name]) for name in names)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-2
    return bool(one == other)


def said_in(value: Any) -> str:
    """All text of a stream's events: how many tokens come with one is a matter of moments."""
    if isinstance(value, list):
        return "".join(map(said_in, value))
    if not isinstance(value, dict):
        return ""
    parts = (v if name in _SAID and isinstance(v, str) else said_in(v) for name, v in value.items())
    return "".join(parts)


def events(text: str) -> list[dict[str, Any]]:
    lines = (line[6:] for line in text.splitlines() if line.startswith("data: {"))
    return [json.loads(line) for line in lines]


def id_of(body: dict[str, Any]) -> str:
    """Of the answer that a body, or the first event of a stream, is of."""
    about: dict[str, Any] = body.get("response") or body.get("message") or body
    return str(about["id"])


def unasked(body: dict[str, Any]) -> dict[str, Any]:
    """With a prompt that nobody asked yet: vLLM's prefix cache serves others."""
    old, new = (json.dumps(text) for text in (SHORT, f"Answer {next(_numbers)}.\n\n{SHORT}"))
    found: dict[str, Any] = json.loads(json.dumps(body).replace(old, new))
    return found


_numbers = itertools.count()


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_vllm_alone(servers: Pair, kind: str) -> None:
    path, body, reason = KINDS[kind]
    body = unasked(body)
    plain = ask(servers.plain, path, body)
    assert plain.status_code == 200, plain.text
    for options in ({}, {"recompute_ratio": 1.0}, {"mode": "off"}):
        ours = ask(servers.ours, path, body, **options)
        assert ours.status_code == 200, ours.text
        assert shape(ours.json()) == shape(plain.json())
        if options and "seed" not in body:  # another batch, another sample
            assert alike(ours.json(), plain.json()), (ours.text, plain.text)
        report = servers.ours.ask("GET", f"/requests/{id_of(ours.json())}")
        # what can't be blended at all is said first
        expected = {reason} if options != {"mode": "off"} else {"mode", reason} - {None}
        assert report["reason"] in expected
        assert report["reports"] >= body.get("n", 1)  # a beam search has one a token


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_those_of_vllm_alone(servers: Pair, kind: str) -> None:
    path, body, reason = KINDS[kind]
    body = unasked({**body, "stream": True})
    plain, ours = ask(servers.plain, path, body), ask(servers.ours, path, body)
    assert ours.status_code == plain.status_code
    assert ours.headers["content-type"] == plain.headers["content-type"]
    if "event-stream" not in plain.headers["content-type"]:  # refused, or not streamed
        assert shape(ours.json()) == shape(plain.json())
        return
    exact = ask(servers.ours, path, body, recompute_ratio=1.0)
    if "seed" not in body:
        assert said_in(events(exact.text)) == said_in(events(plain.text))
    known = [shape(event) for event in events(plain.text)]
    assert all(shape(event) in known for event in events(ours.text)), ours.text
    report = servers.ours.ask("GET", f"/requests/{id_of(events(ours.text)[0])}")
    assert report["reason"] == reason


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {**TALK, "model": "no such"}),
        (CHAT, {**TALK, "temperature": -1}),
        (CHAT, {**TALK, "messages": []}),
        (CHAT, {**TALK, "max_tokens": 5000}),
        (CHAT, {**TALK, "chat_template": "{{ messages }}"}),
        (CHAT, {**TALK, "tools": [WEATHER], "tool_choice": {"type": "x"}}),
        (COMPLETIONS, {**TEXT, "prompt": "word " * 5000}),
        (COMPLETIONS, {**TEXT, "prompt": []}),
        (COMPLETIONS, {**TEXT, "logprobs": 500}),
        (COMPLETIONS, {**TEXT, "use_beam_search": True, "n": 2, "stream": True}),
        ("/v1/responses", {**RESPONSES, "previous_response_id": "resp_none"}),
        ("/v1/messages", {"model": "m", "messages": []}),
        ("/v1/embeddings", {"input": "x"}),
    ],
    ids=str,
)
def test_refusals_are_those_of_vllm_alone(servers: Pair, path: str, body: dict[str, Any]) -> None:
    plain, ours = ask(servers.plain, path, body), ask(servers.ours, path, body)
    assert ours.status_code == plain.status_code >= 400
    assert shape(ours.json()) == shape(plain.json())
