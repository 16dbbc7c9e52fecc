"""Servers that several files of unit tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import RedisServer


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    pytest.importorskip("redis")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()
