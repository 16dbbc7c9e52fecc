"""KV on its way to the GPU: what was begun ahead is used, or given up. Needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cacheblend_rag.engine import staging as module
from cacheblend_rag.engine.device_cache import DeviceCache
from cacheblend_rag.engine.staging import Staging, Transfer
from cacheblend_rag.store.base import ChunkKV

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]
LAYERS = 6
FIRST = range(2, 4)  # wanted before the others


def chunk(tokens: int) -> ChunkKV:
    kv = torch.randn(LAYERS, 2, tokens, 2, 64).bfloat16().pin_memory()
    return ChunkKV(tuple(range(tokens)), 0, kv)


def test_a_transfer_begun_ahead_is_used_once_and_only_for_the_same_chunks() -> None:
    device = torch.device("cuda")
    a, b, c = chunk(300), chunk(200), chunk(250)
    for capacity in (0, a.nbytes + b.nbytes):
        device_cache = DeviceCache(capacity, device)
        staging = Staging(device, LAYERS, device_cache)
        for ahead, wanted in (
            ({"a": a, "b": b}, {"a": a, "b": b}),
            ({"a": a}, {"a": a, "b": b}),
            ({"c": c, "b": b}, {"b": b, "c": c}),
            ({"a": a}, {"a": chunk(300)}),
        ):
            device_cache.discard("a")
            staging.stage(ahead, FIRST)
            assert staging._expected is not None
            begun = staging._expected[-1]
            transfer = staging.begin(wanted, FIRST)
            same = [*ahead.items()] == [*wanted.items()]
            assert (transfer is begun) == same and staging._expected is None
            assert staging.begin(wanted, FIRST) is not transfer, "it is another request's"
            for key in (*ahead, *wanted):
                device_cache.discard(key)
            assert arrived(transfer, wanted)
        staging.stage({"a": a}, range(1))
        staging.stage({"b": b}, range(LAYERS))
        other = staging._expected
        assert other is not None and staging.begin({"b": b}, FIRST) is not other[-1], "by order"
        assert device_cache.get("a", a) is None, "what was given up does not stay half filled"


def test_a_transfer_held_starts_no_more_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP_BYTES", 1)  # a layer each
    device, a = torch.device("cuda"), chunk(300)
    transfer = Staging(device, LAYERS, DeviceCache(0, device)).begin({"a": a}, FIRST)
    transfer.start()
    assert len(transfer._ready) == 2
    assert transfer.arrive() == range(2, 3)
    transfer.used()
    assert len(transfer._ready) == 2
    transfer.hold()
    assert transfer.arrive() == range(3, 4)
    transfer.used()
    assert len(transfer._ready) == 3
    transfer.resume()
    assert len(transfer._ready) == LAYERS
    other = Staging(device, LAYERS, DeviceCache(0, device)).begin({"a": a}, FIRST)
    other.hold()
    assert arrived(other, {"a": a}), "what is needed comes all the same"


def test_many_transfers_take_little_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with many blends has one each, and vLLM has left a few percent of a GPU's memory."""
    device = torch.device("cuda")
    chunks = [{f"chunk {i}": chunk(2000)} for i in range(12)]
    a_layer = chunks[0]["chunk 0"].nbytes // LAYERS
    monkeypatch.setattr(module, "_GROUP_BYTES", 2 * a_layer)
    monkeypatch.setattr(module, "_SCARCE_BYTES", a_layer)
    staging = Staging(device, LAYERS, DeviceCache(0, device))
    staging.nbytes = 8 * a_layer
    before = torch.cuda.memory_allocated()
    transfers = [staging.begin(one, FIRST) for one in chunks]
    taken = torch.cuda.memory_allocated() - before
    assert [len(t._groups) for t in transfers] == [3, *[LAYERS] * 11]
    assert taken <= (8 + 11 * 2) * a_layer + (1 << 20)
    assert all(arrived(t, one) for t, one in zip(transfers, chunks, strict=True))
    del transfers
    assert staging.room(a_layer) == (4, 2), "what is through leaves its room"


def arrived(transfer: Transfer, wanted: dict[str, ChunkKV]) -> bool:
    """Whether each layer is at its address when it is said to be there."""
    came: list[int] = []
    while len(came) < LAYERS:
        layers = transfer.arrive()
        torch.cuda.current_stream().synchronize()
        for index in layers:
            for address, of in zip(
                transfer.address_LS[index],
                wanted.values(),
                strict=True,
            ):
                expected = of.kv_L2NHD[index]
                if not torch.equal(_read(int(address), expected), expected):
                    return False
        transfer.used()
        came += layers
    return came == [2, 3, 0, 1, 4, 5]


def _read(address: int, like: torch.Tensor) -> torch.Tensor:
    """Device memory at ``address``, as a tensor on the host."""
    interface = {"shape": (like.nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
    there = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device="cuda")
    return there.cpu().view(like.dtype).view(like.shape)
