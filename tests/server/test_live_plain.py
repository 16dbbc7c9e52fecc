"""Stock clients of a real ``cacheblend serve``, beside vLLM's own server with the same options."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from chat_models import TOOLS
from live_server import LiveServer
from pair import CHUNKS, Pair, numbered, pair

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
    with pair(embedded, folder, *template, *silent) as both:
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
    tokens = sum(row["tokens"] for row in stored)
    assert all(row["stored"] for row in stored)
    for prompt in (ASKED, "\n\n".join([*reversed(CHUNKS), "When was the bell cast?"])):
        usage = chat(servers.ours, prompt).usage
        assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens >= 0.99 * tokens
        off = chat(servers.ours, f"x {prompt}", mode="off").usage
        assert not off.prompt_tokens_details or not off.prompt_tokens_details.cached_tokens


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
    orders = [chosen.sample(range(6), chosen.randint(2, 4)) for _ in range(PROMPTS)]
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
    assert len(blended) == PROMPTS and min(blended) > 100
