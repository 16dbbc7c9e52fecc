"""A disk store under any sequence of what may happen to it, in two processes, against a dictionary.

Never: another chunk than was put, a chunk over the capacity, an error that is not ours. Where
nothing may evict: no acknowledged chunk is lost, however the processes ended.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from chunks import chunk_of, key_of, same
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cacheblend_rag.store import DiskStore, Encoding
from cacheblend_rag.store.chunk_file import header_of
from cacheblend_rag.store.evict import POLICIES

FORK = multiprocessing.get_context("fork")
SEEDS = st.integers(0, 11)
NAMES = st.sampled_from(["a.txt", "b.txt", "c.txt"])
LARGEST = header_of(key_of(0), chunk_of(0, num_tokens=9)).file_bytes


def tokens_of(seed: int) -> int:
    return 1 + seed % 9


def put(store: DiskStore, seed: int) -> None:
    store.put(key_of(seed), chunk_of(seed, num_tokens=tokens_of(seed)))


def get(store: DiskStore, seed: int) -> str:
    found = store.get(key_of(seed))
    if found is None:
        return "absent"
    return "right" if same(found, chunk_of(seed, num_tokens=tokens_of(seed))) else "WRONG"


def serve(pipe: Connection, options: dict[str, Any]) -> None:
    """The second process: does what it is told, and may be told to die in the middle of a put."""
    store = DiskStore(**options)
    while True:
        action, seed, dies_at = pipe.recv()
        if action == "die":
            die_at(dies_at)
            put(store, seed)
            os._exit(1)
        if action == "put":
            pipe.send(put(store, seed))
        elif action == "get":
            pipe.send(get(store, seed))
        elif action == "discard":
            pipe.send(store.discard(key_of(seed)))
        elif action == "scan":
            pipe.send(sorted(info.key for info in store.scan()))


def die_at(countdown: int) -> None:
    calls = iter(range(1, 1000))
    for name in ("open", "write", "fsync", "replace", "close"):
        real = getattr(os, name)

        def dying(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            if next(calls) == countdown:
                os._exit(1)
            return _real(*args, **kwargs)

        setattr(os, name, dying)


class Machine(RuleBasedStateMachine):
    counts = {"operations": 0, "crashes": 0, "runs": 0}  # noqa: RUF012 - of all runs together

    @initialize(
        room=st.sampled_from([None, 3, 6]),
        policy=st.sampled_from(sorted(POLICIES)),
        fp8=st.just(False),
    )
    def begin(self, room: int | None, policy: str, fp8: bool) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.capacity = None if room is None else room * LARGEST
        self.options = {
            "folder": self.folder / "kv",
            "namespace": "tiny-r0",
            "capacity_bytes": self.capacity,
            "policy": POLICIES[policy],
            "encoding": Encoding(fp8=fp8),
        }
        self.surely: set[int] = set()  # put, acknowledged, and nothing may have removed them
        self.perhaps: set[int] = set()
        self.others: set[int] = set()  # put by another process, which may yet say for what
        self.mine: set[int] = set()  # put by this opening of the store, which did not say it since
        self.documents: dict[str, set[int]] = {}
        self.child: multiprocessing.process.BaseProcess | None = None
        self.store = DiskStore(**self.options)
        self.counts["runs"] += 1

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.end_child()
            self.store.close()
            shutil.rmtree(self.folder)

    # ---- what this process does ----------------------------------------------------------------

    @rule(seed=SEEDS)
    def put(self, seed: int) -> None:
        put(self.store, seed)
        self.was_put(seed)
        self.others.discard(seed)
        self.mine.add(seed)

    @rule(seed=SEEDS)
    def get(self, seed: int) -> None:
        self.check(seed, get(self.store, seed))

    @rule(seed=SEEDS)
    def discard(self, seed: int) -> None:
        self.store.discard(key_of(seed))
        self.is_gone(seed)

    @rule(seed=SEEDS)
    def touch(self, seed: int) -> None:
        self.store.touch(key_of(seed))
        self.counts["operations"] += 1

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    def open(self) -> None:
        """What an opening has put is another's for the next one."""
        self.others |= self.mine
        self.mine = set()
        self.store = DiskStore(**self.options)

    @rule()
    def lose_the_index(self) -> None:
        self.end_child()
        self.store.close()
        for path in (self.folder / "kv").glob("index.sqlite*"):
            path.unlink()
        self.documents = {}
        self.open()
        assert not self.store.recovery.index_rebuilt

    @rule(seed=SEEDS, position=st.integers(0, 2000))
    def damage(self, seed: int, position: int) -> None:
        for path in (self.folder / "kv").rglob(f"{key_of(seed)}.safetensors"):
            content = bytearray(path.read_bytes())
            content[position % len(content)] ^= 1
            path.write_bytes(content)
            assert get(self.store, seed) == "absent"
            self.is_gone(seed)

    @rule(name=NAMES, seeds=st.sets(SEEDS, max_size=4))
    def register(self, name: str, seeds: set[int]) -> None:
        self.store.register(name, map(key_of, sorted(seeds)))
        self.mine -= seeds
        if seeds:
            self.documents.setdefault(name, set()).update(seeds)

    @rule(name=NAMES)
    def forget(self, name: str) -> None:
        self.store.forget(name)
        gone = self.documents.pop(name, set()).difference(*self.documents.values())
        for seed in gone:
            assert seed in self.others or not self.store.contains(key_of(seed))
            self.is_orphaned(seed)

    @rule(live=st.sets(NAMES))
    def gc(self, live: set[str]) -> None:
        self.store.gc(live)
        for name in self.documents.keys() - live:
            gone = self.documents.pop(name).difference(*self.documents.values())
            for seed in gone:
                self.is_orphaned(seed)

    # ---- what another process does -------------------------------------------------------------

    @rule(seed=SEEDS, action=st.sampled_from(["put", "get", "discard"]))
    def elsewhere(self, seed: int, action: str) -> None:
        answer = self.ask(action, seed)
        if action == "put":
            self.was_put(seed)
            self.others.add(seed)
        elif action == "discard":
            self.is_gone(seed)
        else:
            self.check(seed, answer)

    @rule(seed=SEEDS, dies_at=st.integers(1, 14))
    def crash_elsewhere(self, seed: int, dies_at: int) -> None:
        self.start_child()
        self.pipe.send(("die", seed, dies_at))
        assert self.child is not None
        self.child.join(20)
        assert self.child.exitcode == 1
        self.child = None
        self.perhaps.add(seed)
        self.others.add(seed)
        self.may_have_evicted()
        self.counts["crashes"] += 1

    @precondition(lambda self: self.child is not None)
    @rule()
    def both_list_the_same(self) -> None:
        assert self.ask("scan", 0) == sorted(info.key for info in self.store.scan())

    # ---- what must be true ---------------------------------------------------------------------

    @invariant()
    def what_is_listed_was_put(self) -> None:
        if hasattr(self, "store"):
            listed = {info.key for info in self.store.scan()}
            assert {key_of(seed) for seed in self.surely} <= listed
            assert listed <= {key_of(seed) for seed in self.surely | self.perhaps}

    @invariant()
    def the_capacity_is_kept(self) -> None:
        if hasattr(self, "store") and self.capacity is not None:
            sizes = [path.stat().st_size for path in self.folder.rglob("*.safetensors")]
            # a process that died between making room and removing the file may leave one too many
            assert sum(sizes) <= self.capacity + LARGEST * (self.counts["crashes"] > 0)

    # ---- helpers -------------------------------------------------------------------------------

    def check(self, seed: int, answer: str) -> None:
        self.counts["operations"] += 1
        assert answer != "WRONG"
        if seed in self.surely:
            assert answer == "right"
        if seed not in self.surely | self.perhaps:
            assert answer == "absent"

    def was_put(self, seed: int) -> None:
        self.counts["operations"] += 1
        self.may_have_evicted()
        (self.surely if self.capacity is None else self.perhaps).add(seed)

    def is_orphaned(self, seed: int) -> None:
        """No document consists of it any more."""
        if seed in self.surely | self.perhaps and seed in self.others:
            self.surely.discard(seed)
            self.perhaps.add(seed)  # what another process put just now stays
        else:
            self.is_gone(seed)

    def is_gone(self, seed: int) -> None:
        self.counts["operations"] += 1
        self.surely.discard(seed)
        self.perhaps.discard(seed)

    def may_have_evicted(self) -> None:
        if self.capacity is not None:
            self.perhaps |= self.surely
            self.surely = set()

    def ask(self, action: str, seed: int) -> Any:
        self.start_child()
        self.pipe.send((action, seed, 0))
        assert self.pipe.poll(20)
        return self.pipe.recv()

    def start_child(self) -> None:
        if self.child is None:
            self.pipe, other = FORK.Pipe()
            self.child = FORK.Process(target=serve, args=(other, self.options))
            self.child.start()
            other.close()

    def end_child(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.join()
            self.child = None


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and waiting for the disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("examples", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_any_sequence(examples: int, no_fsync: None, request: pytest.FixtureRequest) -> None:
    Machine.counts = dict.fromkeys(Machine.counts, 0)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            derandomize=examples < 100,  # new walks are for the slow one
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    request.node.user_properties += Machine.counts.items()
