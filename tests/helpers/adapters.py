"""A random LoRA adapter of a tiny Llama, and the model that it makes of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(model: Path, seed: int, targets: tuple[str, ...] = _TARGETS) -> tuple[Path, Path]:
    """The adapter's folder, and that of the model with the adapter in its weights."""
    adapter = model.with_name(f"{model.name}-adapter-{seed}")
    merged = model.with_name(f"{model.name}-merged-{seed}")
    if (adapter / "adapter_config.json").exists():  # made for another test
        return adapter, merged
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(model, merged)
    adapter.mkdir()
    low_rank = {}
    for key, weight in list(weights.items()):
        name = key.removesuffix(".weight")
        if name.split(".")[-1] not in targets:
            continue
        a = torch.randn(RANK, weight.shape[1], generator=generator) * 0.1
        b = torch.randn(weight.shape[0], RANK, generator=generator) * 0.1
        low_rank[f"base_model.model.{name}.lora_A.weight"] = a
        low_rank[f"base_model.model.{name}.lora_B.weight"] = b
        weights[key] = weight + ALPHA / RANK * (b @ a)
    save_file(low_rank, adapter / "adapter_model.safetensors")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(targets),
        "bias": "none", "base_model_name_or_path": str(model), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, merged
