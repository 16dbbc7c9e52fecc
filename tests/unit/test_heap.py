"""Memory that a worker gave back is given back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest

from cacheblend_rag.engine.heap import Heap


def test_once_a_minute_when_a_request_has_ended() -> None:
    calls, now = list[int](), 0.0

    def trim(kept: int) -> int:
        calls.append(kept)
        return 1

    heap = Heap(trim, lambda: now)
    for moment in (0.0, 59.0, 60.0, 61.0, 119.0, 120.5, 121.0):
        now = moment
        heap.request_ended()
    assert calls == [0, 0]
    now = 500.0
    heap.request_ended()
    assert len(calls) == 3


def test_a_gpus_worker_and_other_c_libraries_are_left_alone() -> None:
    assert Heap.of("cuda")._trim is None
    Heap(None, lambda: 1e9).request_ended()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_a_heap_full_of_gaps_gets_smaller() -> None:
    libc, size = ctypes.CDLL(None), 65536  # below what glibc would map by itself
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(size) for _ in range(2000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[::2] + blocks[1::200]:  # most of the others stay
        libc.free(block)
    before = _resident_mib()
    trim = Heap.of("cpu")._trim
    assert trim is not None
    Heap(trim, iter((0.0, 61.0, 61.0)).__next__).request_ended()
    freed = before - _resident_mib()
    for block in set(blocks[1::2]) - set(blocks[1::200]):
        libc.free(block)
    assert freed > 30, freed


def _resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
