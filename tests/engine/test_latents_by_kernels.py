"""Latents blended by the kernels' executor, which a GPU takes, here on the CPU engine: Triton
interprets the kernels, and what is copied is there at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blending import PARTS, PREFIX, PROMPT, blends_as_the_reference, forget_prompts
from engines import FULL_LOGPROBS, logprobs, selected, start_in_process
from reference import Reference
from tiny import make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import CacheBlend
from cacheblend_rag.engine import connectors
from cacheblend_rag.engine.executor import BlendExecutor, Region
from cacheblend_rag.engine.executors import ExecutorFactory
from cacheblend_rag.store.base import ChunkKV

pytest.importorskip("triton", reason="this platform has no Triton")
from cacheblend_kernels import propagate, rotate_and_scatter
from cacheblend_rag.engine.kernel_executor import KernelCache, KernelExecutor

pytestmark = pytest.mark.vllm


class Transfer:
    """Of chunks that need not be copied."""

    is_aligned = False

    def __init__(self, sources: Mapping[str, ChunkKV], num_layers: int) -> None:
        self._layers = range(num_layers)
        starts = [chunk.kv_L2NHD.data_ptr() for chunk in sources.values()]
        steps = [chunk.nbytes // num_layers for chunk in sources.values()]
        self.address_LS = np.array(
            [[s + layer * n for s, n in zip(starts, steps, strict=True)] for layer in self._layers],
            dtype=np.int64,
        )

    def arrive(self) -> range:
        return self._layers

    def nothing(self) -> None:
        """What only copies need."""

    used = hold = resume = give_up = nothing


class Staging:
    """Brings nothing."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers

    def begin(self, sources: Mapping[str, ChunkKV], first: range) -> Transfer:
        return Transfer(sources, self._num_layers)


class Graphs:
    """None."""

    def ask(self, *args: object) -> None:
        """No graph: the pass runs as it is."""


class Factory(ExecutorFactory):
    """Of executors for blends whose blocks are all there, as on a GPU."""

    def __init__(self, handle: Any, rope: Any, cache: Any) -> None:
        super().__init__(handle, rope, cache, "")
        self._kernels = KernelCache(handle, cache.block_size)
        self.made: list[KernelExecutor] = []

    def __call__(self, region: Region, first: range) -> BlendExecutor:
        assert len(region.task.blocks) * self._cache.block_size >= region.end
        staging: Any = Staging(self._handle.num_layers)
        graphs: Any = Graphs()
        made = KernelExecutor(
            region, self._handle, self._rope, self._cache, self._kernels, staging, graphs, first
        )
        self.made.append(made)
        return made


@pytest.fixture(scope="module", params=["deepseek_v2"])
def engine(
    request: pytest.FixtureRequest, tiny_models: Path
) -> Iterator[tuple[CacheBlend, Path, Factory]]:
    path = make(request.param, tiny_models)
    with contextlib.ExitStack() as during:
        # The interpreter takes its time for each program: as few as these prompts need.
        patch = during.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(propagate, "_PROGRAMS", 8)
        patch.setattr(rotate_and_scatter, "_TOKENS", 256)
        options: dict[str, Any] = {"prefix": PREFIX, "attention_backend": "CPU_MLA"}
        blend = during.enter_context(start_in_process(path, **options))
        assert blend.model_check.passed, blend.model_check.detail
        blend.ingest([p.ids for p in PARTS if p.stored], progress=False)
        side = connectors.ours(get_kv_transfer_group())
        factory = Factory(*side.worker_state.parts)
        assert side.rows is not None and side.rows.blender is not None
        side.rows.blender._executors = factory
        yield blend, path, factory


@pytest.fixture(autouse=True)
def nothing_cached(engine: tuple[CacheBlend, Path, Factory]) -> None:
    forget_prompts(engine[0])
    engine[2].made.clear()


def test_they_blend_as_the_reference(
    engine: tuple[CacheBlend, Path, Factory], record_property: Any
) -> None:
    blend, path, factory = engine
    record_property("ratio 1", blends_as_the_reference(blend, Reference(path, PREFIX)))
    assert len(factory.made) == 4, "a blend was made by another executor"


def test_they_are_what_the_plain_executor_makes_of_them(
    engine: tuple[CacheBlend, Path, Factory],
) -> None:
    blend, _, factory = engine
    side = connectors.ours(get_kv_transfer_group())
    assert side.rows is not None and side.rows.blender is not None
    plain = ExecutorFactory(*side.worker_state.parts, "to compare")
    options = {"recompute_ratio": 0.3, "propagation_length": 16, **FULL_LOGPROBS}
    answers = []
    for executors in (factory, plain):
        side.rows.blender._executors = executors
        forget_prompts(blend)
        answers.append(blend.generate(PROMPT, **options))
    side.rows.blender._executors = factory
    ours, theirs = answers
    assert len(factory.made) == 1 and ours.report.blended and theirs.report.blended
    assert selected(blend, ours) == selected(blend, theirs)
    torch.testing.assert_close(logprobs(ours), logprobs(theirs), atol=1e-3, rtol=0)
