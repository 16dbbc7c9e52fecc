"""Whose a request is: nothing of one tenant's reaches another, whatever path is asked."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from cacheblend_rag.errors import ConfigError, EngineDeadError
from cacheblend_rag.server.options import ServerOptions
from cacheblend_rag.server.tenants import KeyFile, TenantMiddleware, Who, salt

KEYS = '"sk-one" = "one"\n"sk-uno" = "one"\n"sk-two" = "two"\n'
ANSWERS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"]


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    file = tmp_path / "tenants.toml"
    file.write_text(KEYS + f'"sha256:{hashlib.sha256(b"sk-three").hexdigest()}" = "three"\n')
    return KeyFile(str(file))


async def ensure(namespace: str) -> str:
    if namespace == "two":
        raise EngineDeadError("the engine has died")
    if namespace == "three":
        raise RuntimeError("a fault of ours")
    return f"secret-{namespace}"


async def echo(request: Request) -> JSONResponse:
    raw = await request.body()
    length = request.headers.get("content-length")
    assert length is None or int(length) == len(raw)
    body = json.loads(raw) if raw else None
    whose = request.scope.get("state", {}).get("cacheblend_namespace")
    return JSONResponse({"body": body, "whose": whose})


def client(who: Who, max_body: int = 10_000) -> httpx.AsyncClient:
    app = Starlette(
        routes=[Route("/{path:path}", echo, methods=["GET", "POST", "PUT", "DELETE", "OPTIONS"])]
    )
    app.add_middleware(TenantMiddleware, who=who, ensure=ensure, max_body=max_body)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s")


@pytest.fixture
def asked(keys: KeyFile) -> httpx.AsyncClient:
    return client(Who(keys, None))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


ONE = bearer("sk-one")


@pytest.mark.parametrize("path", ANSWERS)
async def test_an_answer_is_asked_in_the_tenants_space(asked: Any, path: str) -> None:
    given = {"model": "m", "kv_transfer_params": {"cacheblend": {"mode": "off"}}}
    answer = (await asked.post(path, json=given, headers=ONE)).json()
    ours = {"mode": "off", "space": "secret-one"}
    assert answer["whose"] == "one"
    assert answer["body"] == {
        "model": "m",
        "kv_transfer_params": {"cacheblend": ours},
        "cache_salt": salt("secret-one", None),
    }


async def test_what_an_answer_says_is_in_the_log_is_there(
    asked: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM turns it off
    answer = await asked.post(ANSWERS[0], json={"model": "m"}, headers=bearer("sk-three"))
    assert answer.status_code == 500 and "its log has the cause" in answer.text
    assert "a fault of ours" in caplog.text


def test_salts_are_apart() -> None:
    salts = [salt(space, own) for space in ("a", "b") for own in (None, "x", "y", '", "x')]
    assert len(set(salts)) == len(salts)


async def test_a_clients_own_salt_is_kept_within_the_tenants(asked: Any) -> None:
    both = [
        (await asked.post(ANSWERS[0], json={"cache_salt": own}, headers=ONE)).json()["body"]
        for own in ("x", "y")
    ]
    assert both[0]["cache_salt"] != both[1]["cache_salt"]
    assert (await asked.post(ANSWERS[0], json={"cache_salt": 5}, headers=ONE)).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"kv_transfer_params": {"cacheblend": {"space": "secret-two"}}},
        {"kv_transfer_params": {"cacheblend": {"space": None}}},
        {"kv_transfer_params": {"cacheblend": {"request_id": "x"}}},
        {"kv_transfer_params": {"cacheblend": []}},
        {"kv_transfer_params": {"cacheblend": {"handed_over": {"start": None, "tag": ""}}}},
        {"kv_transfer_params": {"do_remote_decode": True}},
        {"kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [[7]]}},
        {"kv_transfer_params": {"cacheblend": {}, "prompt_token_ids": [1]}},
        {"kv_transfer_params": {"": None}},
        {"ec_transfer_params": {"a": {"do_remote": True}}},
        {"kv_transfer_params": "x"},
        {"previous_response_id": "resp_x"},
        {"background": True},
    ],
    ids=str,
)
async def test_what_only_the_server_may_say_is_refused(asked: Any, body: dict[str, Any]) -> None:
    answer = await asked.post("/v1/responses", json=body, headers=ONE)
    assert answer.status_code == 400 and answer.json()["error"]["param"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/invocations"),
        ("POST", "/v1/chat/completions/batch"),
        ("POST", "/v1/systemone"),
        ("POST", "/inference/v1/generate"),
        ("GET", "/v1/responses/resp_x"),
        ("POST", "/collective_rpc"),
        ("POST", "/sleep"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "//v1/chat/completions"),
        ("POST", "/health"),
        ("GET", "/server_info"),
        ("PUT", "/v1/cacheblendx"),
    ],
)
async def test_what_can_not_carry_a_tenant_is_not_served(
    asked: Any, method: str, path: str
) -> None:
    assert (await asked.request(method, path, headers=ONE, content=b"{}")).status_code == 403
    assert (await asked.request(method, path, content=b"{}")).status_code == 401


@pytest.mark.parametrize("key", ["", "sk-on", "sk-one ", "SK-ONE", "one", "sha256:"])
async def test_who_has_no_key(asked: Any, key: str) -> None:
    answer = await asked.get("/v1/cacheblend", headers=bearer(key))
    expected = 200 if key.strip() == "sk-one" else 401  # blanks around it are no part of a header
    assert answer.status_code == expected
    if expected == 401:
        assert answer.json()["error"]["type"] == "AuthenticationError"


async def test_whose_the_endpoints_are_asked(asked: Any) -> None:
    for key, namespace in (("sk-uno", "one"), ("sk-two", "two"), ("sk-three", "three")):
        for path in ("/v1/cacheblend", "/v1/cacheblend/chunks", "/v1/models"):
            answer = await asked.get(path, headers=bearer(key))
            assert answer.json() == {"body": None, "whose": namespace}
    assert (await asked.get("/health")).json()["whose"] is None
    assert (await asked.options("/v1/completions")).status_code == 200


async def test_bad_bodies(asked: Any) -> None:
    post = asked.post
    assert (await post(ANSWERS[1], content=b"{", headers=ONE)).status_code == 400
    assert (await post(ANSWERS[1], content=b"[]", headers=ONE)).status_code == 400
    assert (await post(ANSWERS[1], content=b" " * 10_001, headers=ONE)).status_code == 413

    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 1000

    assert (await post(ANSWERS[1], content=endless(), headers=ONE)).status_code == 413


async def test_a_space_that_can_not_be_opened(asked: Any) -> None:
    """Never served in another's."""
    answer = await asked.post(ANSWERS[1], json={}, headers=bearer("sk-two"))
    assert answer.status_code == 503


