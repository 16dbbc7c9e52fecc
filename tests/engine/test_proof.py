"""A blend that is to show that blends are right, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_rag.engine import blend as module
from cacheblend_rag.engine.blend import Blender
from cacheblend_rag.engine.device_cache import DeviceCache
from cacheblend_rag.engine.executor import Region
from cacheblend_rag.engine.outcome import BlendOutcome, BlendTask, Clock
from cacheblend_rag.engine.staging import Transfer
from cacheblend_rag.plan import Kind, Plan, Segment
from cacheblend_rag.store.base import ChunkKV

pytestmark = pytest.mark.vllm
CPU, LAYERS = torch.device("cpu"), 3
TOKENS = tuple(range(50, 80))
KEYS = ["a" * 64, "b" * 64]
SEGMENTS = (
    Segment(0, 2),
    Segment(2, 12, KEYS[0], 0, Kind.REUSE),
    Segment(12, 26, KEYS[1], 3, Kind.REUSE),
)


class OwnKV:
    """Stands where ``Proof`` does: the prompt's own KV, which no model computes here."""

    key = module.Proof.key

    def __init__(self, handle: Any, token_ids: tuple[int, ...], most_tokens: int) -> None:
        self.chunk = ChunkKV(token_ids, 0, torch.randn(LAYERS, 2, len(token_ids), 1, 4))


def region_of(patch: pytest.MonkeyPatch) -> Region:
    """What the executor of a proof's blend gets."""
    patch.setattr(module, "Proof", OwnKV)
    regions: list[Region] = []

    def executors(region: Region, first: range) -> Any:
        regions.append(region)
        return SimpleNamespace(region=region, give_up=lambda: None)

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=64))
    handle = SimpleNamespace(config=config, device=CPU, num_layers=LAYERS)
    plan = Plan(
        segments=SEGMENTS, question_start=26, ratio=1.0, selector="query", selector_options={}
    )
    task = BlendTask("0", "0", TOKENS, (), plan, (1, 2), 0, len(TOKENS), 20, proves=True)
    executors.unstage = lambda: None  # type: ignore[attr-defined]
    blender: Any = Blender(handle, None, None, executors)  # type: ignore[arg-type]
    choice = blender.choose(task, BlendOutcome(Clock(CPU), SEGMENTS))
    assert choice.proof is not None and len(choice.positions) == len(TOKENS)
    return regions[0]


def test_a_proof_names_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its spans hold another KV than the chunks that stand there."""
    region = region_of(monkeypatch)
    assert [(s.start, s.end, s.offset) for s in region.spans] == [(2, 12, 2), (12, 26, 12)]
    assert not {s.key for s in region.spans} & set(KEYS)
    assert len({s.key for s in region.spans}) == 1, "it is brought once"


def test_a_proof_leaves_nothing_in_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What later requests take for a chunk in GPU memory would be the whole prompt of the proof."""
    region = region_of(monkeypatch)
    sources = {s.key: s.chunk for s in region.spans}
    device_cache = DeviceCache(1 << 20, CPU)
    staging: Any = SimpleNamespace(
        device=CPU,
        num_layers=LAYERS,
        device_cache=device_cache,
        room=lambda a_layer: (2, 1),
        take=lambda count, nbytes: SimpleNamespace(
            memory=torch.empty(count, nbytes, dtype=torch.uint8), nbytes=nbytes
        ),
    )
    transfer = Transfer(staging, sources, range(1))
    assert transfer.address_LS.shape == (LAYERS, 1) and not transfer._filling
    assert device_cache.nbytes == 0
    assert all(device_cache.complete(key) is None for key in [*KEYS, *sources])
