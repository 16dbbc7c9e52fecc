"""Every store keeps the contract of ``KVStore``; the disk store also survives what disks do."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from stat import S_ISDIR

import pytest
import torch
from chunks import chunk_of, finite, key_of, latent_chunk_of, same, spoiled
from safetensors import safe_open

from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.store import (
    ChunkInfo,
    ChunkKV,
    DiskStore,
    KVStore,
    MemoryStore,
    NullStore,
    TieredStore,
)
from cacheblend_rag.store.base import NOT_FINITE
from cacheblend_rag.store.chunk_file import Encoding, encode, header_of
from cacheblend_rag.store.evict import LRU
from cacheblend_rag.store.folder import namespaces
from cacheblend_rag.store.learnt import LearningStore
from cacheblend_rag.store.source import FileSource

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def open_disk(folder: Path, capacity: int | None = None, namespace: str = "tiny-r0") -> DiskStore:
    return DiskStore(folder, namespace=namespace, capacity_bytes=capacity, policy=LRU())


def file_of(folder: Path, key: str) -> Path:
    return folder / "v3" / "tiny-r0" / key[:2] / f"{key}.safetensors"


def set_aside(folder: Path) -> list[Path]:
    return list(folder.rglob("*.corrupt-*"))


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


KV_BYTES = chunk_of(0).nbytes
FILE_BYTES = header_of(key_of(0), chunk_of(0)).file_bytes
Make = Callable[[float], KVStore]


def memory(_: Path, num_chunks: float) -> KVStore:
    return MemoryStore(int(num_chunks * KV_BYTES), policy=LRU())


def disk(folder: Path, num_chunks: float) -> KVStore:
    return open_disk(folder, int(num_chunks * FILE_BYTES))


def tiered(folder: Path, num_chunks: float) -> KVStore:
    return TieredStore(memory(folder, num_chunks), disk(folder, num_chunks))


def tiny_fast(folder: Path, num_chunks: float) -> KVStore:
    return TieredStore(MemoryStore(1), disk(folder, num_chunks))


def learning(folder: Path, num_chunks: float) -> KVStore:
    return LearningStore(disk(folder, num_chunks), MemoryStore(1 << 20), 3600.0)


@pytest.fixture(
    params=[memory, disk, tiered, tiny_fast, learning], ids=lambda maker: maker.__name__
)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Opens the store with room for so many chunks of 7 tokens."""
    return partial(request.param, tmp_path)


@pytest.fixture
def store(make: Make) -> KVStore:
    return make(1000)


# --- the contract, for every store ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_get_returns_what_was_put_bit_for_bit(store: KVStore, dtype: torch.dtype) -> None:
    chunk = chunk_of(1, dtype)
    store.put(key_of(1), chunk)
    assert same(store.get(key_of(1)), chunk)
    assert store.contains(key_of(1))


def test_latents_come_back_bit_for_bit(store: KVStore) -> None:
    store.put(key_of(1), latent_chunk_of(1))
    assert same(store.get(key_of(1)), latent_chunk_of(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "largest"])
