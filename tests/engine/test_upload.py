"""Small arrays on their way to the GPU. Needs a GPU, but for the last test."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cacheblend_rag.engine.upload import Uploads, upload

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("sees", [True, False], ids=["kernel", "copies"])
def test_arrays_arrive_whatever_the_gpu_is_at(sees: bool) -> None:
    """In memory that is filled many times, by two streams, of which one is far behind."""
    device, rng = torch.device("cuda"), np.random.default_rng(0)
    uploads = Uploads(device, 1 << 16)
    assert uploads._there is not None, "this GPU does not see page-locked memory"
    if not sees:
        uploads._there = None
    busy, streams = torch.randn(4096, 4096, device=device), [torch.cuda.Stream() for _ in range(2)]
    sent = []
    for turn in range(400):
        shape = tuple(int(n) for n in rng.integers(0, 60, size=int(rng.integers(1, 4))))
        dtype = rng.choice([np.int64, np.int32, np.bool_, np.float32])
        array = rng.integers(0, 100, shape).astype(dtype)
        with torch.cuda.stream(streams[turn % 2]):
            if turn % 50 == 0:
                for _ in range(20):
                    busy = busy @ busy.T
            sent.append((array.copy(), uploads([array])[0]))
        array[...] = 0  # the caller may use it again at once
    torch.cuda.synchronize()
    for array, there in sent:
        assert there.device.type == "cuda" and np.array_equal(there.cpu().numpy(), array)


@gpu
def test_an_array_larger_than_the_memory_is_copied() -> None:
    array = np.arange(100_000)
    assert np.array_equal(Uploads(torch.device("cuda"), 1 << 16)([array])[0].cpu().numpy(), array)


@gpu
def test_several_arrays_arrive_together() -> None:
    device, rng = torch.device("cuda"), np.random.default_rng(1)
    uploads = Uploads(device, 1 << 16)
    arrays = [
        rng.integers(0, 100, shape).astype(dtype)
        for shape, dtype in [
            ((3, 5), np.int64),
            ((0,), np.int64),
            ((7,), np.bool_),
            ((2,), np.int32),
        ]
    ]
    for _ in range(500):
        there = uploads(arrays)
    for array, copy in zip(arrays, there, strict=True):
        assert copy.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(copy.cpu().numpy(), array)


@gpu
def test_no_upload_waits_for_copies() -> None:
    """By the order of events: a second of copies is under way."""
    device, copying = torch.device("cuda"), torch.cuda.Stream()
    host = torch.empty(512 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    upload(np.arange(10), device)
    torch.cuda.synchronize()
    with torch.cuda.stream(copying):
        for _ in range(20):
            there.copy_(host, non_blocking=True)
        copied = copying.record_event()
    upload(np.arange(10), device)
    torch.cuda.current_stream().synchronize()
    assert not copied.query()


def test_nothing_is_copied_on_the_cpu() -> None:
    array = np.arange(10)
    assert upload(array, torch.device("cpu")).data_ptr() == array.ctypes.data
