"""What does a store do when its index is damaged, its disk full?

Damages the index of a closed store in many ways, opens it, and looks for every intact chunk; then
damages the index of an open store under threads that get, put, register, forget, collect and prune;
and fills a disk to the last byte. Counts what went wrong, of which there should be nothing.

    python benchmarks/store_faults.py                       # the disk needs root, to mount a tmpfs
    python benchmarks/store_faults.py --closed 60 --open 20 --disk 0
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import ChunkKV, DiskStore

NAMESPACE = "faults-r0"
LIMIT_S = 2.0
CHUNKS = 120
OPERATIONS = 40  # of each thread, in one state of an open index

Damage = Callable[[Path, random.Random], None]


def key_of(seed: int) -> str:
    return hashlib.sha256(str(seed).encode()).hexdigest()


def chunk_of(seed: int, tokens: int = 40) -> ChunkKV:
    kv_L2NHD = torch.full((2, 2, tokens, 1, 8), seed % 251, dtype=torch.bfloat16)
    return ChunkKV(tuple(range(seed, seed + tokens)), 4, kv_L2NHD)


def is_right(chunk: ChunkKV | None, seed: int, tokens: int = 40) -> bool:
    expected = chunk_of(seed, tokens)
    return (
        chunk is not None
        and chunk.token_ids == expected.token_ids
        and torch.equal(chunk.kv_L2NHD, expected.kv_L2NHD)
    )


def opened(folder: Path) -> DiskStore:
    return DiskStore(folder, namespace=NAMESPACE)


def fill(folder: Path, chunks: int, documents: int) -> None:
    with opened(folder) as store:
        for seed in range(chunks):
            store.put(key_of(seed), chunk_of(seed))
        for document in range(documents):
            store.register(f"document {document}", [key_of(document), key_of(document + 1)])


# --- damages, each to the file of an index --------------------------------------------------------


def change_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 4, 40, 400])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    rewrite(path, bytes(data))


def insert_bytes(path: Path, rng: random.Random) -> None:
    data, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    rewrite(path, data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:])


def remove_bytes(path: Path, rng: random.Random) -> None:
    data, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    rewrite(path, data[:at] + data[at + rng.randint(1, 9) :])


def zero_pages(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    pages = range(rng.choice([0, 1]), len(data) // 4096)
    for page in rng.sample(pages, rng.choice([1, 2, len(pages)])):
        data[page * 4096 : (page + 1) * 4096] = bytes(4096)
    rewrite(path, bytes(data))


def cut(path: Path, rng: random.Random) -> None:
    rewrite(path, path.read_bytes()[: rng.randrange(path.stat().st_size)])


def garbage(path: Path, rng: random.Random) -> None:
    rewrite(path, rng.randbytes(rng.choice([0, 1, 100, 5000, 200_000])))


def spoil_log(path: Path, rng: random.Random) -> None:
    names = ["-wal", "-journal"]
    if not path.with_name(f"{path.name}-shm").exists():
        names.append("-shm")  # else a process has it in its memory, and SQLite trusts that
    for suffix in rng.sample(names, rng.randint(1, len(names))):
        rewrite(path.with_name(path.name + suffix), rng.randbytes(rng.choice([32, 50_000])))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink(missing_ok=True)


def wrong_types(path: Path, rng: random.Random) -> None:
    """Values that the schema forbids: it is changed for a moment."""
    table, column = rng.choice(COLUMNS)
    value = rng.choice([None, "text", b"\xff\xfe", 1.5, -7, "\udce9".encode("utf-8", "replace")])
    with changing(path) as db:
        schema = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        (sql,) = (sql for name, sql in schema if name == table)
        loose = sql.replace(" STRICT", "").replace(" NOT NULL", "")
        loose = loose.replace(", WITHOUT ROWID", " WITHOUT ROWID")
        for kind in ("INTEGER,", "INTEGER)", "REAL,", "REAL)", "TEXT,", "BLOB,"):
            loose = loose.replace(f" {kind}", kind[-1])
        write_schema(db, table, loose)
    with changing(path) as db, contextlib.suppress(sqlite3.Error):
        rows = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        some = f"LIMIT {rng.choice([1, 5, rows])}"
        where = f"{column} IN (SELECT {column} FROM {table} {some})"
        db.execute(f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {where}", (value,))
    with changing(path) as db:
        write_schema(db, table, sql)


def hostile_values(path: Path, rng: random.Random) -> None:
    table, column = rng.choice(COLUMNS)
    number = rng.choice([0, -1, 1, 2**31, 2**62, 2**63 - 1, -(2**63), 1e308, -1e308, float("inf")])
    value: object = number
    if column in {"key", "document", "tokens"}:
        value = rng.choice([b"", b"../../x", bytes(32), rng.randbytes(33), rng.randbytes(1 << 20)])
    elif column in {"namespace", "policy"}:
        value = rng.choice(["", "../../x", "x" * 10_000, "faults-r0\0", "lru"])
    with changing(path) as db, contextlib.suppress(sqlite3.Error):
        some = f"(SELECT {column} FROM {table} LIMIT {rng.choice([1, 5, 1000])})"
        db.execute(f"UPDATE OR REPLACE {table} SET {column} = ? WHERE {column} IN {some}", (value,))


def other_schema(path: Path, rng: random.Random) -> None:
    table, column = rng.choice(COLUMNS)
    statement = rng.choice(
        [
            f"DROP TABLE {table}",
            "CREATE TABLE more (x)",
            f"ALTER TABLE {table} ADD COLUMN more",
            f"ALTER TABLE {table} RENAME COLUMN {column} TO other",
            f"ALTER TABLE {table} RENAME TO other",
            "DROP INDEX by_priority",
            "DROP TRIGGER came",
            f"DELETE FROM {table}",
            "CREATE TRIGGER evil AFTER INSERT ON chunks BEGIN DELETE FROM contents; END",
        ]
    )
    with changing(path) as db, contextlib.suppress(sqlite3.Error):
        db.execute(statement)


COLUMNS = [
    *(("chunks", name) for name in ("namespace", "key", "nbytes", "cost", "heat", "tick")),
    *(("chunks", name) for name in ("id", "priority")),
    *(("contents", name) for name in ("id", "base", "kv_bytes", "tokens")),
    *(("totals", name) for name in ("namespace", "chunks", "nbytes")),
    *(("documents", name) for name in ("namespace", "document", "key")),
    *(("state", name) for name in ("policy", "age", "tick")),
]
DAMAGES: list[Damage] = [
    change_bytes,
    insert_bytes,
    remove_bytes,
    zero_pages,
    cut,
    garbage,
    spoil_log,
    remove,
    wrong_types,
    hostile_values,
    other_schema,
]


def rewrite(path: Path, data: bytes) -> None:
    """In place: an open store keeps this file."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


