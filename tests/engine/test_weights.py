"""Weights that are changed in a running engine: chunks of the old ones are of another model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import start_in_process
from tiny import Words, make
from torch import nn

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine import compat
from cacheblend_rag.engine.weights import Weights
from cacheblend_rag.errors import EngineError
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

words = Words(47)
A, B, C, QUESTION = words(70), words(90), words(64), words(15)
ALONE: Any = SimpleNamespace(any=lambda flags: flags)


@pytest.fixture
def blend(tiny_models: Path, in_process: None, tmp_path: Path) -> Iterator[CacheBlend]:
    config = BlendConfig(store=str(tmp_path / "store"), blend_if="always")
    with start_in_process(make("llama", tiny_models), config=config) as found:
        yield found


def asked(blend: CacheBlend, first: int = 7, **options: Any) -> Any:
    ids = (first, *A, 3, *B, *QUESTION)
    return blend.generate(ids, max_tokens=2, temperature=0.0, **options)


def change(worker: Any) -> None:
    """As ``reload_weights`` and vLLM's transfers of weights do: in place."""
    layer = worker.get_model().model.layers[1]
    with torch.no_grad():  # the CPU engine keeps matrices packed elsewhere
        layer.input_layernorm.weight.mul_(1.5)


def llm(blend: CacheBlend) -> Any:
    return blend._engine._open()  # type: ignore[attr-defined]


def test_what_was_computed_with_other_weights_is_not_blended(blend: CacheBlend) -> None:
    blend.ingest([A, B], progress=False)
    assert asked(blend).report.blended
    llm(blend).reset_prefix_cache(reset_connector=True)
    looked_up = asked(blend).report  # exact, as nobody knows yet
    assert (looked_up.blended, looked_up.reason) == (False, Reason.NOT_READY)
    assert asked(blend, 8).report.blended, "they were the same"
    llm(blend).collective_rpc(change)
    llm(blend).reset_prefix_cache(reset_connector=True)
    exact = [asked(blend), asked(blend), asked(blend, mode="off")]
    assert not any(each.report.blended for each in exact)
    assert exact[1].report.reason == Reason.WEIGHTS_CHANGED
    assert len({each.token_ids for each in exact}) == 1
    with pytest.raises(EngineError, match="weights were changed"):
        blend.ingest([C], progress=False)


def test_nothing_is_stored_that_other_weights_computed(blend: CacheBlend) -> None:
    """Also where nobody had vLLM's caches dropped: other engines read the same store."""
    blend.ingest([A], progress=False)
    llm(blend).collective_rpc(change)
    with pytest.raises(EngineError, match="weights were changed"):
        blend.ingest([B], progress=False)
    assert asked(blend).report.reason == Reason.WEIGHTS_CHANGED


def test_an_engine_whose_weights_are_to_be_changed_is_refused() -> None:
    parallel = SimpleNamespace(
        pipeline_parallel_size=1,
        data_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
    )
    config: Any = SimpleNamespace(
        parallel_config=parallel, speculative_config=None, weight_transfer_config=None
    )
    assert compat.engine_refusal(config) is None
    config.weight_transfer_config = object()
    refused = compat.engine_refusal(config)
    assert refused is not None and refused.reason is Reason.WEIGHTS_CHANGED


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(64, 48, dtype=torch.bfloat16).t())
        self.packed = nn.Parameter(
            torch.randint(0, 99, (32, 8), dtype=torch.int8), requires_grad=False
        )
        self.experts = nn.ModuleDict({"w": nn.Linear(4, 4)})
        self.empty = nn.Parameter(torch.zeros(0))


@pytest.mark.parametrize("which", ["wide", "packed", "experts"])
def test_a_change_of_any_weight_is_seen(which: str) -> None:
    model = nn.ModuleDict({"mlp": Model()})
    all_of_them = Weights(model, ALONE)
    around = nn.ModuleDict({"layers": model, "norm": nn.LayerNorm(8)})
    but_layers = Weights(around, ALONE, moves_layers=True)
    but_experts = Weights(model, ALONE, moves_experts=True)
    assert not all_of_them.are_changed() and not but_experts.are_changed()
    with torch.no_grad():
        part = model.mlp.experts.w.weight if which == "experts" else getattr(model.mlp, which)
        part.add_(1)
    assert all_of_them.are_changed()
    assert but_experts.are_changed() == (which != "experts")
    assert not but_layers.are_changed()
    with torch.no_grad():
        around.norm.weight.mul_(2)
    assert but_layers.are_changed()
