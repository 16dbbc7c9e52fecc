"""What an API process opens: the file of the jobs, and a front for each tenant."""

from __future__ import annotations

import sqlite3
import threading
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cacheblend_rag.server import service as module
from cacheblend_rag.server.errors import StateError
from cacheblend_rag.server.options import ServerOptions
from cacheblend_rag.server.plugin import CacheBlendEndpoints
from cacheblend_rag.server.service import Service, state_folder, store_identity

# ---- tenants -------------------------------------------------------------------------------------


def with_tenants(monkeypatch: pytest.MonkeyPatch, opens: Any) -> Service:
    service = object.__new__(Service)
    service.options = ServerOptions(tenant_header="X-Tenant")
    service._fronts, service._opening = {}, {}
    monkeypatch.setattr(service, "_open", opens, raising=False)
    return service


def test_a_tenant_that_is_being_opened_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, over, opened = threading.Event(), threading.Event(), list[str]()

    def opens(namespace: str) -> Any:
        opened.append(namespace)
        if namespace == "a":
            begun.set()
            assert over.wait(20)
        return f"front of {namespace}"

    service, found = with_tenants(monkeypatch, opens), list[Any]()
    before: Any = service.front_of("b")

    def ask(namespace: str) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.append(service.front_of(namespace)))
        thread.start()
        return thread

    waiting = [ask("a"), ask("a")]
    assert begun.wait(10)
    for other in map(ask, ("b", "c")):
        other.join(5)
        assert not other.is_alive()
    assert sorted(found) == [before, "front of c"]
    over.set()
    for thread in waiting:
        thread.join(10)
    assert opened == ["b", "a", "c"] and found[2:] == ["front of a"] * 2, "each is opened once"


def test_one_that_could_not_be_opened_is_opened_another_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = [OSError("away")]

    def opens(namespace: str) -> Any:
        if errors:
            raise errors.pop()
        return namespace

    service = with_tenants(monkeypatch, opens)
    with pytest.raises(OSError, match="away"):
        service.front_of("a")
    assert str(service.front_of("a")) == "a"


# ---- which store it is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spellings",
    [
        ["redis://h:6379/0", "redis://user:p@ss@H/0?timeout=2s&memory=1GiB", "redis://h"],
        ["redis://h:1/3", "redis://:new@h:1/3?dtype=fp8&disk=/d&capacity=1GiB"],
        ["s3://b/a", "s3://b/a/?region=eu-1", "s3://b/a?timeout=1s&write=back"],
        ["s3://b/a?endpoint=http://h:9", "s3://b/a?endpoint=http://h:9/&memory=1GB"],
        ["gs://b/a@b", "gs://b/a@b?memory=1GB"],
        ["memory://", "memory://?capacity=1GiB"],
    ],
    ids=lambda spellings: spellings[0],
)
def test_a_store_is_the_same_however_it_is_spelt(spellings: list[str]) -> None:
    assert len({*map(store_identity, spellings)}) == 1
    assert "p@ss" not in store_identity(spellings[0]) and "new" not in store_identity(spellings[0])


def test_a_folder_is_the_same_however_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kv").mkdir()
    (tmp_path / "link").symlink_to("kv")
    names = [str(tmp_path / "kv"), f"file://{tmp_path}/kv/", "kv", "./x/../kv", "link", "kv/"]
    names.append(f"file://{tmp_path}/kv?capacity=1GiB&evict=lru&dtype=fp8")
    assert len({*map(store_identity, names)}) == 1
    assert {state_folder(None, name, 1) for name in names} == {tmp_path / "kv-serve"}


def test_other_stores_are_others() -> None:
    stores = ["redis://h/0", "redis://h/1", "redis://i/0", "redis://h:1/0", "rediss://h/0"]
    stores += ["s3://b/a", "s3://b/c", "s3://c/a", "s3://b/a?endpoint=http://h", "gs://b/a"]
    stores += ["s3://b/x@a", "/kv", "/kv2", "memory://", "null://"]
    assert len({*map(store_identity, stores)}) == len(stores)


# ---- a file that can't be used -------------------------------------------------------------------


def garbage(folder: Path) -> None:
    (folder / "the-name.sqlite").write_bytes(b"no database " * 1000)


def folder_in_its_place(folder: Path) -> None:
    (folder / "the-name.sqlite").mkdir()


def lock_that_is_a_folder(folder: Path) -> None:
    (folder / "the-name.lock").mkdir()


def full_disk(folder: Path) -> None:
    def full(*args: object, **options: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    module.Jobs.about = full  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "fault",
    [garbage, folder_in_its_place, lock_that_is_a_folder, full_disk],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("with_tenants", [False, True])
async def test_the_server_starts_without_its_endpoints(
    fault: Any, with_tenants: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has loaded a model, and answers."""
    front = SimpleNamespace(learnt_ingestion=lambda: None, shadowing=lambda: None)
    monkeypatch.setattr(
        module, "ClientEngine", lambda *args: SimpleNamespace(state={"instance": ""})
    )
    monkeypatch.setattr(module.Front, "of", lambda *args: front)
    monkeypatch.setattr(module, "_name", lambda *args: "the-name")
    monkeypatch.setattr(module.Jobs, "about", module.Jobs.about)
    fault(tmp_path)
    options = {"tenant_header": "X-Tenant"} if with_tenants else {}
    extra = {"store": "memory://", "server": {"state": str(tmp_path), **options}}
    transfer = SimpleNamespace(kv_connector_extra_config=extra)
    client = SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer))
    app, plugin = FastAPI(), CacheBlendEndpoints()
    app.state.args = Namespace(kv_transfer_config={"kv_connector_extra_config": extra})
    plugin.attach_router(app)
    app.post("/v1/completions")(lambda: "an answer")
    await plugin.init_state(client, app.state, app.state.args)
    headers = {"X-Tenant": "one"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://s", headers=headers) as ask:
        refused = await ask.get("/v1/cacheblend/ingestions")
        answer = await ask.post("/v1/completions", json={})
    error = refused.json()["error"]
    assert refused.status_code == 503 and error["code"] == "state_unavailable"
    assert "--state DIR" in error["message"]
    # Of tenants, nobody can be told apart: the secret names of their spaces are in that file.
    assert answer.status_code == (503 if with_tenants else 200)


def test_what_can_not_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateError, match="--state DIR"):
        state_folder("~nobody-of-this-name/x", "memory://", 1)