@contextlib.contextmanager
def changing(path: Path) -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(path, isolation_level=None, timeout=1)
    try:
        yield db
    finally:
        db.close()


def write_schema(db: sqlite3.Connection, table: str, sql: str) -> None:
    db.execute("PRAGMA writable_schema=ON")
    db.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (sql, table))


def apply(name: str, path: Path, seed: int) -> None:
    """One damage; an index that is damaged already may not bear another."""
    with contextlib.suppress(sqlite3.Error, OSError, ValueError):
        getattr(sys.modules[__name__], name)(path, random.Random(seed))


# --- closed stores --------------------------------------------------------------------------------


def closed(count: int, seed: int, chunks: int = CHUNKS) -> dict[str, Any]:
    """Open ``count`` damaged stores and use each."""
    wrong, seconds = Counter[str](), list[float]()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        fill(base, chunks, chunks // 3)
        for number in range(count):
            damage = DAMAGES[number % len(DAMAGES)].__name__
            tries: list[float] = []
            while not tries or (tries[-1] > LIMIT_S and len(tries) < 3):  # a busy disk is no fault
                folder = Path(name) / "kv"
                shutil.copytree(base, folder)
                apply(damage, folder / "index.sqlite", seed + number)
                try:
                    took, problems = reopened(folder, chunks)
                except Exception:
                    took, problems = 0.0, [last_line()]
                tries.append(took)
                wrong.update(f"{damage}: {problem}" for problem in problems)
                shutil.rmtree(folder)
            wrong[f"{damage}: slow each time"] += min(tries) > LIMIT_S
            seconds += tries
    return {
        "indexes": count,
        "median_open_s": round(statistics.median(seconds), 3),
        "slowest_open_s": round(max(seconds), 2),
        "slow_openings": sum(t > LIMIT_S for t in seconds),
        "wrong": dict(+wrong),
    }


def reopened(folder: Path, chunks: int) -> tuple[float, list[str]]:
    """Seconds until a damaged store is open and has listed what it holds, and what is wrong."""
    started = time.perf_counter()
    store = opened(folder)
    found = {info.key: info.token_ids for info in store.scan()}
    seconds = time.perf_counter() - started
    problems = []
    with store:
        expected = {key_of(seed): chunk_of(seed).token_ids for seed in range(chunks)}
        if found != expected:
            problems.append("not every chunk is found, or others")
        if not all(is_right(store.get(key_of(seed)), seed) for seed in range(chunks)):
            problems.append("a chunk is lost or wrong")
        store.stats()
        store.put(key_of(chunks), chunk_of(chunks))
        store.register("new", [key_of(chunks)])
        if store.forget("new") != 1 or store.contains(key_of(chunks)):
            problems.append("a document is not forgotten")
        store.gc(["document 0"])
        store.trim(20_000)
    left = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if left > 20_000:
        problems.append("not pruned")
    return seconds, problems


def last_line() -> str:
    return traceback.format_exc().strip().splitlines()[-1][:120]


# --- open stores ----------------------------------------------------------------------------------


def under_way(count: int, seed: int, chunks: int = CHUNKS) -> dict[str, Any]:
    """Damage the index of an open store ``count`` times, under threads that use it."""
    wrong, operations = Counter[str](), Counter[str]()
    context = multiprocessing.get_context("fork")
    # another process: one that closes the file would drop the locks which this one holds
    with tempfile.TemporaryDirectory() as name, context.Pool(1) as other:
        folder = Path(name) / "kv"
        fill(folder, chunks, 0)  # a hostile note on one could have it collected
        with opened(folder) as store:
            for number in range(count):
                damage = DAMAGES[number % len(DAMAGES)].__name__
                threads = [
                    threading.Thread(
                        target=use, args=(store, role, seed + number, wrong, operations)
                    )
                    for role in ("reader", "writer", "keeper")
                ]
                for thread in threads:
                    thread.start()
                other.apply(apply, (damage, folder / "index.sqlite", seed + number))
                for thread in threads:
                    thread.join(60)
                    wrong["a thread hangs"] += thread.is_alive()
                found = {info.key for info in store.scan()}
                if not {key_of(n) for n in range(chunks)} <= found:
                    wrong[f"{damage}: not every chunk is found"] += 1
    return {"states": count, "operations": operations.total(), "wrong": dict(+wrong)}


def use(
    store: DiskStore, role: str, seed: int, wrong: Counter[str], operations: Counter[str]
) -> None:
    """Random operations of one thread."""
    rng = random.Random(f"{role} {seed}")
    for _ in range(OPERATIONS):
        operation = rng.choice(ROLES[role])
        try:
            if not operation(store, rng):
                wrong[f"{operation.__name__} is wrong"] += 1
        except Exception:
            wrong[f"{operation.__name__}: {last_line()}"] += 1
        operations[operation.__name__] += 1


def get(store: DiskStore, rng: random.Random) -> bool:
    seed = rng.randrange(CHUNKS // 2)
    return is_right(store.get(key_of(seed)), seed)


def stats(store: DiskStore, rng: random.Random) -> bool:
    return store.stats().corrupt == 0


def put(store: DiskStore, rng: random.Random) -> bool:
    seed = 1000 + rng.randrange(50)
    store.put(key_of(seed), chunk_of(seed))
    found = store.get(key_of(seed))
    return found is None or is_right(found, seed)


def register(store: DiskStore, rng: random.Random) -> bool:
    store.register(f"other {rng.randrange(9)}", [key_of(1000 + rng.randrange(50))])
    return True


def forget(store: DiskStore, rng: random.Random) -> bool:
    return store.forget(f"other {rng.randrange(9)}") >= 0


def gc(store: DiskStore, rng: random.Random) -> bool:
    return store.gc({f"other {n}" for n in range(5)}) >= 0


def prune(store: DiskStore, rng: random.Random) -> bool:
    return store.trim(1 << 30) == 0


def scan(store: DiskStore, rng: random.Random) -> bool:
    return len(list(store.scan())) >= CHUNKS


ROLES: dict[str, list[Callable[[DiskStore, random.Random], bool]]] = {
    "reader": [get, get, get, get, stats],
    "writer": [put, put, register],
    "keeper": [forget, gc, prune, scan],
}


# --- a full disk ----------------------------------------------------------------------------------


def full(mebibytes: int) -> dict[str, Any]:
    """Fill a disk to the last byte, then open, read, forget and prune the store on it."""
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", name]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            return {"skipped": f"no file system may be mounted here: {mounted.stderr.strip()}"}
        try:
            return on_full(disk)
        finally:
            subprocess.run(["umount", name], check=True)


def on_full(disk: Path) -> dict[str, Any]:
    folder, tokens = disk / "kv", 1000
    kept: list[int] = []
    store = opened(folder)
    for seed in range(300):
        with contextlib.suppress(StoreError):
            store.put(key_of(seed), chunk_of(seed, tokens))
            store.register(f"document {seed}", [key_of(seed)])
            kept.append(seed)
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    serves = sum(is_right(store.get(key_of(seed)), seed, tokens) for seed in kept)
    store.close()
    started = time.perf_counter()
    with opened(folder) as again:
        seconds = time.perf_counter() - started
        listed = sum(1 for _ in again.scan())
        serves_again = sum(is_right(again.get(key_of(seed)), seed, tokens) for seed in kept)
        forgotten = again.forget(f"document {kept[0]}")
    with opened(folder) as again:
        again.trim(1 << 20)
    left = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {
        "put": len(kept),
        "served_full": serves,
        "opened_s": round(seconds, 2),
        "listed": listed,
        "served_after_opening": serves_again,
        "forgotten": forgotten,
        "bytes_after_prune_to_1MiB": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--closed", type=int, default=1000, help="damaged indexes to open")
    parser.add_argument("--open", type=int, default=500, help="damages to an open index")
    parser.add_argument("--disk", type=int, default=48, help="MiB of a disk to fill; 0: none")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # that the index cannot be used: as expected
    print("closed:", json.dumps(closed(args.closed, args.seed), indent=2), flush=True)
    print("open:  ", json.dumps(under_way(args.open, args.seed), indent=2), flush=True)
    if args.disk:
        print("full:  ", json.dumps(full(args.disk), indent=2))


if __name__ == "__main__":
    main()
