"""A serving engine and other processes on one store."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engines import start
from tiny import Words, make

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.errors import StoreError

pytestmark = pytest.mark.vllm

words = Words(23)
PREFIX = words(4)
CHUNKS = [words(size) for size in (70, 90, 64)]
SOON_S = 12  # of 3 promised; the machine may be busy

_WRITER = """
import sys
from pathlib import Path
from cacheblend_rag.store import DiskStore

folder = Path(sys.argv[1])
[namespace] = [path.name for path in (folder / "v3").iterdir()]
with DiskStore(folder, namespace=namespace) as store:
    held = {info.key: store.get(info.key) for info in store.scan()}
    for key in held:
        store.discard(key)
    print(len(held), flush=True)
    input()
    for key, chunk in held.items():
        store.put(key, chunk)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "kv"


@pytest.fixture(scope="module")
def blend(folder: Path, tiny_models: Path) -> Iterator[CacheBlend]:
    config = BlendConfig(ingest_prefix=PREFIX, store=f"{folder}?memory=1GiB", blend_if="always")
    with start(make("llama", tiny_models), engine="serving", config=config) as opened:
        yield opened


def until(condition: Callable[[], bool]) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < SOON_S
        time.sleep(0.02)
    return time.monotonic() - started


def test_another_process_forgets_and_stores(
    blend: CacheBlend, folder: Path, request: pytest.FixtureRequest
) -> None:
    blend.ingest(CHUNKS, progress=False)
    asked = 0

    def reused() -> int:
        nonlocal asked
        asked += 1
        ids = (*words(5), *CHUNKS[0], *CHUNKS[1], *words(9), asked)
        return blend.generate(ids, max_tokens=1).report.tokens_reused

    assert reused() > 0
    assert blend.stats()[0]["hits"] > 0
    command = [sys.executable, "-c", _WRITER, str(folder)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        assert int(writer.stdout.readline()) >= len(CHUNKS)
        lost = until(lambda: len(blend.stored()) == 0)
        assert reused() == 0, "memory has it no more"
        print(file=writer.stdin, flush=True)
        assert writer.wait(30) == 0
    learnt = until(lambda: reused() > 0)
    assert all(key in blend.stored() for key in map(blend.key, CHUNKS))
    request.node.user_properties += [("lost_s", round(lost, 2)), ("learnt_s", round(learnt, 2))]


def test_a_stream_goes_on_while_another_process_holds_the_index(
    blend: CacheBlend, folder: Path, request: pytest.FixtureRequest
) -> None:
    """Ingestion waits, and says so where it waited in vain; who decodes does not."""
    blend.ingest(CHUNKS, progress=False)
    ended = threading.Event()

    def ingest() -> None:
        try:
            blend.ingest([words(50)], progress=False)
            blend.register_documents({"a": [blend.key(CHUNKS[0])]})
        except StoreError:
            pass
        ended.set()

    held = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    stream = blend.stream((*words(30),), max_tokens=900, ignore_eos=True, mode="off")
    pieces = iter(stream)
    next(pieces)
    held.execute("BEGIN IMMEDIATE")
    ingesting = threading.Thread(target=ingest)
    ingesting.start()
    gaps, before = [], time.monotonic()
    until_s = before + 3
    for _ in pieces:
        now = time.monotonic()
        gaps.append(now - before)
        before = now
        if now > until_s:
            break
    waited = not ended.is_set()
    stream.close()
    held.close()  # lets go
    ingesting.join(30)
    assert ended.is_set()
    request.node.user_properties += [("longest_s", round(max(gaps), 3)), ("pieces", len(gaps))]
    assert waited, "the index was held, or this shows nothing"
    assert max(gaps) < 1.5
