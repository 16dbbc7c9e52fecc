"""A plugin of pytest: tests of the integrations run as they stand, but over HTTP.

Wherever one would start an engine in the process, it starts as ever, with a server before it, and
the object at hand is connected to that server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

# what is about an engine in this process: its own methods, its end, answers that take no time, and
# what is sent to it (a server is told a number of tokens where the engine takes None)
ONLY_EMBEDDED = (
    "errors_of_worker_processes_are_ours",
    "after_close_every_call",
    "leaving_a_stream_early",
    "other_names_for_the_same",
    "TestIntegration",
)


@pytest.fixture(autouse=True)
def over_http(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fake_server import serving

    from cacheblend_rag import shared
    from cacheblend_rag.blend import CacheBlend
    from cacheblend_rag.client import RemoteCacheBlend

    servers = contextlib.ExitStack()

    def starter(model: str, settings: Mapping[str, Any]) -> Callable[[], CacheBlend]:
        def start() -> CacheBlend:
            blend = CacheBlend(model, config=settings["config"], **settings["engine_args"])
            server = servers.enter_context(serving(blend))
            remote = CacheBlend.connect(server.url)
            remote._engine = blend._engine  # for tests that look into it
            remote._name, remote._space = blend._name, blend._space
            remote.__dict__["tokenizer"] = blend.tokenizer
            return remote

        return start

    monkeypatch.setattr(shared, "_starter", starter)
    for name in ("engine", "key_space"):
        monkeypatch.setattr(RemoteCacheBlend, name, vars(CacheBlend)[name])
    yield
    servers.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [i for i in items if not any(words in i.nodeid for words in ONLY_EMBEDDED)]