def test_kv_that_is_not_finite_is_not_kept(
    store: KVStore, value: float | str, dtype: torch.dtype
) -> None:
    number = torch.finfo(dtype).max if value == "largest" else float(value)  # two make infinity
    assert store.put(key_of(1), spoiled(chunk_of(1, dtype), number)) == NOT_FINITE
    assert store.get(key_of(1)) is None and not store.contains(key_of(1))
    assert store.stats().corrupt > 0
    assert store.put(key_of(1), chunk_of(1, dtype)) == ""
    assert same(store.get(key_of(1)), chunk_of(1, dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_of_kv_that_is_not_finite_is_damaged(tmp_path: Path, value: float) -> None:
    key = key_of(1)
    with open_disk(tmp_path) as store:
        store.put(key, chunk_of(1))
        bad = b"".join(encode(key, spoiled(chunk_of(1), value), Encoding()))
        file_of(tmp_path, key).write_bytes(bad)
        assert store.get(key) is None
        assert store.stats().corrupt == 1 and len(set_aside(tmp_path)) == 1
        assert not store.put_file(key, bad)
        store.put(key, chunk_of(1))
        assert same(store.get(key), chunk_of(1))


def test_absent_key(store: KVStore) -> None:
    assert store.get(key_of(1)) is None
    assert not store.contains(key_of(1))
    store.discard(key_of(1))
    assert store.stats()[2:6] == (0, 1, 0, 0)


def test_put_twice_keeps_one(store: KVStore) -> None:
    store.put(key_of(1), chunk_of(1))
    before = store.stats()
    store.put(key_of(1), chunk_of(1))
    assert store.stats() == before
    assert before.chunks == 1


def test_discard(store: KVStore) -> None:
    store.put(key_of(1), chunk_of(1))
    store.put(key_of(2), chunk_of(2))
    store.discard(key_of(1))
    assert store.get(key_of(1)) is None
    assert same(store.get(key_of(2)), chunk_of(2))
    assert store.stats().chunks == 1
    store.put(key_of(1), chunk_of(1))
    assert same(store.get(key_of(1)), chunk_of(1))


def test_scan_tells_every_chunk_once(store: KVStore) -> None:
    chunks = {key_of(seed): chunk_of(seed, DTYPES[seed % 3], 1 + seed) for seed in range(6)}
    for key, chunk in chunks.items():
        store.put(key, chunk)
    told = {
        ChunkInfo(key, chunk.token_ids, chunk.base, chunk.nbytes) for key, chunk in chunks.items()
    }
    found = list(store.scan())
    assert len(found) == len(told)
    assert set(found) == told


def test_stats_count_hits_and_misses(store: KVStore) -> None:
    store.put(key_of(1), chunk_of(1))
    for name in (1, 1, 2):
        store.get(key_of(name))
    stats = store.stats()
    assert (stats.chunks, stats.hits, stats.misses, stats.corrupt) == (1, 2, 1, 0)
    assert stats.nbytes >= chunk_of(1).nbytes


@pytest.mark.parametrize("key", ["", "ab", "A" * 64, "0" * 63 + "g", "../" + "0" * 61, "0" * 65])
def test_bad_keys_are_refused(store: KVStore, key: str) -> None:
    for call in (store.contains, store.get, store.discard, lambda k: store.put(k, chunk_of(1))):
        with pytest.raises(ValueError, match="64 lowercase"):
            call(key)
    with pytest.raises(ValueError, match="64 lowercase"):
        NullStore().get(key)


def test_close_twice(store: KVStore) -> None:
    with store:
        store.put(key_of(1), chunk_of(1))
    store.close()


@pytest.mark.parametrize("victim", [1, 2, 3, 4])
def test_least_recently_used_leaves_first(make: Make, victim: int) -> None:
    store = make(4.5)
    for seed in (1, 2, 3, 4):
        store.put(key_of(seed), chunk_of(seed))
    first, second, third = (seed for seed in (1, 2, 3, 4) if seed != victim)
    store.get(key_of(first))
    store.put(key_of(second), chunk_of(second))  # a repeated put is a use as well
    store.touch(key_of(third))
    store.put(key_of(5), chunk_of(5))
    kept = [seed for seed in (1, 2, 3, 4, 5) if store.contains(key_of(seed))]
    assert kept == sorted([first, second, third, 5])
    assert store.stats().evictions == 1


def test_capacity_is_never_exceeded(make: Make) -> None:
    store = make(4)
    for seed in range(30):
        store.put(key_of(seed), chunk_of(seed, num_tokens=1 + seed % 9))
        assert store.stats().nbytes <= 4 * FILE_BYTES
        assert store.contains(key_of(seed))


def test_chunk_larger_than_the_capacity_is_not_kept(make: Make) -> None:
    store = make(2)
    store.put(key_of(1), chunk_of(1))
    store.put(key_of(2), chunk_of(2, num_tokens=700))
    assert store.get(key_of(2)) is None
    assert store.contains(key_of(1))
    assert store.stats().evictions == 1


def test_threads_on_the_same_keys(make: Make) -> None:
    store = make(4)  # of 6 chunks, so that evictions happen all the time
    chunks = {key_of(seed): chunk_of(seed) for seed in range(6)}
    wrong: list[str] = []

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        for _ in range(40):
            key = chooser.choice(list(chunks))
            store.put(key, chunks[key])
            asked = chooser.choice(list(chunks))
            found = store.get(asked)
            if found is not None and not same(found, chunks[asked]):
                wrong.append("foreign KV")
            if chooser.random() < 0.2:
                store.discard(key)
            wrong.extend("foreign key" for info in store.scan() if info.key not in chunks)

    in_threads(work, 6)
    assert not wrong
    assert store.stats().corrupt == 0


def in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def caught(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_null_store_keeps_nothing() -> None:
    with NullStore() as store:
        assert store.put(key_of(1), chunk_of(1)), "it says that it keeps nothing"
        store.discard(key_of(1))
        assert not store.contains(key_of(1))
        assert store.get(key_of(1)) is None
        assert list(store.scan()) == []
        assert store.stats() == (0, 0, 0, 1, 0, 0, 0, 0)


@pytest.mark.parametrize("capacity", [0, -1])
def test_capacity_must_be_positive(tmp_path: Path, capacity: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        MemoryStore(capacity)
    with pytest.raises(ValueError, match="positive"):
        open_disk(tmp_path, capacity)


# --- tiers ----------------------------------------------------------------------------------------


def test_tiers_promote_on_a_hit_and_write_through(tmp_path: Path) -> None:
    store = TieredStore(MemoryStore(1 << 20), open_disk(tmp_path))
    store.slow.put(key_of(1), chunk_of(1))
    store.put(key_of(2), chunk_of(2))
    assert store.slow.contains(key_of(2))
    for _ in range(3):
        assert same(store.get(key_of(1)), chunk_of(1))
    assert (store.slow.stats().hits, store.fast.stats().hits) == (1, 2)
    assert store.stats()[2:6] == (3, 0, 0, 0)


def test_tiers_serve_from_slow_what_fast_cannot_keep() -> None:
    class FullStore(MemoryStore):
        def put(self, key: str, chunk: ChunkKV) -> None:
            raise StoreError("full")

    store = TieredStore(FullStore(1), MemoryStore(1 << 20))
    store.slow.put(key_of(1), chunk_of(1))
    with pytest.warns(RuntimeWarning, match="Not kept in the fast tier"):
        assert same(store.get(key_of(1)), chunk_of(1))
    with pytest.warns(RuntimeWarning, match="Not kept in the fast tier"):
        assert store.put(key_of(2), chunk_of(2)) == ""
    assert same(store.slow.get(key_of(2)), chunk_of(2))


def test_a_copy_that_cannot_be_dropped_is_dropped_later() -> None:
    class ReadOnly(MemoryStore):
        is_writable = False

        def discard(self, key: str) -> None:
            if not self.is_writable:
                raise StoreError("read-only")
            super().discard(key)

    store = TieredStore(fast := ReadOnly(1 << 20), slow := MemoryStore(1 << 20))
    store.put(key_of(1), chunk_of(1))
    cursor = slow.changes(None).cursor
    slow.discard(key_of(1))
    with pytest.warns(RuntimeWarning, match="Not dropped from the fast tier: read-only"):
        changes = store.changes(cursor)
    assert changes.removed == [key_of(1)], "who follows the store is told all the same"
    fast.is_writable = True
    assert store.changes(changes.cursor).removed == []
    assert store.get(key_of(1)) is None


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_are_ordinary_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    chunk, key = chunk_of(3, dtype), key_of(3)
    open_disk(tmp_path).put(key, chunk)
    with safe_open(file_of(tmp_path, key), "pt") as file:
        assert set(file.keys()) == {"kv", "token_ids"}
        kv, token_ids, metadata = (
            file.get_tensor("kv"),
            file.get_tensor("token_ids"),
            file.metadata(),
        )
    assert same(ChunkKV(tuple(token_ids.tolist()), int(metadata["base"]), kv), chunk)
    assert token_ids.dtype == torch.int32
    assert (metadata["format"], metadata["key"]) == ("3", key)
    assert len(metadata["checksum"]) == 32


def test_chunks_survive_reopening(tmp_path: Path) -> None:
    with open_disk(tmp_path) as store:
        for seed in range(4):
            store.put(key_of(seed), chunk_of(seed))
    reopened = open_disk(tmp_path)
    assert {info.key for info in reopened.scan()} == {key_of(seed) for seed in range(4)}
    assert all(same(reopened.get(key_of(seed)), chunk_of(seed)) for seed in range(4))


def test_order_of_use_survives_reopening(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    for seed in (1, 2, 3):
        store.put(key_of(seed), chunk_of(seed))
    store.get(key_of(1))
    list(store.scan())  # not a use
    reopened = open_disk(tmp_path, capacity=int(3.5 * store.stats().nbytes / 3))
    reopened.put(key_of(4), chunk_of(4))
    assert [reopened.contains(key_of(seed)) for seed in (1, 2, 3, 4)] == [True, False, True, True]


def test_namespaces_are_apart_but_share_the_capacity(tmp_path: Path) -> None:
    old = open_disk(tmp_path, namespace="old-r0")
    old.put(key_of(1), chunk_of(1))
    size = old.stats().nbytes
    new = open_disk(tmp_path, capacity=int(2.5 * size), namespace="new-r0")
    assert new.get(key_of(1)) is None
    new.put(key_of(2), chunk_of(2))
    new.put(key_of(3), chunk_of(3))
    assert not old.contains(key_of(1))
    assert new.stats()[:2] == (2, 2 * size)


def test_two_stores_on_one_folder(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    one.put(key_of(1), chunk_of(1))
    assert same(two.get(key_of(1)), chunk_of(1))
    two.put(key_of(1), chunk_of(1))
    two.discard(key_of(1))
    assert one.get(key_of(1)) is None
    assert one.stats().corrupt == 0


def test_stores_opened_at_once_on_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"

    def work(index: int) -> None:
        store = open_disk(folder, namespace=f"model-r{index}")
        store.put(key_of(index), chunk_of(index))

    in_threads(work, 12)
    assert len(list(folder.rglob("*.safetensors"))) == 12
    assert not temporaries(folder)


def test_a_folder_claimed_by_another_process_just_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_listdir = os.listdir

    def claim_first(folder: Path) -> list[str]:
        monkeypatch.undo()
        open_disk(tmp_path).put(key_of(1), chunk_of(1))
        return [name for name in real_listdir(folder) if name != "cacheblend-store.json"]

    monkeypatch.setattr(os, "listdir", claim_first)
    assert same(open_disk(tmp_path).get(key_of(1)), chunk_of(1))


@pytest.mark.parametrize("namespace", ["", "UP", "a/b", "..", "a" * 101, "a_b"])
def test_bad_namespaces_are_refused(tmp_path: Path, namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        open_disk(tmp_path, namespace=namespace)


@pytest.mark.parametrize(
    "chunk",
    [
        ChunkKV((1, 2), 0, torch.zeros(1, 2, 3, 1, 4)),
        ChunkKV((1, 2, 3), 0, torch.zeros(1, 3, 3, 1, 4)),
        ChunkKV((1, 2, 3), 0, torch.zeros(2, 3, 1, 4)),
        ChunkKV((), 0, torch.zeros(1, 2, 0, 1, 4)),
        ChunkKV((1, 2, 3), 0, torch.zeros(1, 2, 3, 1, 4, dtype=torch.float64)),
    ],
)
def test_what_is_no_chunk_is_not_written(tmp_path: Path, chunk: ChunkKV) -> None:
    store = open_disk(tmp_path)
    with pytest.raises(ValueError, match="KV of"):
        store.put(key_of(1), chunk)
    assert store.stats().chunks == 0


def test_kv_that_is_a_view_is_stored_as_it_looks(tmp_path: Path) -> None:
    whole = chunk_of(1)
    view = ChunkKV(whole.token_ids[1:], 1, whole.kv_L2NHD[:, :, 1:])
    store = open_disk(tmp_path)
    store.put(key_of(1), view)
    copied = ChunkKV(view.token_ids, 1, view.kv_L2NHD.contiguous())
    assert same(store.get(key_of(1)), copied)


# --- damage ---------------------------------------------------------------------------------------


class Damage:
    """Puts wrong content in the place of one chunk's file."""

    def __init__(self, folder: Path) -> None:
        self.store = open_disk(folder)
        self.folder, self.key, self.chunk = folder, key_of(1), chunk_of(1)
        self.store.put(self.key, self.chunk)
        self.file = file_of(folder, self.key)
        self.intact = self.file.read_bytes()

    def is_refused(self, content: bytes) -> bool:
        """Whether the content is a miss, counted once, and set aside unchanged."""
        self.file.write_bytes(content)
        corrupt = self.store.stats().corrupt
        list(self.store.scan())
        missed = self.store.get(self.key) is None
        counted = self.store.stats().corrupt == corrupt + 1
        (aside,) = set_aside(self.folder)
        kept = aside.read_bytes() == content
        aside.unlink()
        return missed and counted and kept and not self.store.contains(self.key)

    def check_mended(self) -> None:
        self.store.put(self.key, self.chunk)
        assert same(self.store.get(self.key), self.chunk)
        assert self.file.read_bytes() == self.intact


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    return Damage(tmp_path)


def test_every_flipped_byte_is_found(damage: Damage) -> None:
    flips = random.Random(1)
    for position in range(len(damage.intact)):
        content = bytearray(damage.intact)
        content[position] ^= flips.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        assert damage.is_refused(bytes(content)), position
    damage.check_mended()


def test_every_truncation_is_found(damage: Damage) -> None:
    for length in range(len(damage.intact)):
        assert damage.is_refused(damage.intact[:length]), length
    damage.check_mended()


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 4096,
        b"\xff" * 4096,
        (2**63).to_bytes(8, "little") + b"{}" * 100,
        (100 * 2**20).to_bytes(8, "little") + b"{}" * 100,
        (4096).to_bytes(8, "little") + b"[" * 4096,
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
        (5000).to_bytes(8, "little") + b"9" * 5000,
        (4000).to_bytes(8, "little") + b"9" * 4000,
    ],
    ids=["zeros", "ones", "2**63", "100MiB", "nested", "empty", "null", "too-long", "long-number"],
)
def test_foreign_content_is_found(damage: Damage, content: bytes) -> None:
    assert damage.is_refused(content)
    damage.check_mended()


def test_content_after_the_end_is_found(damage: Damage) -> None:
    assert damage.is_refused(damage.intact + b"\0")
    assert damage.is_refused(damage.intact * 2)


def with_header(intact: bytes, change: Callable[[dict[str, dict[str, object]]], None]) -> bytes:
    """The file with a well-formed header that says something else."""
    end = 8 + int.from_bytes(intact[:8], "little")
    header = json.loads(intact[8:end])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + intact[end:]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("kv", "shape", [2, 2, 7, 4, 2]),
        ("kv", "shape", [2, 1, 7, 4, 4]),
        ("kv", "shape", [1, 4, 7, 2, 4]),
        ("kv", "shape", [1, 2, 7, 4, 4]),
        ("kv", "shape", [2**40, 2, 7, 2, 4]),
        ("kv", "shape", [2, 2, -7, -2, 4]),
        ("kv", "shape", [2, 2, True, 14, 4]),
        ("kv", "shape", [2.0, 2, 7, 2, 4]),
        ("kv", "shape", "22724"),
        ("kv", "dtype", "F16"),
        ("kv", "dtype", "I16"),
        ("kv", "dtype", ["BF16"]),
        ("kv", "data_offsets", [0, 448]),
        ("token_ids", "shape", [112]),
        ("__metadata__", "base", "2"),
        ("__metadata__", "base", "1 "),
        ("__metadata__", "base", None),
        ("__metadata__", "format", "1"),
        ("__metadata__", "key", 5),
        ("__metadata__", "checksum", "0" * 32),
        ("__metadata__", "more", "x"),
    ],
)
def test_a_header_that_lies_is_found(damage: Damage, part: str, field: str, value: object) -> None:
    assert damage.is_refused(
        with_header(damage.intact, lambda header: header[part].update({field: value}))
    )
    damage.check_mended()


def test_another_chunks_file_is_found(damage: Damage) -> None:
    damage.store.put(key_of(2), chunk_of(2))
    assert damage.is_refused(file_of(damage.folder, key_of(2)).read_bytes())
    damage.check_mended()


def test_a_folder_in_the_place_of_a_file(damage: Damage) -> None:
    for ask in (damage.store.get, lambda key: damage.store.put(key, damage.chunk)):
        damage.file.unlink(missing_ok=True)
        damage.file.mkdir()
        assert not damage.store.contains(damage.key)
        ask(damage.key)
    assert damage.store.stats().corrupt == 2
    assert len(set_aside(damage.folder)) == 2
    damage.check_mended()


def test_a_pipe_in_the_place_of_a_file(damage: Damage) -> None:
    damage.file.unlink()
    os.mkfifo(damage.file)
    assert damage.store.get(damage.key) is None
    damage.check_mended()


def test_a_bad_sector(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    def readv(descriptor: int, buffers: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "readv", readv)
        assert damage.store.get(damage.key) is None
    assert len(set_aside(damage.folder)) == damage.store.stats().corrupt == 1
    damage.check_mended()


def test_put_replaces_a_file_of_the_wrong_size(damage: Damage) -> None:
    damage.file.write_bytes(b"")
    damage.check_mended()
    assert damage.store.stats().corrupt == 1


def test_scan_skips_what_it_cannot_read(damage: Damage) -> None:
    damage.store.put(key_of(2), chunk_of(2))
    damage.file.write_bytes(damage.intact[:-1])
    (damage.file.parent / "notes.txt").write_text("x")
    (damage.file.parent / ("A" * 64 + ".safetensors")).write_text("x")
    damage.store.close()
    for file in damage.folder.glob("index.sqlite*"):  # what is not in it is read from the files
        file.unlink()
    assert [info.key for info in open_disk(damage.folder).scan()] == [key_of(2)]


def test_a_file_that_vanishes_is_a_miss(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def vanish(path: Path, *args: object) -> int:
        damage.file.unlink(missing_ok=True)
        return real_open(path, *args)  # type: ignore[arg-type]

    assert damage.store.contains(damage.key)
    monkeypatch.setattr(os, "open", vanish)
    assert damage.store.get(damage.key) is None
    assert damage.store.stats()[2:6] == (0, 1, 0, 0)


def test_evicted_while_it_is_read(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    real_readv = os.readv

    def unlink_first(descriptor: int, buffers: list[memoryview]) -> int:
        damage.file.unlink(missing_ok=True)
        return real_readv(descriptor, buffers)

    monkeypatch.setattr(os, "readv", unlink_first)
    assert same(damage.store.get(damage.key), damage.chunk)


def test_setting_aside_spares_a_file_put_meanwhile(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_readv = os.readv

    def mend_first(descriptor: int, buffers: list[memoryview]) -> int:
        damage.file.unlink()
        damage.file.write_bytes(damage.intact)
        return real_readv(descriptor, buffers)

    damage.file.write_bytes(b"short")
    with monkeypatch.context() as patched:
        patched.setattr(os, "readv", mend_first)
        assert damage.store.get(damage.key) is None
    assert same(damage.store.get(damage.key), damage.chunk)
    assert not set_aside(damage.folder)


# --- a disk that refuses --------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "Free disk space"),
        (errno.EDQUOT, "disk quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "permission"),
        (errno.EROFS, "writable"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_put_says_how_to_fix_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, fix: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    store = open_disk(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(StoreError, match=fix):
            store.put(key_of(1), chunk_of(1))
    assert not temporaries(tmp_path)
    assert store.get(key_of(1)) is None
    store.put(key_of(1), chunk_of(1))
    assert same(store.get(key_of(1)), chunk_of(1))


def test_put_reaches_the_disk_before_the_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut, which no test can make: data first, then the name, then the folder."""
    real_fsync, real_replace = os.fsync, os.replace
    calls: list[str] = []

    def fsync(descriptor: int) -> None:
        calls.append("fsync folder" if S_ISDIR(os.fstat(descriptor).st_mode) else "fsync file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        calls.append("replace")
        real_replace(source, target)

    store = open_disk(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    store.put(key_of(1), chunk_of(1))
    made_shard, *rest = calls
    assert made_shard == "fsync folder"
    assert rest == ["fsync file", "replace", "fsync folder"]


def test_disk_full_half_way_through_the_kv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, written = os.write, 0

    def fill(descriptor: int, data: memoryview) -> int:
        nonlocal written
        if written > 600:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real_write(descriptor, data[:100])  # short writes, as near the end of a disk
        written += count
        return count

    store = TieredStore(MemoryStore(1 << 20), open_disk(tmp_path))
    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(StoreError, match="No space left"):
        store.put(key_of(1), chunk_of(1))
    assert not temporaries(tmp_path)
    assert store.slow.get(key_of(1)) is None
    assert same(store.get(key_of(1)), chunk_of(1))  # the memory tier still has it


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.filterwarnings("ignore:Chunks in .* cannot be read")
def test_a_disk_that_cannot_be_asked_says_nothing_of_the_chunk(
    damage: Damage, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fail(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    store = TieredStore(MemoryStore(1 << 20), damage.store)
    with monkeypatch.context() as patched:
        patched.setattr(*((os, "open") if call == "open" else (FileSource, "read_into")), fail)
        for one in (damage.store, store):
            with pytest.raises(UnavailableError, match=os.strerror(number)):
                one.get(damage.key)
            assert one.get_many([damage.key]) == ([None], set(), {damage.key})
            assert one.get_in_time([damage.key], 10) == ([None], set(), {damage.key})
        store.prefetch([damage.key])
        store._prefetching.close()
    assert same(store.get(damage.key), damage.chunk)
    stats = store.stats()
    assert (stats.corrupt, stats.misses) == (0, 0) and stats.unavailable >= 6


def test_damage_that_cannot_be_set_aside_is_still_a_miss(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    damage.file.write_bytes(damage.intact[:-1])
    monkeypatch.setattr(os, "rename", refuse)
    assert damage.store.get(damage.key) is None
    assert damage.store.stats().corrupt == 1


def test_another_users_files_are_still_served(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert same(damage.store.get(damage.key), damage.chunk)
    damage.store.put(damage.key, damage.chunk)


# --- opening --------------------------------------------------------------------------------------


def test_a_new_folder_is_marked(tmp_path: Path) -> None:
    open_disk(tmp_path / "kv")
    marker = json.loads((tmp_path / "kv" / "cacheblend-store.json").read_text())
    assert marker == {"format": 3, "made_by": "cacheblend-rag"}


def test_an_empty_volume_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    open_disk(tmp_path)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"not a chunk store\. Choose an empty"):
        open_disk(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    "marker",
    [b"", b"\xff", b"[]", b"[" * 100_000, b'{"format": true, "made_by": "cacheblend-rag"}'],
    ids=["empty", "binary", "list", "nested", "no number"],
)
def test_a_damaged_marker_is_refused(tmp_path: Path, marker: bytes) -> None:
    (tmp_path / "cacheblend-store.json").write_bytes(marker)
    with pytest.raises(StoreError, match=r"is damaged.*choose another folder"):
        open_disk(tmp_path)


@pytest.mark.parametrize(("number", "age"), [(2, "an older"), (4, "a newer")])
def test_another_format_is_refused_with_the_reason(tmp_path: Path, number: int, age: str) -> None:
    open_disk(tmp_path / "kv")
    marker = tmp_path / "kv" / "cacheblend-store.json"
    marker.write_text(json.dumps({"format": number, "made_by": "cacheblend-rag"}))
    reason = rf"made by {age} version.*format {number}.*reads format 3 only.*Delete .*ingest anew"
    with pytest.raises(StoreError, match=reason):
        open_disk(tmp_path / "kv")
    with pytest.raises(StoreError, match=reason):
        namespaces(tmp_path / "kv")


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("x")
    for folder in (tmp_path / "kv", tmp_path / "kv" / "below"):
        with pytest.raises(StoreError, match="A file stands where"):
            open_disk(folder)


@pytest.mark.parametrize("call", ["open", "mkdir", "listdir"])
def test_a_folder_we_may_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StoreError, match="Give this user read and write permission"):
        open_disk(tmp_path)


def test_folders_closed_to_us_are_passed_over(
    damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        store = open_disk(damage.folder)
        assert list(store.scan()) == []
        patched.setattr(os, "stat", refuse)
        with pytest.warns(RuntimeWarning), pytest.raises(UnavailableError):
            store.contains(damage.key)
    assert store.contains(damage.key)


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_temporaries_of_dead_writers_are_removed_at_open(damage: Damage) -> None:
    old, young = damage.file.parent / ".a.tmp", damage.file.parent / ".b.tmp"
    for path in (old, young):
        path.write_bytes(b"half a chunk")
    age(old, seconds=120)
    open_disk(damage.folder)
    assert not old.exists()
    assert young.exists()


def test_a_slow_writer_is_not_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_disk(tmp_path)
    real_replace = os.replace
    reopened: list[DiskStore] = []

    def open_another_first(source: Path, target: Path) -> None:
        age(source, seconds=7200)
        reopened.append(open_disk(tmp_path))
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", open_another_first)
    store.put(key_of(1), chunk_of(1))
    assert same(reopened[0].get(key_of(1)), chunk_of(1))


@pytest.mark.parametrize(("seconds", "stays"), [(120, True), (7200, False)])
def test_without_locks_only_very_old_temporaries_are_removed(
    damage: Damage, monkeypatch: pytest.MonkeyPatch, seconds: float, stays: bool
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    leftover = damage.file.parent / ".a.tmp"
    leftover.write_bytes(b"half a chunk")
    age(leftover, seconds)
    open_disk(damage.folder).put(key_of(5), chunk_of(5))
    assert leftover.exists() is stays


def test_scan_of_many_chunks_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    store = open_disk(tmp_path)
    for seed in range(2000):
        store.put(key_of(seed), chunk_of(1))
    started = time.perf_counter()
    assert len(list(store.scan())) == 2000
    seconds = time.perf_counter() - started
    request.node.user_properties.append(("seconds", round(seconds, 3)))
    assert seconds < 2


# --- large chunks, which a disk writes straight into their memory ---------------------------------


def large_chunk(seed: int, num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 255, (4, 2, num_tokens, 4, 64 * dtype.itemsize), generator=generator)
    kv = finite(bits.to(torch.uint8).view(dtype))
    return ChunkKV(tuple(range(num_tokens)), 3, kv)


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("num_tokens", [510, 1021, 1500, 4099])  # heads of any length
def test_large_chunks_come_back_bit_for_bit(
    tmp_path: Path, num_tokens: int, is_cached: bool
) -> None:
    chunk = large_chunk(1, num_tokens, torch.float32 if num_tokens % 2 else torch.bfloat16)
    with open_disk(tmp_path) as store:
        store.put(key_of(1), chunk)
        if not is_cached:
            drop_from_page_cache(tmp_path)
        for _ in range(2):
            assert same(store.get(key_of(1)), chunk)


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_large_chunks_where_the_disk_cannot_be_read_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def preadv(*args: object) -> int:
        raise OSError(refusal, "not here")

    chunk = large_chunk(1, 1021)
    with open_disk(tmp_path) as store:
        store.put(key_of(1), chunk)
        monkeypatch.setattr(os, "preadv", preadv)
        assert same(store.get(key_of(1)), chunk)


def test_large_files_cut_short_or_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*args: object) -> int:
        raise OSError(errno.EIO, "bad sector")

    with open_disk(tmp_path) as store:
        for seed, damage in ((1, 1), (2, 5000), (3, 3 << 20)):
            store.put(key_of(seed), large_chunk(seed, 1021))
            [path] = tmp_path.rglob(f"{key_of(seed)}.safetensors")
            os.truncate(path, path.stat().st_size - damage)
            drop_from_page_cache(tmp_path)
            assert store.get(key_of(seed)) is None
        store.put(key_of(4), large_chunk(4, 1021))
        monkeypatch.setattr(os, "preadv", preadv)
        assert store.get(key_of(4)) is None
        assert store.stats().corrupt == 4


def drop_from_page_cache(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