async def test_a_header_of_a_proxy() -> None:
    asked = client(Who(None, "X-Team"))
    answer = await asked.get("/v1/cacheblend", headers={"x-team": " red "})
    assert answer.json()["whose"] == "red"
    for missing in ({}, {"x-team": " "}):
        assert (await asked.get("/v1/cacheblend", headers=missing)).status_code == 401
    forged = [("x-team", "blue"), ("x-team", "red")]  # the client's, and the proxy's behind it
    assert (await asked.get("/v1/cacheblend", headers=forged)).status_code == 401


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "a = 1", '"" = ""', 'a = ""', '[a]\nb = "c"', '"sha256:12" = "a"'),
        *('"" = "red"', '" " = "red"'),  # whoever sends an empty key would be red
        f'"a" = "red"\n"sha256:{hashlib.sha256(b"a").hexdigest()}" = "blue"',
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError):
        KeyFile(str(tmp_path / "t"))
    with pytest.raises(ConfigError, match="can't be read"):
        KeyFile(str(tmp_path / "absent"))


def test_options() -> None:
    options = ServerOptions.of({"max_body": 5, "tenants": "t"})
    assert options.to_plain() == {"max_body": 5, "tenants": "t"} and options.has_tenants
    assert not ServerOptions().has_tenants and ServerOptions().to_plain() == {}
    for wrong in ([], {"max_bdy": 3}, {"max_body": 0}, {"max_body": True}, {"state": ""}):
        with pytest.raises(ConfigError):
            ServerOptions.of(wrong)
    with pytest.raises(ConfigError, match="not both"):
        ServerOptions(tenants="a", tenant_header="b")
