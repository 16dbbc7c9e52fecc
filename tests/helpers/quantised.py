"""Tiny checkpoints of quantised weights, made here by rounding to nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make

Tensors = dict[str, torch.Tensor]
_GROUP = 128  # inputs that share a scale
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight columns in a word


def _w8a8(weight: torch.Tensor) -> Tensors:
    """8 bits, a scale for each output; activations are rounded by vLLM, token by token."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    rounded = (weight / scale).round().clamp(-128, 127).to(torch.int8)
    return {"weight": rounded, "weight_scale": scale.bfloat16()}


def _four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[inputs, outputs] of 0 to 15, 8 for zero, and a scale for each group and output."""
    inputs, outputs = weight.T.shape
    groups = weight.T.reshape(inputs // _GROUP, _GROUP, outputs)
    scale = groups.abs().amax(1) / 7
    rounded = (groups / scale[:, None]).round().clamp(-8, 7).add(8)
    return rounded.to(torch.int32).view(inputs, outputs), scale.bfloat16()


def _gptq(weight: torch.Tensor) -> Tensors:
    values, scale = _four_bits(weight)
    inputs, outputs = values.shape
    zeros = torch.full((inputs // _GROUP, outputs), 7, dtype=torch.int32)  # GPTQ adds one
    return {
        "qweight": _packed(values.T.contiguous(), range(8)).T,
        "qzeros": _packed(zeros, range(8)),
        "scales": scale,
        "g_idx": torch.arange(inputs, dtype=torch.int32) // _GROUP,
    }


def _awq(weight: torch.Tensor) -> Tensors:
    values, scale = _four_bits(weight)
    zeros = torch.full((len(scale), values.shape[1]), 8, dtype=torch.int32)
    return {
        "qweight": _packed(values, _AWQ_ORDER),
        "qzeros": _packed(zeros, _AWQ_ORDER),
        "scales": scale,
    }


def _packed(values: torch.Tensor, order: Any) -> torch.Tensor:
    """Eight neighbours of the last dimension in a word; ``order`` says which come first."""
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int32)
    for place, column in enumerate(order):
        words |= values[:, column::8] << (4 * place)
    return words


_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_CHANNELS = {
    "targets": ["Linear"],
    "weights": {**_INT8, "strategy": "channel", "dynamic": False},
    "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
}
# name: how a weight is rounded, and what config.json says of it
QUANTISED: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "w8a8": (
        _w8a8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": _CHANNELS},
        },
    ),
    "gptq": (
        _gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "desc_act": False, "sym": True},
    ),
    "awq": (
        _awq,
        {"quant_method": "awq", "bits": 4, "group_size": _GROUP, "zero_point": True,
         "version": "gemm"},
    ),
}  # fmt: skip


def make_quantised(name: str, folder: Path, family: str = "llama") -> Path:
    """A tiny model, its linear layers rounded; the output head and all else in bfloat16."""
    path = folder / f"{family}-{name}"
    if (path / "config.json").exists():
        return path
    source = make(family, folder)
    rounded, says = QUANTISED[name]
    found: Tensors = {}
    for key, weight in load_file(source / "model.safetensors").items():
        stem = key.removesuffix("weight")
        if stem.endswith("_proj."):
            found |= {stem + part: tensor.contiguous() for part, tensor in rounded(weight).items()}
        else:
            found[key] = weight.bfloat16()
    path.mkdir()
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": says, "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(config))
    return path
