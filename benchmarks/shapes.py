"""Models of known shape with random weights: latency depends on shapes only."""

from __future__ import annotations

import json
import platform
import random
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "llama-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
}  # fmt: skip
COMMON = {
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def write_model(folder: str, shape: str) -> None:
    """A folder that vLLM opens with ``load_format="dummy"``."""
    Path(folder, "config.json").write_text(json.dumps({**COMMON, **SHAPES[shape]}))


class Words:
    """Random token ids of a shape's vocabulary, repeatable."""

    def __init__(self, shape: str, seed: int = 0) -> None:
        self.draw = random.Random(seed)
        self._vocab = SHAPES[shape]["vocab_size"]

    def __call__(self, count: int) -> tuple[int, ...]:
        return tuple(self.draw.randrange(2, self._vocab) for _ in range(count))


def versions(blend: Any) -> str:
    """What a benchmark ran on, for its first line."""
    import torch

    from cacheblend_rag import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return (
        f"cacheblend-rag {__version__}, vLLM {blend.info.vllm_version}, torch {torch.__version__}, "
        f"{device}"
    )
