"""Small arrays from the host to the device, of which nothing waits for what a GPU is copying."""

from __future__ import annotations

import functools
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
    if device.type != "cuda":
        return torch.from_numpy(host) if isinstance(host, np.ndarray) else host
    array = host.numpy() if isinstance(host, torch.Tensor) else host
    return _uploads(device)(np.ascontiguousarray(array))


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

    def __call__(self, array: Array) -> torch.Tensor:
        """A copy of ``array`` (contiguous) on the device, queued on the current stream."""
        size = -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._there is None or size > self._half or not size:
            return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)
        with self._lock, torch.cuda.device(self.device):
            start = self._room(size)
            self._host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
            words = self._there[start // 4 : (start + size) // 4]
            # an operation, as a copy of a tensor would be the copy that is to be avoided
            copy = torch.bitwise_or(words, 0)
        dtype = torch.from_numpy(array).dtype
        return copy.view(torch.uint8)[: array.nbytes].view(dtype).view(array.shape)

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
