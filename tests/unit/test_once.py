"""What a process has once is made once, however many threads ask for it first."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cacheblend_rag.once import once

THREADS = 8


def test_threads_that_come_together_get_the_same() -> None:
    made: list[object] = []
    together = threading.Barrier(THREADS)

    @once
    def make() -> object:
        threading.Event().wait(0.05)  # all come while the first is at it
        made.append(object())
        return made[-1]

    def ask(_: int) -> object:
        together.wait(10)
        return make()

    with ThreadPoolExecutor(THREADS) as pool:
        got = list(pool.map(ask, range(THREADS)))
    assert len(made) == 1 and set(map(id, got)) == {id(made[0])}


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("cacheblend_rag.store.metrics", "count('memory', 'hits', 1)"),
        ("cacheblend_rag.store.metrics", "wrote('memory', 1)"),
        ("cacheblend_rag.metrics", "observe(report)"),
    ],
)
def test_first_counts_of_a_process_from_several_threads(module: str, call: str) -> None:
    pytest.importorskip("prometheus_client")
    code = f"""
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from {module} import *
from cacheblend_rag.report import BlendReport
assert "prometheus_client" not in sys.modules
report = BlendReport(mode="blend", blended=True, tokens_total=1, tokens_fresh=1)
together = threading.Barrier({THREADS})
def first(_):
    together.wait(10)
    {call}
with ThreadPoolExecutor({THREADS}) as pool:
    list(pool.map(first, range({THREADS})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
