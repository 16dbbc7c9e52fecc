"""A store whose index is damaged, or cannot be used, goes on as if it were not: small versions of
the runs of ``benchmarks/store_faults.py``.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark import benchmark
from chunks import chunk_of, key_of, same

from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.store import DiskStore
from cacheblend_rag.store.catalog import opened
from cacheblend_rag.store.chunk_file import ChunkHeader


def disk(folder: Path) -> DiskStore:
    return DiskStore(folder, namespace="tiny-r0")


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    return benchmark("store_faults")


@pytest.mark.filterwarnings("ignore:The index of the chunk store")
def test_damaged_indexes_are_opened_with_all_chunks(faults: ModuleType) -> None:
    counts = faults.closed(4 * len(faults.DAMAGES), seed=7, chunks=30)
    assert counts["wrong"] == {}


@pytest.mark.filterwarnings("ignore:The index of the chunk store")
def test_an_index_damaged_under_an_open_store(faults: ModuleType) -> None:
    counts = faults.under_way(2 * len(faults.DAMAGES), seed=7)
    assert counts["wrong"] == {}
    assert counts["operations"] > 1000


@pytest.mark.filterwarnings("ignore:The index of the chunk store")
def test_a_disk_full_to_the_last_byte_serves_and_is_pruned(faults: ModuleType) -> None:
    counts = faults.full(48)
    if "skipped" in counts:
        pytest.skip(counts["skipped"])
    assert counts["served_full"] == counts["listed"] == counts["served_after_opening"] == 300
    assert counts["forgotten"] == 1
    assert counts["bytes_after_prune_to_1MiB"] <= 1 << 20


@pytest.mark.filterwarnings("ignore:The index of the chunk store .* was damaged:RuntimeWarning")
def test_a_trigger_made_under_an_open_store_hides_no_chunk(tmp_path: Path) -> None:
    with disk(tmp_path) as store:
        db = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
        db.execute("CREATE TRIGGER evil AFTER INSERT ON contents BEGIN DELETE FROM contents; END")
        db.close()
        store.put(key_of(1), chunk_of(1))
        assert [info.key for info in store.scan()] == [key_of(1)]


@pytest.mark.parametrize("nbytes", [1, 1 << 40])
def test_pruning_goes_by_the_files(tmp_path: Path, nbytes: int) -> None:
    with disk(tmp_path) as store:
        for seed in range(9):
            store.put(key_of(seed), chunk_of(seed))
    db = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
    db.execute("UPDATE chunks SET nbytes = ? WHERE id < 9", (nbytes,))
    db.close()
    with disk(tmp_path) as store:
        assert store.trim(5 * 780) >= 4
        left = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
        assert 3 * 780 < sum(left) <= 5 * 780


@pytest.mark.filterwarnings("ignore:The index of the chunk store .* was damaged:RuntimeWarning")
@pytest.mark.parametrize("noted", [2**62, 1 << 40])
@pytest.mark.parametrize("when", ["closed", "open", "put", "while it prunes"])
def test_nothing_leaves_for_a_size_that_is_only_noted(
    tmp_path: Path, noted: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil() -> None:
        db = sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)
        with contextlib.closing(db):
            db.execute("UPDATE chunks SET nbytes = ? WHERE id = 3", (noted,))
            db.execute("UPDATE totals SET nbytes = ?", (noted,))

    with DiskStore(tmp_path, namespace="tiny-r0", capacity_bytes=1 << 30) as store:
        for seed in range(9):
            store.put(key_of(seed), chunk_of(seed))
        if when == "put":
            spoil()
            store.put(key_of(9), chunk_of(9))
            store.discard(key_of(9))
        elif when == "open":
            spoil()
            assert store.trim(1 << 30) == 0
        elif when == "while it prunes":
            measure = store._catalog.measure
            monkeypatch.setattr(store._catalog, "measure", lambda: (measure(), spoil())[0])
            assert store.trim(1 << 30) == 0
    if when == "closed":
        spoil()
    with DiskStore(tmp_path, namespace="tiny-r0", capacity_bytes=1 << 30) as store:
        assert len(list(store.scan())) == 9
        assert all(same(store.get(key_of(seed)), chunk_of(seed)) for seed in range(9))


# --- forgetting -----------------------------------------------------------------------------------


def forgetting(folder: Path, turns: int, go: Any, done: Any) -> None:
    with disk(folder) as store:
        for turn in range(turns):
            go.wait()
            store.forget(f"a{turn}")
            done.wait()


def test_what_another_process_puts_and_labels_is_not_forgotten(tmp_path: Path) -> None:
    turns, shared = 40, 6
    fork = multiprocessing.get_context("fork")
    go, done = fork.Barrier(2), fork.Barrier(2)
    other = fork.Process(target=forgetting, args=(tmp_path, turns, go, done))
    other.start()
    lost = 0
    with disk(tmp_path) as store:
        for turn in range(turns):
            seeds = range(shared * turn, shared * (turn + 1))
            for seed in seeds:
                store.put(key_of(seed), chunk_of(seed))
            store.register(f"a{turn}", map(key_of, seeds))
            go.wait(60)
            for seed in seeds:
                store.put(key_of(seed), chunk_of(seed))
            store.register(f"b{turn}", map(key_of, seeds))
            done.wait(60)
            lost += sum(not same(store.get(key_of(seed)), chunk_of(seed)) for seed in seeds)
            store.forget(f"b{turn}")
            assert not any(store.contains(key_of(seed)) for seed in seeds)
    other.join(60)
    assert lost == 0


def test_forgetting_leaves_nothing_of_a_document_on_the_disk(tmp_path: Path) -> None:
    secret = struct.pack("<7i", *chunk_of(1).token_ids)
    with disk(tmp_path) as store:
        for _ in range(3):
            store.put(key_of(1), chunk_of(1))
            store.register("a", [key_of(1)])
            path = next(tmp_path.rglob("*.safetensors"))
            path.write_bytes(path.read_bytes()[:-1] + b"x")
            assert store.get(key_of(1)) is None
        store.put(key_of(1), chunk_of(1))
        assert len(list(tmp_path.rglob("*.corrupt-*"))) == 3
        unfinished = path.with_name(f".{key_of(1)}.0123.tmp")
        unfinished.write_bytes(secret)
        os.utime(unfinished, (1, 1))
        assert store.forget("a") == 1
        left = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in left if secret in path.read_bytes()]


# --- odd files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [7, 1 << 23])
def test_a_file_that_declares_more_than_it_holds(tmp_path: Path, tokens: int) -> None:
    """A few KiB on the disk, terabytes by its length and its header."""
    with disk(tmp_path) as store:
        store.put(key_of(1), chunk_of(1))
        store.put(key_of(2), chunk_of(2))
        path = tmp_path / "v3" / "tiny-r0" / key_of(1)[:2] / f"{key_of(1)}.safetensors"
        layers = 1 << 30 if tokens == 7 else 1
        header = ChunkHeader(key_of(1), 1, "BF16", (layers, 2, tokens, 8, 8), "0" * 32, "BF16")
        text = header.encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, header.file_bytes)
        (tmp_path / "index.sqlite").unlink()
        assert [info.key for info in store.scan()] == [key_of(2)]
        assert list(store.verify()) == [(key_of(1), False), (key_of(2), True)]
        assert store.get(key_of(1)) is None
        store.put(key_of(1), chunk_of(1))
        assert same(store.get(key_of(1)), chunk_of(1))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def listener(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)  # a whole path may be too long for it


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("odd", [loop, dangling, listener, folder])
def test_what_is_no_file_is_no_chunk_and_hides_none(
    tmp_path: Path, odd: Callable[[Path], None]
) -> None:
    with disk(tmp_path) as store:
        for seed in range(3):
            store.put(key_of(seed), chunk_of(seed))
        path = tmp_path / "v3" / "tiny-r0" / key_of(1)[:2] / f"{key_of(1)}.safetensors"
        path.unlink()
        odd(path)
        assert not store.contains(key_of(1))
        assert set(store.verify()) == {(key_of(0), True), (key_of(2), True)}
        assert store.trim(1 << 30) == 0
        store.discard(key_of(1))
    if not os.path.lexists(path):
        odd(path)
    odd(tmp_path / "v3" / "tiny-r0" / "zz")  # where folders of chunks are
    odd(tmp_path / "v3" / "other-r0")
    with disk(tmp_path) as store:
        assert {info.key for info in store.scan()} == {key_of(0), key_of(2)}
        assert store.get(key_of(1)) is None
        assert store.put(key_of(1), chunk_of(1)) == ""
        assert all(same(store.get(key_of(seed)), chunk_of(seed)) for seed in range(3))


@pytest.mark.filterwarnings("ignore:Chunks in")
def test_what_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path) as store:
        for seed in range(3):
            store.put(key_of(seed), chunk_of(seed))
        closed = sorted(map(key_of, range(3)))[0]
        with monkeypatch.context() as patch:
            patch.setattr("cacheblend_rag.store.disk.opened", partial(opened_but, closed))
            rows = store.verify()
            told = [next(rows), next(rows)]
            with pytest.raises(UnavailableError, match="Too many"):
                next(rows)
        assert told == [(key, True) for key in sorted(map(key_of, range(3))) if key != closed]
        assert len(list(store.verify())) == 3 and store.stats().corrupt == 0


def test_what_an_archive_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with disk(tmp_path) as store:
        store.put(key_of(1), chunk_of(1))
        monkeypatch.setattr(Path, "read_bytes", too_many)
        with pytest.warns(RuntimeWarning, match="cannot be read .Too many open files"):
            assert list(store.files()) == []


def opened_but(closed: str, path: Path) -> contextlib.AbstractContextManager[int]:
    if path.stem == closed:
        raise OSError(errno.EMFILE, "Too many open files")
    return opened(path)


def test_what_is_set_aside_is_bounded_and_counts_as_held(tmp_path: Path) -> None:
    capacity = 20 * 780
    with DiskStore(tmp_path, namespace="tiny-r0", capacity_bytes=capacity) as store:
        for seed in range(60):
            store.put(key_of(seed), chunk_of(seed))
            path = next(tmp_path.rglob(f"{key_of(seed)}.safetensors"))
            path.write_bytes(b"x" * 780)
            assert store.get(key_of(seed)) is None
            store.put(key_of(100 + seed), chunk_of(seed))
            held = sum(path.stat().st_size for path in (tmp_path / "v3").rglob("*.*"))
            assert held <= capacity
        assert len(list(tmp_path.rglob("*.corrupt-*"))) == 2


# --- folders --------------------------------------------------------------------------------------


def modes(folder: Path) -> set[str]:
    return {oct(path.stat().st_mode & 0o7077) for path in [folder, *folder.rglob("*")]}


def test_only_the_owner_may_read_a_store(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "kv"
    with disk(folder) as store:
        store.put(key_of(1), chunk_of(1))
        assert (folder / "index.sqlite-wal").exists()
        assert modes(tmp_path / "deep") == {"0o0"}
        for path in (folder / "v3", folder / "index.sqlite"):  # as an earlier version left them
            path.chmod(0o755)
    with disk(folder):
        assert modes(folder) == {"0o0"}


def test_a_folder_of_a_group_is_shared_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    folder.mkdir()
    folder.chmod(0o2770)
    umask = os.umask(0o077)
    try:
        with disk(folder) as store:
            store.put(key_of(1), chunk_of(1))
            assert modes(folder) == {"0o60", "0o2070"}
    finally:
        os.umask(umask)


def test_a_folder_emptied_under_an_open_store_is_a_store_again(tmp_path: Path) -> None:
    with disk(tmp_path) as store:
        store.put(key_of(1), chunk_of(1))
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert store.get(key_of(1)) is None
        store.put(key_of(2), chunk_of(2))
        assert [info.key for info in store.scan()] == [key_of(2)]
    with disk(tmp_path) as store:
        assert same(store.get(key_of(2)), chunk_of(2))
    with disk(tmp_path) as store:
        shutil.rmtree(tmp_path / "v3")
        (tmp_path / "cacheblend-store.json").unlink()
        (tmp_path / "somebody's file").touch()
        with pytest.raises(StoreError, match="not a chunk store"):
            store.put(key_of(3), chunk_of(3))
        assert not (tmp_path / "v3").exists()


@pytest.mark.filterwarnings("ignore:The index of the chunk store")
def test_a_read_only_store_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with disk(folder) as store:
        for seed in range(5):
            store.put(key_of(seed), chunk_of(seed))
    mount = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with pytest.warns(RuntimeWarning, match="what it holds is read, nothing is added"):
            store = DiskStore(folder, namespace="tiny-r0", capacity_bytes=1000)
        with store:
            assert {info.key for info in store.scan()} == {key_of(seed) for seed in range(5)}
            assert all(same(store.get(key_of(seed)), chunk_of(seed)) for seed in range(5))
            assert store.stats().chunks == 5
            with pytest.raises(StoreError, match="Mount it writable"):
                store.put(key_of(9), chunk_of(9, num_tokens=2))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
