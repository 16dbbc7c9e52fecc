"""What stored chunks are called depends on the model, and not on how its engine was started."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import logprobs, start_in_process
from safetensors.torch import load_file, save_file
from tiny import Words, make

from cacheblend_rag import BlendConfig

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SAMPLING: dict[str, Any] = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True, "logprobs": -1}

words = Words(41)
CHUNKS = [words(n) for n in (70, 100, 64)]
PROMPT = words(5) + CHUNKS[0] + words(3) + CHUNKS[1] + CHUNKS[2] + words(20)


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> Path:
    return make("llama", tiny_models)


def name(path: Path, rank: int = 0, size: int = 1, **options: Any) -> str:
    """The fingerprint of a model without layers, with the RoPE of its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from cacheblend_rag.engine.fingerprint import fingerprint
    from cacheblend_rag.engine.rope import Rerotator, tables_of

    given = {"dtype": "float32", "max_model_len": 512, "skip_tokenizer_init": True, **options}
    config = EngineArgs(model=str(path), **given).create_engine_config()
    text = config.model_config.hf_text_config
    with set_current_vllm_config(config):
        rope = get_rope(32, text.max_position_embeddings, True, text.rope_parameters)
        whole = torch.nn.Sequential(rope, torch.nn.Linear(2, 2, bias=False))
    torch.nn.init.ones_(whole[1].weight)
    moves = Rerotator(tables_of(whole, 1, 32)[:1], [0], torch.device("cpu"))
    return fingerprint(whole, config, moves, rank, size)


@pytest.mark.parametrize(
    "options",
    [
        {"max_model_len": 1024},
        {"block_size": 64, "max_num_seqs": 3, "max_num_batched_tokens": 640},
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        {"gpu_memory_utilization": 0.3, "num_gpu_blocks_override": 99, "enforce_eager": True},
        {"enable_prefix_caching": False, "seed": 7, "max_logprobs": 3, "served_model_name": "x"},
        {"load_format": "safetensors", "safetensors_load_strategy": "eager"},
        {"model_loader_extra_config": {"enable_multithread_load": True}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_starting_are_no_part_of_the_name(model: Path, options: dict[str, Any]) -> None:
    assert name(model, **options) == name(model)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}},
        {"hf_overrides": {"sliding_window": 64}},
        {"hf_overrides": {"rms_norm_eps": 0.01}},
        {"load_format": "dummy"},
        {"code_revision": "other"},
    ],
    ids=lambda options: str(next(iter(options.items()))),
)
def test_what_changes_kv_changes_the_name(model: Path, options: dict[str, Any]) -> None:
    assert name(model, **options) != name(model)


def test_quantizing_while_loading_changes_the_name(model: Path) -> None:
    assert name(model, dtype="bfloat16", quantization="fp8") != name(model, dtype="bfloat16")


def test_a_function_of_overrides_counts_by_what_comes_of_it(model: Path) -> None:
    def changed(by: float) -> Callable[[Any], Any]:
        def change(config: Any) -> Any:
            config.rms_norm_eps = by
            return config

        return change

    one, same, other = (name(model, hf_overrides=changed(by)) for by in (0.01, 0.01, 0.02))
    assert one == same != other


def test_every_byte_of_the_weights_counts_but_not_where_they_are(
    model: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    assert name(copy) == name(model)
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    row = tensors["model.embed_tokens.weight"][300]
    row[[1, 2]] = row[[2, 1]]  # the sum stays
    save_file(tensors, weights, metadata={"format": "pt"})
    assert name(copy) != name(model)
    moved = shutil.copytree(model, tmp_path / "moved")
    facts = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**facts, "rms_norm_eps": 0.01}))
    assert name(moved) != name(model)


def test_the_first_rank_names_files_and_all_ranks_what_was_loaded(model: Path) -> None:
    assert name(model, rank=1, size=2) == "" != name(model, rank=0, size=2) == name(model)
    loaded = {
        name(model, rank, size, load_format="dummy") for rank, size in ((0, 1), (0, 2), (1, 2))
    }
    assert len(loaded) == 3 and "" not in loaded


def test_every_option_of_this_vllm_was_decided() -> None:
    from vllm.config import LoadConfig, ModelConfig

    from cacheblend_rag.engine.fingerprint import COUNTED, HARMLESS

    assert not COUNTED & HARMLESS
    known = {field.name for kind in (ModelConfig, LoadConfig) for field in dataclasses.fields(kind)}
    assert known <= COUNTED | HARMLESS | {"model_arch_config"}


def test_an_engine_started_otherwise_reuses_what_is_stored(model: Path, tmp_path: Path) -> None:
    config = BlendConfig(ingest_prefix=words(4), store=f"file://{tmp_path}", blend_if="always")
    with start_in_process(model, config=config, max_model_len=640, block_size=64) as blend:
        assert blend.ingest(CHUNKS, progress=False).computed == len(CHUNKS)
    with start_in_process(model, config=config, max_num_batched_tokens=128) as blend:
        result = blend.generate(PROMPT, recompute_ratio=1.0, **SAMPLING)
        assert result.report.tokens_recomputed > 200
        full = blend.generate(PROMPT, mode="full", **SAMPLING)
        torch.testing.assert_close(logprobs(result), logprobs(full), atol=2e-4, rtol=0)
        assert blend.generate(PROMPT, **SAMPLING).report.tokens_reused > 100
        assert blend.ingest(CHUNKS, progress=False).present == len(CHUNKS)


@pytest.mark.parametrize(
    ("size", "some", "total", "first"),
    [
        (2, 4, 8, [0, 4]),
        (4, 1, 4, [0, 1, 2, 3]),
        (4, 1, 2, [0, 0, 1, 1]),  # fewer heads than ranks: some have the same
        (2, 1, 1, [0, 0]),
        (2, 3, 3, [0, 0]),  # not divided at all
    ],
)
def test_heads_of_ranks_make_up_a_whole_chunk(
    size: int, some: int, total: int, first: list[int]
) -> None:
    from cacheblend_rag.engine.heads import once, share

    ranks = [share(rank, size, some, total) for rank in range(size)]
    assert [heads.first for heads in ranks] == first
    assert [heads.leads for heads in ranks] == [True] + [False] * (size - 1)
    whole_2THD = torch.randn(2, 5, total, 3)
    own = [whole_2THD[:, :, h.first : h.first + h.some] for h in ranks]
    assert torch.equal(once(torch.cat(own, dim=2), ranks[0]), whole_2THD)


def test_a_hub_name_is_the_folder_that_it_was_downloaded_to(tmp_path: Path) -> None:
    from cacheblend_rag.engine.fingerprint import local_folder

    commit = "0123456789" * 4
    snapshot = tmp_path / "models--some--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    for revision in (None, "main", commit):
        assert local_folder("some/model", revision, str(tmp_path)) == snapshot
    assert local_folder("some/model", "other", str(tmp_path)) is None
    assert local_folder("some/other", None, str(tmp_path)) is None
    assert local_folder("s3://bucket/model", None, str(tmp_path)) is None
    assert local_folder(str(snapshot), None, None) == snapshot
