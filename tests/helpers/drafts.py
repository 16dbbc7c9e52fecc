"""Tiny random models that draft tokens for others, for speculative decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make

# by method of vLLM's: the family whose model answers
TARGETS = {
    "ngram": "llama",
    "draft_model": "llama",
    "eagle": "llama",
    "eagle3": "llama",
    "mtp": "ernie4_5_moe",
    "mtp-dense": "qwen2",  # without experts, as some GPU machines have no kernels for them
}


def make_drafting(method: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A model, and vLLM's speculative configuration for it."""
    target = make(TARGETS[method], folder)
    method, _, dense = method.partition("-")
    spec: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        spec |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    elif method == "draft_model":
        spec["model"] = str(target)  # drafts what it answers: all of them are taken
    elif method == "eagle":
        spec["model"] = str(_eagle(target, folder / "eagle"))
    elif method == "eagle3":
        spec["model"] = str(_eagle3(target, folder / "eagle3"))
    elif method == "mtp":
        make_mtp = _mtp_of_mimo if dense else _mtp
        target, spec["num_speculative_tokens"] = make_mtp(target, folder / f"mtp{dense}"), 1
    return target, spec


def _eagle(target: Path, path: Path) -> Path:
    """A draft of one layer, that of the model's first one, which also gets its hidden states."""
    weights = load_file(target / "model.safetensors")
    layer = "model.layers.0."
    own = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith(layer)}
    hidden = own["layers.0.input_layernorm.weight"].numel()
    del own["layers.0.input_layernorm.weight"]
    own["fc.weight"] = _joining(hidden)
    config = json.loads((target / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
    return _save(path, own, config)


def _eagle3(target: Path, path: Path) -> Path:
    """A draft of one layer, which gets embeddings and the hidden states of three layers."""
    weights = load_file(target / "model.safetensors")
    layer = "model.layers.0."
    own = {
        f"midlayer.{name.removeprefix(layer)}": w
        for name, w in weights.items()
        if name.startswith(layer)
    }
    norm = weights["model.norm.weight"]
    for name in ("q_proj", "k_proj", "v_proj"):  # of embeddings, and of hidden states
        weight = own[f"midlayer.self_attn.{name}.weight"]
        own[f"midlayer.self_attn.{name}.weight"] = torch.cat([weight, weight], 1)
    fc = torch.eye(len(norm)).repeat(1, 3) / 3
    own |= {"midlayer.hidden_norm.weight": norm.clone(), "norm.weight": norm, "fc.weight": fc}
    own["lm_head.weight"] = weights["lm_head.weight"]
    config = json.loads((target / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
    return _save(path, own, config)


def _mtp(target: Path, path: Path) -> Path:
    """The model with one more layer, a copy of its first one, which drafts."""
    weights = load_file(target / "model.safetensors")
    layer = "model.layers.0."
    own = {
        f"model.mtp_block.0.{name.removeprefix(layer)}": w.clone()
        for name, w in weights.items()
        if name.startswith(layer)
    }
    hidden = weights["model.norm.weight"].numel()
    own |= {f"model.mtp_{name}_norm.0.weight": torch.ones(hidden) for name in ("emb", "hidden")}
    own["model.mtp_linear_proj.0.weight"] = _joining(hidden)
    config = json.loads((target / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    return _save(path, weights | own, config)


def _mtp_of_mimo(target: Path, path: Path) -> Path:
    """The same of MiMo, whose model is Qwen 2's."""
    weights = load_file(target / "model.safetensors")
    layer, drafts = "model.layers.0.", "model.mtp_layers.0."
    own = {
        drafts + name.removeprefix(layer): w.clone()
        for name, w in weights.items()
        if name.startswith(layer)
    }
    norm = weights["model.norm.weight"]
    own |= {
        f"{drafts}{name}_layernorm.weight": torch.ones_like(norm) for name in ("token", "hidden")
    }
    own |= {f"{drafts}final_layernorm.weight": norm.clone()}
    own[f"{drafts}input_proj.weight"] = _joining(norm.numel())
    config = json.loads((target / "config.json").read_text())
    config |= {"num_nextn_predict_layers": 1, "architectures": ["MiMoForCausalLM"]}
    return _save(path, weights | own, config)


def _joining(hidden: int) -> torch.Tensor:
    """Of a token's embedding and the model's last hidden state, the half of each."""
    return torch.cat([torch.eye(hidden), torch.eye(hidden)], 1) / 2


def _save(path: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path
