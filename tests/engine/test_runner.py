"""What a step gives the model, as vLLM's V2 model runner of a GPU keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.runner import step_tensors
from cacheblend_rag.reason import Reason, RefusedError

ROWS, BLOCK = 12, 4


def runner_of(*, images: bool, dimensions: int) -> Any:
    """V2's tensors, of a model that takes images or has positions of several dimensions."""
    rope = SimpleNamespace(positions=torch.zeros(dimensions, ROWS + 1, dtype=torch.int64))
    encoder = SimpleNamespace(inputs_embeds=torch.zeros(ROWS, 2))
    return SimpleNamespace(
        supports_mm_inputs=images,
        model_state=SimpleNamespace(
            rope_state=rope if dimensions else None, encoder_runner=encoder if images else None
        ),
        input_buffers=SimpleNamespace(
            input_ids=torch.zeros(ROWS, dtype=torch.int32),
            positions=torch.zeros(ROWS, dtype=torch.int64),
        ),
        block_tables=SimpleNamespace(
            input_block_tables=[torch.arange(30, 54).view(2, 12)],
            kernel_block_sizes=[BLOCK],
            slot_mappings=torch.zeros(1, ROWS, dtype=torch.int64),
        ),
    )


@pytest.mark.parametrize("dimensions", [0, 3])
@pytest.mark.parametrize("images", [True, False])
def test_rows_of_text_are_written_in_all_dimensions_and_embedded(
    images: bool, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "NOT_RUN_ON_A_GPU", frozenset())
    runner = runner_of(images=images, dimensions=dimensions)
    asked = list[int]()

    @contextmanager
    def during(count: int) -> Iterator[None]:
        asked.append(count)
        yield
        asked.append(0)

    def embed(ids: torch.Tensor) -> torch.Tensor:
        assert asked == [len(ids)], "an adapter may change embeddings"
        return torch.stack([ids, -ids], -1).float()

    adapters = SimpleNamespace(during=during)
    handle: Any = SimpleNamespace(
        model=SimpleNamespace(embed_input_ids=embed),
        adapters=adapters,
        ranks=SimpleNamespace(agree=lambda: None),
    )
    tensors = step_tensors(runner, handle)
    slots = torch.zeros(ROWS, dtype=torch.int64)
    context = SimpleNamespace(slot_mapping={"a": slots, "b": slots})
    ids, positions = torch.tensor([7, 8, 9]), torch.tensor([2, 5, 40])
    tensors.write(slice(4, 7), 1, ids, positions, context)
    assert runner.input_buffers.input_ids[4:7].tolist() == [7, 8, 9]
    assert runner.input_buffers.positions[4:7].tolist() == [2, 5, 40]
    blocks = runner.block_tables.input_block_tables[0][1]
    expected = [int(blocks[p // BLOCK]) * BLOCK + p % BLOCK for p in (2, 5, 40)]
    assert slots[4:7].tolist() == expected
    assert not slots[:4].any() and not slots[7:].any()
    if dimensions:
        assert runner.model_state.rope_state.positions[:, 4:7].tolist() == [[2, 5, 40]] * 3
    if images:
        embeds = runner.model_state.encoder_runner.inputs_embeds
        assert embeds[4:7].tolist() == [[7, -7], [8, -8], [9, -9]]
        assert not embeds[:4].any() and not embeds[7:].any()
    tensors.write_nothing(slice(5, 7))
    written = runner.block_tables.slot_mappings[0]
    assert written[5:7].tolist() == [-1, -1] and not written[:5].any()


@pytest.mark.parametrize("embeds", [False, True])
def test_prompts_of_embeddings_are_refused_where_none_ran(embeds: bool) -> None:
    """V2 keeps their embeddings in a tensor of its own."""
    runner = runner_of(images=False, dimensions=0)
    runner.uses_inputs_embeds = embeds
    handle: Any = SimpleNamespace(model=None)
    if not embeds:
        step_tensors(runner, handle)
        return
    with pytest.raises(RefusedError, match="enable_prompt_embeds") as refused:
        step_tensors(runner, handle)
    assert refused.value.why.reason is Reason.PROMPT_EMBEDS


@pytest.mark.parametrize("zeroes", [True, False])
def test_vllm_says_whether_it_zeroes_new_blocks(zeroes: bool) -> None:
    assert hasattr(KVCacheConfig, "needs_kv_cache_zeroing"), "or nothing is begun ahead"
    runner = runner_of(images=False, dimensions=0)
    handle: Any = SimpleNamespace()
    runner.kv_cache_config = SimpleNamespace(needs_kv_cache_zeroing=zeroes)
    assert step_tensors(runner, handle).zeroes_blocks is zeroes
    runner.kv_cache_config = SimpleNamespace()
    assert step_tensors(runner, handle).zeroes_blocks, "a version that does not say so"
