"""The proxy over real sockets, in front of servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from fake_replica import (
    FakeReplica,
    Got,
    Proxy,
    begin_stream,
    chunk,
    part,
    proxied,
    respond,
    stream,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import free_port

from cacheblend_rag import cli
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.router import WarmRouter
from cacheblend_rag.server.proxy import health
from cacheblend_rag.server.proxy.app import proxy_app
from cacheblend_rag.server.proxy.events import _MOST, WholeEvents
from cacheblend_rag.server.proxy.fleet import Fleet
from cacheblend_rag.server.proxy.headers import request_headers, response_headers
from cacheblend_rag.server.proxy.health import models_of
from cacheblend_rag.server.proxy.options import ProxyOptions

ROOT = {"authorization": "Bearer root"}


def replicas(count: int) -> list[FakeReplica]:
    return [FakeReplica(f"r{n}") for n in range(count)]


def topic(number: int) -> str:
    return " ".join(f"t{number}w{n}" for n in range(1500))


def asked(proxy: Proxy) -> dict[str, int]:
    return {replica.name: len(replica.got) for replica in proxy.replicas}


async def idle(proxy: Proxy) -> bool:
    return all(s["in_flight"] == 0 for s in (await proxy.state()).values())


# --- what passes ----------------------------------------------------------------------------------


async def test_requests_and_answers_pass_as_they_are() -> None:
    async def behave(got: Got, writer: asyncio.StreamWriter) -> None:
        headers = {"retry-after": "7", "set-cookie": "a=b", "x-own": "y", "keep-alive": "timeout=5"}
        await respond(writer, 429, b'{"error": {"message": "busy"}}', headers)

    async with proxied(replicas(1)) as proxy:
        proxy.replicas[0].behave = behave
        sent = {
            "authorization": "Bearer sk-1",
            "x-request-id": "42",
            "cookie": "c=d",
            "connection": "keep-alive, x-hop",
            "x-hop": "1",
            "te": "trailers",
            "x-forwarded-for": "10.0.0.1",
        }
        target = "/v1/cacheblend/documents/a%2Fb%20c?x=1&y=%2F"
        answer = await proxy.client.put(target, content=b"{not json", headers=sent)
        [got] = proxy.replicas[0].got
        assert (got.method, got.body) == ("PUT", b"{not json")
        assert got.target == target
        assert got.headers["authorization"] == "Bearer sk-1" and got.headers["cookie"] == "c=d"
        assert got.headers["x-request-id"] == "42"
        assert got.headers["host"] == f"127.0.0.1:{proxy.replicas[0].port}"
        assert got.headers["x-forwarded-for"] == "10.0.0.1, 127.0.0.1"
        assert not {"te", "x-hop"} & got.headers.keys()
        assert answer.status_code == 429 and answer.content == b'{"error": {"message": "busy"}}'
        assert answer.headers["retry-after"] == "7" and answer.headers["x-own"] == "y"
        assert answer.headers["set-cookie"] == "a=b" and "keep-alive" not in answer.headers
        async with httpx.AsyncClient(trust_env=False) as other:
            assert (await other.get(f"{proxy.url}/v1/files")).status_code == 429
        assert "cookie" not in proxy.replicas[0].got[-1].headers  # another client's
        checks = proxy.replicas[0].checks
        count = len(checks)
        await until(lambda: len(checks) > count + 1)
        assert "cookie" not in checks[-1].headers


async def test_paths_pass_as_they_were_written() -> None:
    """Not resolved: a replica's URL may have a path of its own, which none may lead out of."""
    elsewhere = FakeReplica("elsewhere")
    await elsewhere.start()
    fake = FakeReplica("r0")
    fake.url += "/own"
    async with proxied([fake], started=False) as proxy:
        await fake.start()
        await until(lambda: up(proxy, "r0"))
        port = httpx.URL(proxy.url).port
        host = f"127.0.0.1:{elsewhere.port}"
        for path in ("/../x", "/%2e%2e/x", "/v1/../../y", f"//{host}/x", "/a%2Fb?c=%zz&d=../e"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            assert fake.got.pop().target == f"/own{path}"
            writer.close()
        assert not elsewhere.got and not fake.got
    await elsewhere.kill()


async def test_a_request_without_a_body_has_none() -> None:
    async with proxied(replicas(1)) as proxy:
        for method in ("GET", "DELETE", "OPTIONS", "POST"):
            assert (await proxy.client.request(method, "/v1/x")).status_code == 200
        assert (await proxy.client.head("/v1/x")).headers["content-type"] == "application/json"
        lengths = [got.headers.get("content-length") for got in proxy.replicas[0].got]
        assert lengths == [None, None, None, "0", None]


async def test_large_bodies_pass_both_ways() -> None:
    async def echo(got: Got, writer: asyncio.StreamWriter) -> None:
        await respond(writer, 200, got.body)

    async with proxied(replicas(1), max_body=9 << 20) as proxy:
        proxy.replicas[0].behave = echo
        body = json.dumps({"model": "m", "prompt": "words " * (1 << 20)}).encode()
        headers = {"content-type": "application/json"}
        answer = await proxy.client.post("/v1/completions", content=body, headers=headers)
        assert answer.content == body

        async def parts() -> Any:
            for begin in range(0, len(body), 1 << 20):
                yield body[begin : begin + (1 << 20)]

        answer = await proxy.client.post("/v1/completions", content=parts(), headers=headers)
        assert answer.content == body


async def test_bodies_that_are_too_large_are_refused() -> None:
    async def parts() -> Any:
        for _ in range(30):
            yield b"x" * 1000

    async with proxied(replicas(1), max_body=20_000) as proxy:
        for content in (b"x" * 20_001, parts()):
            answer = await proxy.client.post("/v1/completions", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["type"] == "RequestTooLargeError"
        assert asked(proxy) == {"r0": 0}


NO_REQUESTS = [b"{", b"[1]", b'"x"', b"[" * 100_000, b'{"model": 3, "prompt": {}}']


@pytest.mark.parametrize("body", NO_REQUESTS)
async def test_what_is_no_request_is_the_replicas_to_refuse(body: bytes) -> None:
    async def behave(got: Got, writer: asyncio.StreamWriter) -> None:
        await respond(writer, 400, got.body)

    async with proxied(replicas(2)) as proxy:
        for replica in proxy.replicas:
            replica.behave = behave
        headers = {"content-type": "application/json"}
        answer = await proxy.client.post("/v1/completions", content=body, headers=headers)
        assert (answer.status_code, answer.content) == (400, body)


# --- where requests go ----------------------------------------------------------------------------


async def test_topics_stay_where_they_are() -> None:
    async with proxied(replicas(4)) as proxy:
        homes = dict[int, set[str]]()
        for turn in range(3):
            for number in (3, 0, 2, 1)[:: (-1) ** turn]:
                answer = await proxy.ask(f"{turn} {topic(number)}")
                name = answer.json()["choices"][0]["message"]["content"]
                homes.setdefault(number, set()).add(name)
        assert all(len(names) == 1 for names in homes.values())
        assert len(set.union(*homes.values())) == 4
        state = await proxy.state()
        assert [s["sent"] for s in state.values()] == [3] * 4
        assert all(s["windows"] > 10 and s["models"] == ["m"] for s in state.values())


async def test_a_model_is_asked_of_those_that_have_it() -> None:
    fakes = [FakeReplica("r0", ("a",)), FakeReplica("r1", ("b", "c")), FakeReplica("r2", ("a",))]
    async with proxied(fakes) as proxy:
        for model in "bcbc":
            await proxy.ask(topic(0), model=model)
        for _ in range(4):
            await proxy.ask(topic(1), model="a")
        assert asked(proxy)["r1"] == 4
        assert (await proxy.ask(model="nobody's")).status_code == 200  # it is a replica's to refuse
        await fakes[1].kill()
        await until(lambda: down(proxy, "r1"))
        before = asked(proxy)
        assert (await proxy.ask(model="b")).status_code == 503  # it is away, and others lack it
        assert asked(proxy) == before


async def test_a_busy_replica_gets_less() -> None:
    gate = asyncio.Event()

    async def slow(got: Got, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await respond(writer, 200)

    async with proxied(replicas(4)) as proxy:
        for replica in proxy.replicas:
            replica.behave = slow
        waiting = [asyncio.ensure_future(proxy.ask(topic(0))) for _ in range(20)]
        await until(lambda: sum(asked(proxy).values()) == 20)
        assert max(asked(proxy).values()) <= 8  # 1.5 times the mean
        gate.set()
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}
        assert await idle(proxy)


async def test_ingestions_are_one_replicas_and_reports_are_found() -> None:
    def only(name: str, own: str) -> Any:
        async def behave(got: Got, writer: asyncio.StreamWriter) -> None:
            mine = got.target.endswith(own)
            await respond(writer, 200 if mine else 404, name.encode())

        return behave

    async with proxied(replicas(3)) as proxy:
        for n, replica in enumerate(proxy.replicas):
            replica.behave = only(replica.name, f"/id{n}")
        for n in range(3):
            assert (await proxy.client.get(f"/v1/cacheblend/requests/id{n}")).text == f"r{n}"
            assert (await proxy.client.get(f"/v1/cacheblend/ingestions/id{n}")).text == f"r{n}"
        absent = await proxy.client.get("/v1/cacheblend/requests/id9")
        assert absent.status_code == 404 and absent.json()["error"]["type"] == "NotFoundError"
        before = asked(proxy)
        for _ in range(5):
            await proxy.client.post("/v1/cacheblend/ingestions", json={})
        assert asked(proxy) == {**before, "r0": before["r0"] + 5}
        proxy.replicas[1].behave = lambda got, writer: respond(writer, 200, b"r1")
        cancelled = await proxy.client.post("/v1/cacheblend/ingestions/id1/cancel")
        assert cancelled.text == "r1" and asked(proxy)["r2"] == before["r2"]

        async def dies(got: Got, writer: asyncio.StreamWriter) -> None:
            writer.close()

        proxy.replicas[1].behave = dies
        assert (await proxy.client.get("/v1/cacheblend/requests/id2")).text == "r2"
        lost = await proxy.client.post("/v1/cacheblend/ingestions/id2/cancel")
        assert lost.status_code == 502
        pinned = {"x-cacheblend-replica": (await proxy.state())["r2"]["id"]}
        answer = await proxy.client.get("/v1/cacheblend/ingestions/id2", headers=pinned)
        assert (
            answer.text == "r2"
            and answer.headers["x-cacheblend-replica"] == pinned["x-cacheblend-replica"]
        )
        absent = await proxy.client.get("/v1/x", headers={"x-cacheblend-replica": "nobody"})
        assert absent.status_code == 404


# --- streams --------------------------------------------------------------------------------------


async def test_events_come_as_they_are_sent() -> None:
    gate = asyncio.Event()

    async def behave(got: Got, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        await part(writer, chunk("first"))
        await gate.wait()
        await part(writer, chunk("second")[:20])
        await part(writer, chunk("second")[20:] + b"data: [DONE]")
        await part(writer, b"")

    async with proxied(replicas(1)) as proxy:
        proxy.replicas[0].behave = behave
        async with proxy.client.stream("POST", "/v1/chat/completions", json={}) as answer:
            pieces = answer.aiter_raw()
            assert await anext(pieces) == chunk("first")
            gate.set()
            rest = b"".join([piece async for piece in pieces])
        assert rest == chunk("second") + b"data: [DONE]"
        assert answer.headers["content-type"].startswith("text/event-stream")
        await until(lambda: idle(proxy))


async def broken_stream(proxy: Proxy) -> bytes:
    async with proxy.client.stream("POST", "/v1/chat/completions", json={"stream": True}) as answer:
        return b"".join([piece async for piece in answer.aiter_raw()])


async def test_a_replica_that_dies_in_mid_stream_ends_the_answer_with_an_error() -> None:
    async def dies(got: Got, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        await part(writer, chunk("one") + chunk("half")[:30])
        writer.transport.abort()

    async with proxied(replicas(3)) as proxy:
        for replica in proxy.replicas:
            replica.behave = dies
        found = await broken_stream(proxy)
        assert found.startswith(chunk("one") + b'data: {"error"') and found.endswith(b"\n\n")
        error = json.loads(found.split(b"data: ")[-1])["error"]
        assert error["code"] == "replica_lost" and "127.0.0.1" not in error["message"]
        assert sum(asked(proxy).values()) == 1  # nobody else answered
        assert await idle(proxy)
        assert sum(s["broken"] for s in (await proxy.state()).values()) == 1


async def test_openais_client_raises_where_a_stream_breaks() -> None:
    import openai

    async def dies(got: Got, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        await part(writer, chunk("one") + chunk("half")[:30])
        writer.transport.abort()

    async with proxied(replicas(1)) as proxy:
        client = openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="sk", max_retries=0)
        ask: Any = client.chat.completions.create
        messages, seen = [{"role": "user", "content": "hi"}], list[str]()

        async def listen() -> None:
            seen.clear()
            async for piece in await ask(model="m", messages=messages, stream=True):
                seen.append(piece.choices[0].delta.content)

        await listen()
        assert seen == ["r0", "!"]
        proxy.replicas[0].behave = dies
        with pytest.raises(openai.APIError, match="did not answer to the end"):
            await listen()
        assert seen == ["one"]
        await proxy.replicas[0].kill()
        await until(lambda: down(proxy, "r0"))
        with pytest.raises(openai.InternalServerError, match="no replica can be asked now"):
            await ask(model="m", messages=messages)
        await client.close()


@pytest.mark.parametrize("length", [50, 5_000_000])
async def test_a_body_that_breaks_off_is_cut(length: int) -> None:
    async def dies(got: Got, writer: asyncio.StreamWriter) -> None:
        await respond(writer, 200, b'{"choices": [', length=length)
        writer.transport.abort() if length < 100 else writer.close()

    async with proxied(replicas(3)) as proxy:
        for replica in proxy.replicas:
            replica.behave = dies
        with pytest.raises(httpx.RemoteProtocolError):
            await proxy.ask()
        assert sum(asked(proxy).values()) == 1
        await until(lambda: idle(proxy))


@pytest.mark.parametrize("junk", [b"", b"nonsense\r\n\r\n"])
async def test_a_replica_that_dies_before_it_answers_is_an_error(junk: bytes) -> None:
    async def dies(got: Got, writer: asyncio.StreamWriter) -> None:
        writer.write(junk)
        writer.close()

    async with proxied(replicas(3)) as proxy:
        for replica in proxy.replicas:
            replica.behave = dies
        answer = await proxy.ask()
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "replica_lost"
        assert sum(asked(proxy).values()) == 1  # it may have done what was asked
        assert await idle(proxy)


async def test_a_client_that_leaves_ends_its_answer() -> None:
    async def endless(got: Got, writer: asyncio.StreamWriter) -> None:
        if got.json().get("stream"):
            await begin_stream(writer)
            await part(writer, chunk("one"))
        await asyncio.sleep(60)

    async with proxied(replicas(1)) as proxy:
        [replica] = proxy.replicas
        replica.behave = endless
        async with proxy.client.stream("POST", "/v1/x", json={"stream": True}) as answer:
            await anext(answer.aiter_raw())
        await until(lambda: replica.left == 1)
        with pytest.raises(httpx.ReadTimeout):
            await proxy.client.post("/v1/x", json={}, timeout=0.2)
        await until(lambda: replica.left == 2)
        await until(lambda: idle(proxy))


async def test_an_answer_that_does_not_come_is_given_up_where_one_wishes() -> None:
    async def hangs(got: Got, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with proxied(replicas(1), timeout_s=0.2) as proxy:
        proxy.replicas[0].behave = hangs
        answer = await proxy.ask()
        assert answer.status_code == 502 and "ReadTimeout" in answer.text


# --- health ---------------------------------------------------------------------------------------


async def down(proxy: Proxy, name: str) -> bool:
    return bool((await proxy.state())[name]["state"] == "down")


async def up(proxy: Proxy, name: str) -> bool:
    return bool((await proxy.state())[name]["state"] == "up")


async def test_a_dead_replica_is_left_out_and_tried_again() -> None:
    async with proxied(replicas(2), check_s=0.3) as proxy:
        first = proxy.replicas[0]
        for number in range(4):
            await proxy.ask(topic(number))
        assert asked(proxy) == {"r0": 2, "r1": 2}
        await first.kill()
        answers = [await proxy.ask(topic(number)) for number in range(4)]
        assert {answer.status_code for answer in answers} == {200}  # nothing was sent to the dead
        assert asked(proxy) == {"r0": 2, "r1": 6} and await down(proxy, "r0")
        state = (await proxy.state())["r0"]
        assert state["windows"] == 0 and "ConnectError" in state["reason"]
        await first.start()
        await until(lambda: up(proxy, "r0"))
        await proxy.ask(topic(9))
        assert asked(proxy)["r0"] == 3  # the one with fewer


async def test_all_dead_is_said_as_openais_clients_know_it() -> None:
    async with proxied(replicas(2), started=False) as proxy:
        assert (await proxy.client.get("/health")).status_code == 503
        for answer in (await proxy.ask(), await proxy.client.get("/v1/models")):
            error = answer.json()["error"]
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert error["type"] == "ServiceUnavailableError" and error["code"] == "no_replica"
        await proxy.replicas[1].start()
        await until(lambda: up(proxy, "r1"))
        assert (await proxy.client.get("/health")).status_code == 200
        assert (await proxy.ask()).status_code == 200


async def test_a_replica_that_hangs_or_says_so_is_left_out() -> None:
    async with proxied(replicas(3), check_timeout_s=0.5) as proxy:
        proxy.replicas[1].is_healthy = False

        async def hangs(*arguments: Any) -> None:
            await asyncio.sleep(60)

        proxy.replicas[2]._handle = hangs  # type: ignore[method-assign]
        await until(lambda: down(proxy, "r1"))
        await until(lambda: down(proxy, "r2"))
        state = await proxy.state()
        assert "503" in state["r1"]["reason"] and "0.5 s" in state["r2"]["reason"]
        for number in range(4):
            assert (await proxy.ask(topic(number))).status_code == 200
        assert asked(proxy) == {"r0": 4, "r1": 0, "r2": 0}
        proxy.replicas[1].is_healthy = True
        await until(lambda: up(proxy, "r1"))


async def test_one_check_that_fails_is_none() -> None:
    async with proxied(replicas(1), check_s=30) as proxy:
        proxy.replicas[0].is_healthy = False

        async def dies(got: Got, writer: asyncio.StreamWriter) -> None:
            writer.close()

        proxy.replicas[0].behave = dies
        assert (await proxy.ask()).status_code == 502  # which hurries one check
        await asyncio.sleep(0.1)
        assert await up(proxy, "r0")
        assert (await proxy.ask()).status_code == 502  # and another one
        await until(lambda: down(proxy, "r0"))


async def test_many_replicas_are_checked_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_AT_ONCE", 3)
    monkeypatch.setattr(health, "_A_SECOND", 10)
    running, most, rounds = 0, 0, 0

    async def ask(self: Any, replica: Any) -> None:
        nonlocal running, most, rounds
        running, rounds = running + 1, rounds + 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1

    monkeypatch.setattr(health.HealthChecks, "_ask", ask)
    async with proxied(replicas(8), started=False, check_s=0.01) as proxy:
        assert (await proxy.client.get("/health")).status_code == 200
        await asyncio.sleep(0.3)
    assert most == 3 and rounds <= 16  # at the start, and once in .8 s


# --- for who runs it ------------------------------------------------------------------------------


async def test_replicas_are_drained_added_and_removed() -> None:
    gate = asyncio.Event()

    async def slow(got: Got, writer: asyncio.StreamWriter) -> None:
        await gate.wait()
        await respond(writer, 200, b"slow")

    async def change(proxy: Proxy, what: str, **body: Any) -> httpx.Response:
        return await proxy.client.post(f"/route/{what}", json=body, headers=ROOT)

    fresh = FakeReplica("r2")
    await fresh.start()
    async with proxied(replicas(2)) as proxy:
        first, second = proxy.replicas
        first.behave = second.behave = slow
        waiting = [asyncio.ensure_future(proxy.ask(topic(n))) for n in range(2)]
        await until(lambda: asked(proxy) == {"r0": 1, "r1": 1})
        name = first.url.partition("://")[2]
        assert (await change(proxy, "drain", replica=name)).status_code == 200
        assert (await proxy.state())["r0"]["state"] == "draining"
        second.behave = second.answer
        for n in range(3):
            await proxy.ask(topic(n))
        assert asked(proxy) == {"r0": 1, "r1": 4}
        assert (await change(proxy, "add", url=f"{fresh.url}/v1/")).status_code == 200
        proxy.replicas.append(fresh)
        await until(lambda: up(proxy, "r2"))
        await change(proxy, "remove", replica=second.url.partition("://")[2])
        await proxy.ask(topic(1))
        assert asked(proxy) == {"r0": 1, "r1": 4, "r2": 1}
        gate.set()
        assert [a.text for a in await asyncio.gather(*waiting)] == ["slow", "slow"]  # as begun
        await change(proxy, "resume", replica=name)
        assert await up(proxy, "r0") and await idle(proxy)

        for what, body, status in [
            ("add", {"url": first.url}, 400),
            ("add", {"url": "nothing"}, 400),
            ("add", {"url": 7}, 400),
            ("add", {"replica": name}, 400),
            ("drain", {"replica": "nobody"}, 404),
            ("explode", {}, 404),
        ]:
            answer = await change(proxy, what, **body)
            assert answer.status_code == status and answer.json()["error"]["message"]


async def test_the_state_is_guarded() -> None:
    async with proxied(replicas(1)) as proxy:
        for key in ("", "Bearer wrong", "Bearer ½".encode()):
            headers = {"authorization": key}
            answer = await proxy.client.get("/route", headers=headers)
            assert answer.status_code == 401
            answer = await proxy.client.post("/route/drain", json={}, headers=headers)
            assert answer.status_code == 401
        assert (await proxy.client.get("/metrics")).status_code == 404
    async with proxied(replicas(1), admin_key=None) as proxy:
        answer = await proxy.client.get("/route", headers=ROOT)
        assert answer.status_code == 403 and "CACHEBLEND_ROUTE_KEY" in answer.text
        assert asked(proxy) == {"r0": 0}


async def test_checks_have_a_key_of_their_own() -> None:
    seen = list[str | None]()

    class Guarded(FakeReplica):
        async def _handle(self, got: Got, *rest: Any) -> None:
            seen.append(got.headers.get("authorization"))
            await super()._handle(got, *rest)

    async with proxied([Guarded("r0")], api_key="sk-check"):
        assert set(seen) == {"Bearer sk-check"}


def test_replicas_have_to_be_given_and_differ() -> None:
    for urls, what in [([], "--replica"), (["x"], "no URL"), (2 * ["http://a"], "twice")]:
        with pytest.raises(ConfigError, match=what):
            proxy_app(urls, WarmRouter(), ProxyOptions())


@dataclass
class Command:
    process: subprocess.Popen[str]
    url: str
    errors: str = ""  # what it had said at its end


@contextmanager
def command(replica: str, *more: str) -> Iterator[Command]:
    """In a process of its own, which is asked to end at last."""
    port = free_port()
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('vllm', 'torch', 'fastapi', 'transformers')))\n"
        "from cacheblend_rag.cli import main\n"
        "sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "route", "--replica", replica, "--port", str(port), *more],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CACHEBLEND_ROUTE_KEY": "root", "PYTHONPATH": ":".join(sys.path)},
    )
    found = Command(process, f"http://127.0.0.1:{port}")
    try:
        for _ in range(300):
            time.sleep(0.1)
            try:
                httpx.get(f"{found.url}/health", trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None, process.communicate()
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            _, found.errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in (0, -signal.SIGTERM), found.errors


def test_the_command_runs_and_needs_no_engine() -> None:
    with command(f"http://127.0.0.1:{free_port()}") as running:
        assert httpx.get(f"{running.url}/health", trust_env=False).status_code == 503
        told = httpx.get(f"{running.url}/route", headers=ROOT, trust_env=False).json()
        assert [replica["state"] for replica in told["replicas"]] == ["down"]
    assert "Traceback" not in running.errors


def test_a_replica_that_hangs_does_not_hold_the_command_at_its_end() -> None:
    class Hangs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self) -> None:
            asked.set()
            done.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    asked, done = threading.Event(), threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hangs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        replica = f"http://127.0.0.1:{server.server_port}"
        with command(replica, "--shutdown-timeout", "1") as running, ThreadPoolExecutor(1) as other:
            url = f"{running.url}/v1/completions"
            answer = other.submit(httpx.post, url, trust_env=False, timeout=60)
            assert asked.wait(20)
            running.process.send_signal(signal.SIGTERM)
            try:
                running.process.wait(15)
            finally:
                done.set()
            assert answer.exception() or answer.result().is_server_error
    finally:
        done.set()
        server.shutdown()
        server.server_close()


def test_a_port_that_is_taken_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["route", "--replica", "http://127.0.0.1:1", "--port", str(port)]
        assert cli.main(arguments) == 1
    assert f"did not start on 127.0.0.1:{port}" in capsys.readouterr().err


# --- pure parts -----------------------------------------------------------------------------------


def test_a_replica_is_left_out_after_two_checks_or_one_refusal() -> None:
    fleet = Fleet(WarmRouter(), checks=2)
    one = fleet.add("http://a:1/v1")
    assert (one.name, fleet.fit(None)) == ("a:1", [])
    fleet.passed(one, None)
    fleet.failed(one, "slow")
    assert fleet.fit(None) == ["a:1"]
    fleet.passed(one, None)
    fleet.failed(one, "slow")
    assert one.up
    fleet.failed(one, "slow")
    assert not one.up and one.reason == "slow"
    fleet.passed(one, None)
    fleet.failed(one, "refused", surely=True)
    assert fleet.fit(None) == []
    fleet.remove("a:1")
    fleet.failed(one, "gone")  # a check that was on its way
    fleet.done(one)
    assert fleet.state() == []


MARKS = [b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n"]
EVENTS = st.lists(st.sampled_from([b"data: a", b"b" * 40, *MARKS]))


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.lists(st.integers(0, 60), max_size=12))
def test_events_are_whole_however_they_come(parts: list[bytes], cuts: list[int]) -> None:
    text = b"".join(parts)
    events, sent, ends = WholeEvents(), b"", sorted({min(c, len(text)) for c in cuts} | {len(text)})
    for begin, end in zip([0, *ends], ends, strict=False):
        sent += events.take(text[begin:end])
        assert text.startswith(sent)
        assert not sent or sent.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
    last = max(text.rfind(mark) + len(mark) if mark in text else 0 for mark in (b"\n\n", b"\r\r"))
    assert len(sent) >= last - 1  # of three ends of lines, the last may begin an event
    assert sent + events.rest() == text and events.rest() == b""


def test_an_event_without_end_takes_bounded_memory() -> None:
    events, sent = WholeEvents(), 0
    started = time.process_time()
    for _ in range(3000):
        sent += len(events.take(b"x" * 1000))
        assert len(events._held) <= _MOST
    assert sent > 2_900_000 - _MOST and time.process_time() - started < 5


def test_headers_that_are_about_a_connection_do_not_pass() -> None:
    given = [(b"Connection", b"close, X-A"), (b"x-a", b"1"), (b"X-B", b"2"), (b"x-b", b"3")]
    assert request_headers(given, None) == [(b"x-b", b"2"), (b"x-b", b"3")]
    assert response_headers([*given, (b"x-cacheblend-replica", b"own")], "id") == [
        (b"x-b", b"2"),
        (b"x-b", b"3"),
        (b"x-cacheblend-replica", b"id"),
    ]


@pytest.mark.parametrize(
    ("status", "body", "models"),
    [
        (200, b'{"data": [{"id": "a"}, {"id": "b"}]}', {"a", "b"}),
        (200, b'{"data": []}', None),
        (200, b'{"data": [{"id": 1}]}', None),
        (200, b'{"data": 1}', None),
        (200, b'[{"id": "a"}]', None),
        (200, b"<html>", None),
        (200, b"[" * 100_000, None),
        (401, b'{"data": [{"id": "a"}]}', None),
    ],
)
def test_models_are_those_of_an_openai_list(
    status: int, body: bytes, models: set[str] | None
) -> None:
    assert models_of(httpx.Response(status, content=body)) == models


async def test_streams_of_many_clients_do_not_mix() -> None:
    async def named(got: Got, writer: asyncio.StreamWriter) -> None:
        own = got.json()["messages"][0]["content"]
        await stream(writer, [chunk(f"{own}-{n}") for n in range(20)])

    async with proxied(replicas(3)) as proxy:
        for replica in proxy.replicas:
            replica.behave = named
        answers = await asyncio.gather(*(proxy.ask(f"c{n}", stream=True) for n in range(30)))
        for n, answer in enumerate(answers):
            assert answer.content == b"".join(chunk(f"c{n}-{k}") for k in range(20))
        assert max(Counter(asked(proxy)).values()) <= 1.25 * 10 + 1
