"""A process that forks while it has a disk store open: the child shares none of SQLite's notes."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from chunks import chunk_of, key_of

from cacheblend_rag import StoreError
from cacheblend_rag.store import DiskStore, database
from cacheblend_rag.store.base import document_id

FORK = multiprocessing.get_context("fork")
# warns of threads, which are what is tested
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")

Child = Callable[[Connection], None]


def open_disk(folder: Path) -> DiskStore:
    return DiskStore(folder, namespace="tiny-r0")


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    store = open_disk(tmp_path)
    store.put(key_of(1), chunk_of(1))
    return store


def started(work: Child) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    here, there = FORK.Pipe()
    process = FORK.Process(target=work, args=(there,), daemon=True)
    process.start()
    there.close()
    return process, here


def answer(pipe: Connection) -> object:
    assert pipe.poll(20), "the child hangs"
    return pipe.recv()


def test_a_store_that_a_child_opens_survives_the_end_of_its_parents(
    store: DiskStore, tmp_path: Path
) -> None:
    """With the parent's locks in its notes, and none of its own, the child would write to files
    that the parent removes when it closes the index.
    """

    def child(pipe: Connection) -> None:
        own = open_disk(tmp_path)
        pipe.send(sorted(info.key for info in own.scan()))
        pipe.recv()
        own.register("the child's", [key_of(1)])
        pipe.send("registered")
        pipe.recv()

    process, pipe = started(child)
    assert answer(pipe) == [key_of(1)]
    store.close()
    pipe.send("closed")
    assert answer(pipe) == "registered"
    with open_disk(tmp_path) as again:
        assert again.documents() == {document_id("the child's")}
    pipe.send("end")
    process.join(20)
    assert process.exitcode == 0


def test_a_fork_waits_for_a_thread_that_writes(store: DiskStore) -> None:
    """Else the child would have its half of a transaction, and a lock that nobody lets go."""
    writes, goes_on = threading.Event(), threading.Event()

    def work(db: sqlite3.Connection) -> None:
        db.execute("UPDATE state SET tick = tick + 1")
        writes.set()
        goes_on.wait(20)

    thread = threading.Thread(target=store._catalog.index._database.write, args=(work,))
    thread.start()
    assert writes.wait(20)
    threading.Timer(0.3, goes_on.set).start()

    def child(pipe: Connection) -> None:
        store.put(key_of(2), chunk_of(2))
        pipe.send(store.stats().chunks)

    process, pipe = started(child)
    assert goes_on.is_set()
    assert answer(pipe) == 2
    process.join(20)
    thread.join(20)
    assert process.exitcode == 0
    assert {info.key for info in store.scan()} == {key_of(1), key_of(2)}
    store.close()


def test_a_fork_lists_no_folder_again(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[int] = []
    monkeypatch.setattr(store._catalog.index._database, "_fill", lambda: filled.append(1))
    process, _ = started(lambda _: None)
    process.join(20)
    assert store.stats().chunks == 1 and not filled
    store.close()


def test_a_fork_while_a_thread_hangs_in_the_index(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "TIMEOUT_S", 0.2)
    hangs, goes_on = threading.Event(), threading.Event()

    def work(db: sqlite3.Connection) -> None:
        hangs.set()
        goes_on.wait(20)

    thread = threading.Thread(target=store._catalog.index._database.read, args=(work,))
    thread.start()
    assert hangs.wait(20)

    def child(pipe: Connection) -> None:
        for use in (store.stats, lambda: open_disk(tmp_path)):
            with pytest.raises(StoreError, match="get_context"):
                use()
        store.close()
        pipe.send("refused")

    process, pipe = started(child)
    assert answer(pipe) == "refused"
    process.join(20)
    assert process.exitcode == 0
    goes_on.set()
    thread.join(20)
    assert store.stats().chunks == 1, "the parent goes on"
    store.close()
