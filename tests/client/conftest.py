"""One fake engine behind one fake server for all tests of a file: nothing here computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")
from fake_engine import fake_blend
from fake_server import FakeServer, serving

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.client import failures


@pytest.fixture(scope="module")
def behind() -> Iterator[CacheBlend]:
    """The front door in the server's process."""
    with pytest.MonkeyPatch.context() as patch:
        config = BlendConfig(ingest_prefix="document", store="memory://?capacity=1GiB")
        with fake_blend(patch, config=config) as blend:
            yield blend


@pytest.fixture(scope="module")
def module_server(behind: CacheBlend) -> Iterator[FakeServer]:
    with serving(behind) as server:
        yield server


@pytest.fixture
def server(module_server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """The file's server, as it is at its start but for what it has stored: nothing."""
    monkeypatch.setattr(failures, "_FIRST_WAIT_S", 0.01)
    module_server.reset()
    return module_server


@pytest.fixture
def remote(server: FakeServer) -> Iterator[CacheBlend]:
    with CacheBlend.connect(server.url, timeout=20) as blend:
        server.calls.clear()
        yield blend
