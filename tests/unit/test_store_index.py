"""The index of a store folder: in step with the files, shared, rebuilt, never trusted."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from chunks import chunk_of, key_of, same

from cacheblend_rag.store import DiskStore, database
from cacheblend_rag.store.base import document_id
from cacheblend_rag.store.catalog import Recovery
from cacheblend_rag.store.evict import GDSF, LRU
from cacheblend_rag.store.index import Index

warned = partial(pytest.warns, RuntimeWarning, match="The store works without it")
FORK = multiprocessing.get_context("fork")


def open_disk(folder: Path, namespace: str = "tiny-r0", capacity: int | None = None) -> DiskStore:
    return DiskStore(folder, namespace=namespace, capacity_bytes=capacity)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    with open_disk(tmp_path) as store:
        for seed in range(5):
            store.put(key_of(seed), chunk_of(seed))
        store.register("a", [key_of(0)])
    return tmp_path


def scanned(store: DiskStore) -> list[int]:
    """Seeds, which the token ids tell; in the order of the index."""
    infos = list(store.scan())
    assert all(info.key == key_of(info.token_ids[0] // 1000) for info in infos)
    return [info.token_ids[0] // 1000 for info in infos]


def file_of(folder: Path, seed: int) -> Path:
    (path,) = folder.rglob(f"{key_of(seed)}.safetensors")
    return path


def index_files(folder: Path) -> list[Path]:
    return list(folder.glob("index.sqlite*"))


# --- in step with the files -----------------------------------------------------------------------


def test_a_clean_end_leaves_nothing_to_recover(filled: Path) -> None:
    with open_disk(filled) as store:
        assert store.recovery == Recovery()
        assert scanned(store) == [0, 1, 2, 3, 4]


def test_files_copied_in_and_removed_by_hand(filled: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    with open_disk(extra) as other:
        other.put(key_of(7), chunk_of(7))
    source = file_of(extra, 7)
    target = filled / source.relative_to(extra)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    file_of(filled / "v3", 2).unlink()
    with open_disk(filled) as store:
        assert store.recovery == Recovery(adopted=1, vanished=1)
        assert scanned(store) == [0, 1, 3, 4, 7]
        file_of(filled / "v3", 3).unlink()
        assert scanned(store) == [0, 1, 4, 7]  # seen without opening again
        assert store.stats().chunks == 4


def test_another_processs_chunks_are_seen_at_once(filled: Path) -> None:
    with open_disk(filled) as one:
        numbers = [number for number, _ in one.scan_after(0)]
        with open_disk(filled) as two:
            two.put(key_of(9), chunk_of(9))
            two.discard(key_of(0))
        news = list(one.scan_after(numbers[-1]))
        assert [info.key for _, info in news] == [key_of(9)]
        assert one.contains(key_of(9))
        assert not one.contains(key_of(0))
        assert list(one.scan_after(news[-1][0])) == []


@pytest.mark.parametrize(
    "damage",
    ["deleted", "garbage", "empty", "cut", "foreign table", "trigger", "view", "wal", "folder"],
)
def test_a_damaged_index_is_made_anew(filled: Path, damage: str) -> None:
    path = filled / "index.sqlite"
    if damage == "deleted":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(random.Random(1).randbytes(100_000))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "wal":
        path.with_name("index.sqlite-wal").write_bytes(random.Random(2).randbytes(50_000))
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        statements = {
            "foreign table": "CREATE TABLE more (x)",
            "trigger": "CREATE TRIGGER sqlite_sequence_x AFTER UPDATE ON state BEGIN "
            "DELETE FROM chunks; END",
            "view": "CREATE VIEW v AS SELECT load_extension('evil')",
        }
        db = sqlite3.connect(path)
        if damage == "trigger":
            statement = statements[damage].replace("sqlite_sequence_x", "sequence_x")
        else:
            statement = statements[damage]
        db.execute(statement)
        db.commit()
        db.close()
    is_rebuilt = damage in {"garbage", "cut", "foreign table", "trigger", "view"}
    expected: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if damage == "folder":
        expected = warned()
    elif is_rebuilt:
        expected = pytest.warns(RuntimeWarning, match=r"was damaged .* is made anew")
    with expected, open_disk(filled) as store:
        assert sorted(scanned(store)) == [0, 1, 2, 3, 4]
        assert all(same(store.get(key_of(seed)), chunk_of(seed)) for seed in range(5))
        assert store.stats().chunks == 5
        if is_rebuilt:
            assert store.recovery.index_rebuilt
            assert store.recovery.adopted == 5


@pytest.mark.filterwarnings("ignore:The index of the chunk store .* was damaged:RuntimeWarning")
def test_an_index_that_lies_serves_nothing_wrong(filled: Path) -> None:
    """Rows that no store wrote: other types, paths, other tokens, sizes."""
    db = sqlite3.connect(filled / "index.sqlite")
    db.execute("UPDATE contents SET tokens = ? WHERE id = 1", (b"odd",))
    db.execute("UPDATE contents SET kv_bytes = -5 WHERE id = 2")
    for namespace, key in (("../../x", bytes(32)), ("tiny-r0", b"short"), ("tiny-r0", bytes(40))):
        db.execute(
            "INSERT INTO chunks (namespace, key, nbytes, cost, heat, tick, priority) "
            "VALUES (?, ?, 1000000, 1, 0, 0, -1000)",
            (namespace, key),
        )
    db.execute("UPDATE totals SET nbytes = -1000, chunks = -7")
    db.execute("UPDATE state SET policy = 'unknown', age = 1e18")
    db.commit()
    db.close()
    outside = filled.parent / "x" / "00"
    outside.mkdir(parents=True)
    victim = outside / f"{'0' * 64}.safetensors"
    victim.write_bytes(b"precious")
    with open_disk(filled, capacity=6000) as store:
        list(store.scan())
        for seed in range(20, 60):
            store.put(key_of(seed), chunk_of(seed))
            found = store.get(key_of(seed))
            assert found is None or same(found, chunk_of(seed))
        sizes = [path.stat().st_size for path in filled.rglob("*.safetensors")]
        assert sum(sizes) <= 6000
    assert victim.read_bytes() == b"precious"


def test_the_order_of_use_survives_a_lost_index(filled: Path) -> None:
    with open_disk(filled) as store:
        store.get(key_of(0))
    for path in index_files(filled):
        path.unlink()
    with open_disk(filled) as store:
        assert store.recovery.adopted == 5
        assert scanned(store)[-1] == 0


# --- several processes ----------------------------------------------------------------------------


def put_many(folder: Path, first: int, count: int, capacity: int | None) -> None:
    with open_disk(folder, capacity=capacity) as store:
        for seed in range(first, first + count):
            store.put(key_of(seed), chunk_of(seed))
            found = store.get(key_of(seed))
            if found is not None and not same(found, chunk_of(seed)):
                os._exit(1)
    os._exit(0)


def test_two_writers_of_the_same_chunks(tmp_path: Path) -> None:
    writers = [FORK.Process(target=put_many, args=(tmp_path, 0, 40, None)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    with open_disk(tmp_path) as store:
        assert sorted(scanned(store)) == list(range(40))
        assert store.recovery == Recovery()
        assert store.stats().corrupt == 0


def test_writers_together_keep_the_capacity(tmp_path: Path) -> None:
    size = 780
    capacity = 20 * size
    writers = [
        FORK.Process(target=put_many, args=(tmp_path, 1000 * n, 60, capacity)) for n in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    with open_disk(tmp_path, capacity=capacity) as store:
        chunks, nbytes = store.stats()[:2]
        on_disk = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
        assert (len(on_disk), sum(on_disk)) == (chunks, nbytes)
        assert nbytes <= capacity
        assert chunks >= 10


def test_a_store_used_after_a_fork(filled: Path) -> None:
    store = open_disk(filled)

    def child() -> None:
        store.put(key_of(50), chunk_of(50))
        os._exit(0 if sorted(scanned(store)) == [0, 1, 2, 3, 4, 50] else 1)

    process = FORK.Process(target=child)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert store.contains(key_of(50))
    store.close()


def test_a_process_that_holds_the_index_holds_up_no_reader(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_disk(filled) as store:
        other = sqlite3.connect(filled / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        for _ in range(100):
            assert same(store.get(key_of(1)), chunk_of(1))
        assert time.monotonic() - started < 2
        monkeypatch.setattr(database, "TIMEOUT_S", 0.2)
        monkeypatch.setattr(database, "_AWAY_S", 0)
        with warned():
            store.put(key_of(9), chunk_of(9))
        store.register("b", [key_of(9)])
        assert sorted(scanned(store)) == [0, 1, 2, 3, 4, 9]
        other.execute("ROLLBACK")
        other.close()
        store.put(key_of(10), chunk_of(10))
    with open_disk(filled) as store:
        assert store.recovery == Recovery()  # what was kept in memory was written later
        assert store.documents() == {document_id("a"), document_id("b")}


# --- clocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [-10 * 365 * 86400, 10 * 365 * 86400])
@pytest.mark.parametrize("policy", [GDSF(), LRU()], ids=lambda policy: policy.name)
def test_clocks_that_jump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float, policy: GDSF | LRU
) -> None:
    real_ns, real = time.time_ns, time.time
    store = DiskStore(tmp_path, namespace="tiny-r0", capacity_bytes=3 * 780, policy=policy)
    store.put(key_of(0), chunk_of(0))
    store.put(key_of(1), chunk_of(1))
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(jump * 1e9))
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    store.put(key_of(2), chunk_of(2))
    store.get(key_of(0))
    store.put(key_of(3), chunk_of(3))
    assert [store.contains(key_of(seed)) for seed in range(4)] == [True, False, True, True]
    with DiskStore(tmp_path, namespace="tiny-r0", capacity_bytes=3 * 780, policy=policy) as again:
        assert again.recovery == Recovery()
        assert all(same(again.get(key_of(seed)), chunk_of(seed)) for seed in (0, 2, 3))


def test_set_aside_files_do_not_pile_up(tmp_path: Path) -> None:
    for round_ in range(20):
        with open_disk(tmp_path) as store:
            store.put(key_of(1), chunk_of(1))
            file_of(tmp_path, 1).write_bytes(b"x" * round_)
            assert store.get(key_of(1)) is None
    with open_disk(tmp_path):
        assert len(list(tmp_path.rglob("*.corrupt-*"))) == 16


def test_many_open_a_new_index_at_once(tmp_path: Path) -> None:
    """As the ranks of a tensor parallel group do; SQLite's own patience leaves out one step."""
    for turn in range(20):
        folder = tmp_path / str(turn)
        folder.mkdir()
        together = threading.Barrier(4)

        def opened(where: Path = folder, together: threading.Barrier = together) -> None:
            together.wait()
            Index(where, None, lambda: None).close()

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(opened) for _ in range(4)]:
                done.result()
