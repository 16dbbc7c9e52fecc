"""What ``benchmarks/two_gpus.py`` makes of engines, which are no real ones here."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark import FOLDER, benchmark


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return benchmark("two_gpus")


def options(two_gpus: ModuleType, *more: str) -> Any:
    return two_gpus.options(["--shape", "tiny", "--dtype", "float32", "--sizes", "2x32", *more])


def test_three_engines_are_measured_in_turn(
    two_gpus: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fake_gpus

    found = two_gpus.run(
        options(two_gpus, "--json", str(tmp_path / "found.json")), tmp_path, fake_gpus.serve
    )
    assert list(found.values()) == pytest.approx([0.9, 1.0, 1.0, 1.0, 2.0])
    assert found.keys() == two_gpus.BOUNDS.keys()
    printed = capsys.readouterr().out
    assert printed.startswith("sees 0,") and "0.9000" in printed
    assert json.loads((tmp_path / "found.json").read_text())["rows"]["load"]["full"]["2"]
    assert not two_gpus.judge(found, set(found)), "a choice in ten is another"
    assert two_gpus.judge({**found, next(iter(found)): 0.97}, set(found))
    assert two_gpus.judge(found, set(two_gpus.TIMES)), "of the times alone"


def test_an_engine_that_fails_is_named_and_leaves_no_process(
    two_gpus: ModuleType, tmp_path: Path
) -> None:
    import fake_gpus

    others = set(multiprocessing.active_children())  # engines that other tests share
    args = options(two_gpus, "--attention-backend", "2")
    with pytest.raises(RuntimeError, match=r"engine 2: (?s:.)*no memory on purpose"):
        two_gpus.run(args, tmp_path, fake_gpus.serve)
    assert set(multiprocessing.active_children()) <= others


def test_processes_see_their_gpus_only(
    two_gpus: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    for devices, seen in (([0], "4"), ([1], "6"), ([0, 1], "4,6")):
        with two_gpus.seeing(devices):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_choices_and_distances(two_gpus: ModuleType) -> None:
    row = two_gpus.Row
    one, other = row([1, 2, 3, 9], 3, {}, {}, {}), row([1, 2, 4, 9], 3, {}, {}, {})
    assert two_gpus.common(one, one) == 1.0
    assert two_gpus.common(one, other) == pytest.approx(2 / 3)
    assert two_gpus.distance({1: -1.0, 2: -2.0}, {1: -1.5, 3: -9.0}) == pytest.approx(0.5)
    assert two_gpus.distance({1: -1.0}, {2: -1.0}) == float("inf")


def test_weights_are_a_checkpoint_that_transformers_reads(
    two_gpus: ModuleType, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for shape, layers in (("tiny", None), ("qwen2.5-0.5b", 1)):
        folder = tmp_path / shape
        nbytes = two_gpus.write_weights(folder, shape, layers, "bfloat16")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True
        )
        assert not any(info.values()), info
        assert nbytes == sum(p.nbytes for p in model.parameters())
        state = model.state_dict()
        norm, query = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj."
        assert bool((state[norm] == 1).all())
        assert float(state[f"{query}weight"].float().std()) == pytest.approx(0.02, rel=0.1)
        if shape != "tiny":  # tied, and with biases that are small
            assert float(state[f"{query}bias"].float().abs().max()) < 0.2
