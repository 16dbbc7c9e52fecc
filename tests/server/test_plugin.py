"""The endpoints of a server that has none of ours to reach: every one says why."""

from __future__ import annotations

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cacheblend_rag.engine import compat
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.server.plugin import CacheBlendEndpoints, _extra


async def app(client: Any, extra: dict[str, Any] | None = None) -> httpx.AsyncClient:
    given = {"kv_connector_extra_config": extra or {}}
    made, plugin = FastAPI(), CacheBlendEndpoints()
    made.state.args = Namespace(kv_transfer_config=given)
    plugin.attach_router(made)
    await plugin.init_state(client, made.state, made.state.args)
    return httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://s")


def by_hand(hybrid: bool = False, **extra: Any) -> Any:
    """vLLM's client of a server that was started without our worker extension."""
    parallel = SimpleNamespace(worker_extension_cls="")
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    model = SimpleNamespace(runner_type="generate", is_hybrid=hybrid, enable_sleep_mode=False)
    config = SimpleNamespace(
        parallel_config=parallel, kv_transfer_config=transfer, model_config=model
    )
    return SimpleNamespace(vllm_config=config)


@pytest.mark.parametrize("path", ["", "/chunks", "/ingestions", "/documents/d", "/requests/r"])
async def test_without_the_worker_extension(path: str) -> None:
    answer = await (await app(by_hand())).get(f"/v1/cacheblend{path}")
    assert answer.status_code == 503
    assert "--worker-extension-cls" in answer.json()["error"]["message"]


async def test_a_model_that_is_not_blended() -> None:
    answer = await (await app(by_hand(hybrid=True))).get("/v1/cacheblend")
    assert answer.status_code == 503 and "recurrent" in answer.json()["error"]["message"]


async def test_without_an_engine_or_with_wrong_options() -> None:
    for client in (None, by_hand(stor="x")):
        answer = await (await app(client)).post("/v1/cacheblend/ingestions", json={})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_available"


@pytest.mark.parametrize("plain", [True, False])
def test_options_are_found_within_vllms_multi_connector(plain: bool) -> None:
    """Without them, tenants would be one."""
    mine = {"store": "x", "server": {"tenants": "t"}}
    held = [
        {"kv_connector": "NixlConnector", "kv_role": "kv_producer"},
        {"kv_connector": "CacheBlendConnector", "kv_connector_extra_config": mine},
    ]
    whole = {"kv_connector_extra_config": {"connectors": held}}
    assert _extra(whole if plain else SimpleNamespace(**whole)) == mine
    assert _extra({"kv_connector_extra_config": {"connectors": held[:1]}})["connectors"]


async def test_unknown_paths() -> None:
    asked = await app(None)
    for method, path in (("GET", "/x"), ("PATCH", "/chunks"), ("DELETE", "")):
        answer = await asked.request(method, f"/v1/cacheblend{path}")
        assert answer.status_code == 404 and path in answer.json()["error"]["message"]


@pytest.mark.parametrize("has_salts", [True, False])
async def test_tenants_have_no_messages_where_vllm_passes_their_salt_over(
    has_salts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would find one another's blocks in the prefix cache."""
    monkeypatch.setattr(compat, "messages_have_salts", lambda: has_salts)
    asked = await app(None, {"server": {"tenant_header": "X-Tenant"}})
    answer = await asked.post("/v1/messages", json={}, headers={"X-Tenant": "one"})
    assert answer.status_code == (503 if has_salts else 403)
    if not has_salts:
        assert "not served to tenants" in answer.json()["error"]["message"]


async def test_wrong_options_of_the_server_end_its_start() -> None:
    """Or it would serve tenants as one."""
    with pytest.raises(ConfigError):
        await app(None, {"server": {"tenant": "x"}})
    with pytest.raises(ConfigError):
        await app(None, {"server": {"tenants": "/no/such/file"}})
