"""What an API process has for its endpoints: the engine, a front for each namespace, the jobs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engine.base import NO_PARSERS, ParserNames
from cacheblend_rag.engine.client import ClientEngine
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.models import cache_home
from cacheblend_rag.server.errors import HttpError, StateError
from cacheblend_rag.server.front import Front
from cacheblend_rag.server.jobs import Jobs
from cacheblend_rag.server.options import SERVER, ServerOptions
from cacheblend_rag.server.runner import Runner
from cacheblend_rag.store.url import parse_url
from cacheblend_rag.undo import on_failure


class Service:
    """Made in another thread than the event loop's, whose RPCs it waits for.

    Args:
        client: vLLM's engine client, on the event loop ``loop``.
        online: vLLM's ``OnlineRenderer``, which its endpoints share.
        extra: the connector's extra config.
        server: process id of the server, which all of its API processes know.
        parsers: those of vLLM that its answers are read by.

    Raises:
        StateError: the file of the jobs can't be used.
    """

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        online: Any,
        extra: Mapping[str, Any],
        server: int,
        parsers: ParserNames = NO_PARSERS,
    ) -> None:
        self.options = ServerOptions.of(extra.get(SERVER, {}))
        # vLLM's endpoints have their own arguments of the chat template; these are the prefix's
        passed = {n: v for n, v in extra.items() if n not in (SERVER, "chat_template_kwargs")}
        config = BlendConfig.of(passed, "the extra config")
        self.engine = ClientEngine(client, loop, online, parsers)
        self.front = Front.of(self.engine, config)
        self._fronts, self._opening = dict[str, Front](), dict[str, Lock]()
        aside = self.front.learnt_ingestion(), self.front.shadowing()
        with _naming_failures():
            folder = state_folder(self.options.state, config.store, server)
            name = folder / _name(self.front, config)
            self.jobs = Jobs(name.with_suffix(".sqlite"), self.options.max_queued_tokens)
            with on_failure(self.jobs.close):
                if parse_url(config.store).scheme in ("memory", "null"):
                    self.jobs.forget_ended(str(self.engine.state["instance"]))
                self._secret = self.jobs.about("secret", secrets.token_hex(32))
                lock = name.with_suffix(".lock")
                self.runner = Runner(self.jobs, self.front_of, lock, *aside)
        self.engine.before_end(self.close)

    def found(self, namespace: str | None) -> Front | None:
        """``front_of`` where it is open. Waits for nothing."""
        if not (self.options.has_tenants and namespace):
            return self.front
        return self._fronts.get(namespace)

    def front_of(self, namespace: str | None) -> Front:
        """That of a tenant, or of the server's own namespace."""
        if (found := self.found(namespace)) is not None:
            return found
        assert namespace
        # Each has a lock of its own: opening one goes through what is stored, for seconds where
        # that is much.
        with self._opening.setdefault(namespace, Lock()):
            if namespace not in self._fronts:
                self._fronts[namespace] = self._open(namespace)
            return self._fronts[namespace]

    def space_of(self, namespace: str) -> str:
        """The secret name of a tenant's space; opened where it is not yet."""
        self.front_of(namespace)
        return self._space_name(namespace)

    def close(self) -> None:
        """The server is about to end: the job that runs goes on another time."""
        self.engine.close()
        self.runner.stop()

    def _open(self, namespace: str) -> Front:
        config = replace(self.front.config, namespace=namespace)
        return self.front.tenant(config, self._space_name(namespace))

    def _space_name(self, namespace: str) -> str:
        name = hmac.digest(self._secret.encode(), namespace.encode(), hashlib.sha256)
        return f"tenant-{name.hex()}"


def _name(front: Front, config: BlendConfig) -> str:
    """Of the files of a server whose chunks have other keys, or are in another store, it is
    another.
    """
    identity = f"{front.key_space.key(())}/{store_identity(config.store)}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def store_identity(store: str) -> str:
    """Which store it is, however it is spelt: without credentials, and without the options of one
    who uses it.
    """
    url = parse_url(store)
    if not url.is_remote:
        return f"{url.scheme}:{os.path.realpath(url.path) if url.path else ''}"
    # not by urlsplit, which refuses what a store's own client may take
    host, _, path = url.path.partition("://")[2].partition("/")
    host = host.rpartition("@")[2]
    if url.scheme in ("redis", "rediss"):
        host = host.lower() if re.search(r":[0-9]+$", host) else f"{host.lower()}:6379"
        path = path or "0"
    endpoint = url.options.get("endpoint", "").rstrip("/")
    return f"{url.scheme}://{host}/{path.rstrip('/')}?{endpoint}"


@contextmanager
def _naming_failures() -> Iterator[None]:
    """Raise StateError where the file of the jobs, or its folder, can't be used."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise StateError(
            f"the file of the ingestions can't be used: {error}. Make room on its disk or move the "
            "file away, with what waits in it, or start with another --state DIR"
        ) from error


def state_folder(given: str | None, store: str, server: int) -> Path:
    """Where the jobs are; made where it is not there yet. Beside a store in a folder; with one in
    memory, in a temporary folder that goes with the server, as the KV does.

    Raises:
        StateError: it can't be made.
    """
    url = parse_url(store)
    if given is None and url.scheme in ("memory", "null"):
        return _temporary(server)
    try:
        if given is not None:
            folder = Path(given).expanduser().absolute()
        elif url.scheme == "file":
            folder = Path(f"{os.path.realpath(url.path)}-serve")
        else:
            folder = cache_home() / "serve"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no such home folder
        raise StateError(
            f"the folder of the jobs can't be made: {error}. Name another one: --state DIR"
        ) from error
    return folder


def _temporary(server: int) -> Path:
    """One of this user's for the server of this process id; those of servers that ended go."""
    base = Path(tempfile.gettempdir()) / f"cacheblend-serve-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    about = base.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077 or base.is_symlink():
        raise StateError(f"{base} is not a folder of yours alone; remove it, or give --state DIR")
    for old in base.iterdir():
        if old.name.isdigit() and not Path(f"/proc/{old.name}").exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = base / str(server)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Absent:
    """In the place of a service that could not be made: every endpoint says why."""

    def __init__(self, error: CacheBlendError) -> None:
        is_state = isinstance(error, StateError)
        self._error, self._code = error, "state_unavailable" if is_state else "not_available"

    def answer(self) -> HttpError:
        """What a request is answered with."""
        return HttpError(503, str(self._error), code=self._code)
