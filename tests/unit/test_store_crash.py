"""Writers that die at any moment: nothing acknowledged is lost, nothing wrong is read.

Run as a script, this file is the helper: it loads torch once, then forks a writer per request.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import ChunkKV, DiskStore

KILLS_PER_MID_WRITE = 6  # at most
DISK_CALLS = ["open", "mkdir", "write", "fsync", "utime", "replace", "rename", "unlink", "close"]


def key_of(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()


def chunk_of(index: int) -> ChunkKV:
    """32 KiB to 2 MiB, told by its index alone."""
    num_tokens = 16 << index % 7
    # without the highest bit of the exponent, so that all are finite
    first = (torch.arange(num_tokens * 1024, dtype=torch.int16) * 31 + index) & ~0x4000
    kv_L2NHD = first.view(torch.bfloat16).view(4, 2, num_tokens, 2, 64)
    return ChunkKV(tuple(range(index, index + num_tokens)), index % 3, kv_L2NHD)


def is_intact(store: DiskStore, index: int) -> bool:
    found, expected = store.get(key_of(index)), chunk_of(index)
    return (
        found is not None
        and (found.token_ids, found.base) == (expected.token_ids, expected.base)
        and torch.equal(found.kv_L2NHD.view(torch.int16), expected.kv_L2NHD.view(torch.int16))
    )


# --- the helper -----------------------------------------------------------------------------------


def send(line: object) -> None:
    os.write(1, f"{line}\n".encode())


def write_chunks(
    folder: str, first: int, dies_at: int | None = None, file_limit: int | None = None
) -> None:
    """Put chunks until killed, saying the index after each; or die at a certain disk call."""
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if dies_at is not None:
        die_at(dies_at)
    store = DiskStore(Path(folder), namespace="tiny-r0")
    for index in itertools.count(first):
        try:
            store.put(key_of(index), chunk_of(index))
            send(index)
        except StoreError as error:
            send(f"refused {index} {error}")
            return


def die_at(countdown: int) -> None:
    calls = itertools.count(1)

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == countdown:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    class DyingConnection(sqlite3.Connection):
        execute = dying(sqlite3.Connection.execute)

    real_connect = sqlite3.connect
    sqlite3.connect = partial(real_connect, factory=DyingConnection)  # type: ignore[assignment]
    for name in DISK_CALLS:
        setattr(os, name, dying(getattr(os, name)))


def serve() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write_chunks(**json.loads(line))
            os._exit(0)
        send(f"pid {child}")
        os.waitpid(child, 0)
        send("ended")


class Writers:
    """The helper process."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def start(self, **options: object) -> int:
        """Start a writer and tell its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(options) + "\n")
        self._process.stdin.flush()
        self._said = []
        while not (line := self._line()).startswith("pid "):
            self._said.append(line)
        return int(line.removeprefix("pid "))

    def wait_for_the_first(self) -> None:
        """Until the writer said that it put a chunk."""
        self._said.append(self._line())

    def finish(self) -> list[str]:
        """What the writer said until it ended."""
        while (line := self._line()) != "ended":
            self._said.append(line)
        return self._said

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the helper died"
        return line.rstrip("\n")


if __name__ == "__main__":
    serve()
    sys.exit()


# --- the tests ------------------------------------------------------------------------------------

import pytest  # noqa: E402 - the helper needs no pytest


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    started = Writers()
    yield started
    started.close()


def check_folder(folder: Path, acknowledged: set[int]) -> int:
    """The number of temporaries left by the crash; fails where a chunk is lost or wrong."""
    left = list(folder.rglob("*.tmp"))
    for path in left:
        os.utime(path, (0, 0))  # older than the grace that a live writer has
    store = DiskStore(folder, namespace="tiny-r0")
    index_of = {key_of(index): index for index in range(max(acknowledged, default=0) + 2)}
    listed = {index_of[info.key] for info in store.scan()}
    assert acknowledged <= listed
    assert all(is_intact(store, index) for index in listed)
    assert store.stats().corrupt == 0
    assert not list(folder.rglob("v3/*/*/.*.tmp"))
    return len(left)


@pytest.mark.parametrize("min_kills", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(
    writers: Writers, tmp_path: Path, request: pytest.FixtureRequest, min_kills: int
) -> None:
    moments = random.Random(min_kills)
    acknowledged: set[int] = set()
    kills = in_mid_write = checked = 0
    while kills < min_kills or in_mid_write < min_kills // KILLS_PER_MID_WRITE:
        pid = writers.start(folder=str(tmp_path), first=max(acknowledged, default=-1) + 1)
        if kills % 3:  # on a busy machine a writer may take long to begin
            writers.wait_for_the_first()
        time.sleep(moments.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        acknowledged |= {int(line) for line in writers.finish()}
        in_mid_write += check_folder(tmp_path, acknowledged) > 0
        kills += 1
        checked += len(acknowledged)
        assert kills < min_kills + 500
        if kills % 4 == 0:  # start over, or the check of all chunks takes ever longer
            shutil.rmtree(tmp_path)
            acknowledged = set()
    counts = {"kills": kills, "in_mid_write": in_mid_write, "chunks_checked": checked}
    request.node.user_properties += counts.items()


def test_sigkill_at_every_disk_call(
    writers: Writers, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """And at every statement to SQLite, from the opening of a new folder to the second chunk."""
    for dies_at in itertools.count(1):
        folder = tmp_path / str(dies_at)
        writers.start(folder=str(folder), first=0, dies_at=dies_at)
        acknowledged = {int(line) for line in writers.finish()}
        if folder.exists():
            check_folder(folder, acknowledged)
        if 1 in acknowledged:
            break
    assert dies_at > 60
    request.node.user_properties.append(("deaths", dies_at - 1))


def test_a_real_limit_on_the_file_size(writers: Writers, tmp_path: Path) -> None:
    """The system itself refuses half way through a write."""
    writers.start(folder=str(tmp_path), first=0, file_limit=1_500_000)
    *acknowledged, refused = writers.finish()
    assert acknowledged == [str(index) for index in range(6)]
    assert "File too large" in refused
    assert "ulimit -f" in refused
    assert check_folder(tmp_path, set(range(6))) == 0
