"""Small arrays from the host to the device, of which nothing waits for what a GPU is copying."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from threading import Lock
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]

_HALF = 16 << 20  # bytes; some dozens of requests fill it
_ALIGNMENT = 16


def upload(host: Array | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on ``device``; without waiting for what a GPU is doing."""
    return upload_all([host.numpy() if isinstance(host, torch.Tensor) else host], device)[0]


def upload_all(hosts: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """The same of several arrays, which takes hardly longer than one."""
    if device.type != "cuda":
        return [torch.from_numpy(host) for host in hosts]
    return _uploads(device)([np.ascontiguousarray(host) for host in hosts])


@functools.cache
def _uploads(device: torch.device) -> Uploads:
    return Uploads(device, _HALF)


class Uploads:
    """Page-locked memory that a kernel reads.

    A GPU has one engine for copies from the host. A copy of a few bytes would queue there behind
    the KV of a blend, and what was queued behind the copy would wait too. A kernel does not.

    The memory is two halves, filled in turn. One is filled again when what was queued up to the
    last time is through, which it is by then. Any thread may upload.
    """

    def __init__(self, device: torch.device, half: int) -> None:
        self.device, self._half = device, half
        host = torch.empty(2 * half, dtype=torch.uint8, pin_memory=True)
        self._host, self._there = host.numpy(), _view(host)
        self._number, self._at = 0, 0  # the half, and how much of it is used
        self._streams: set[torch.cuda.Stream] = set()  # that read it
        self._read: list[list[torch.cuda.Event]] = [[], []]  # events behind all readers, by half
        self._lock = Lock()

    def __call__(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        """Copies of ``arrays`` (contiguous) on the device, queued on the current stream. They share
        memory, which is free once none of them is held.
        """
        starts = [0]
        for array in arrays:
            starts.append(starts[-1] - array.nbytes // -_ALIGNMENT * _ALIGNMENT)
        size = starts[-1]
        if self._there is None or size > self._half or not size:
            return [
                torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
                for array in arrays
            ]
        with self._lock, torch.cuda.device(self.device):
            first = self._room(size)
            for start, array in zip(starts, arrays, strict=False):
                place = slice(first + start, first + start + array.nbytes)
                self._host[place] = array.reshape(-1).view(np.uint8)
            words = self._there[first // 4 : (first + size) // 4]
            # an operation, as a copy of a tensor would be the copy that is to be avoided
            copy = torch.bitwise_or(words, 0).view(torch.uint8)
        return [
            copy[start : start + array.nbytes].view(_torch_dtype(array.dtype)).view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def _room(self, size: int) -> int:
        """The first of ``size`` bytes that nothing reads any more."""
        if self._at + size > self._half:
            self._read[self._number] = [stream.record_event() for stream in self._streams]
            self._streams.clear()
            self._number, self._at = 1 - self._number, 0
            for event in self._read[self._number]:
                event.synchronize()
        self._streams.add(torch.cuda.current_stream())
        start = self._number * self._half + self._at
        self._at += size
        return start


@functools.cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _view(host: torch.Tensor) -> torch.Tensor | None:
    """Page-locked memory as the GPU sees it, int32; None where it does not."""
    interface = {
        "shape": (host.nbytes // 4,), "typestr": "<i4", "data": (host.data_ptr(), False),
        "version": 3,
    }  # fmt: skip
    try:
        return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device="cuda")
    except RuntimeError:  # uploads are copies then
        return None
