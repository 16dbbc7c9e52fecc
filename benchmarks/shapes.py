"""Models of known shape with random weights, and engines over them: latency needs shapes only."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_V2_LITE: dict[str, Any] = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048,
    "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 102400, "tie_word_embeddings": False,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "max_position_embeddings": 163840,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {  # no model's: to try a benchmark out
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "mistral-7b": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False,
        "rope_theta": 1000000.0, "sliding_window": None,
    },
    "llama-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": False, "rope_theta": 1000000.0,
    },
    "qwen3-vl-8b": {  # takes images, and is asked with text
        "model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"],
        "tie_word_embeddings": False, "text_config": {
            "model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_parameters": {
                "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
        },
        "vision_config": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
            "out_hidden_size": 4096, "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "image_token_id": 151655, "video_token_id": 151656,
    },
    "gemma-3-27b": {  # five layers of six have a window
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "hidden_size": 5376,
        "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262208,
        "tie_word_embeddings": True, "sliding_window": 1024, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 168, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "pad_token_id": 0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gpt-oss-20b": {  # in 16 bits
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
        "tie_word_embeddings": False, "sliding_window": 128, "num_local_experts": 32,
        "num_experts_per_tok": 4, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
        },
    },
    "deepseek-v2-lite": _V2_LITE,
    # As wide as the experts that a token takes, six and the two shared ones: the same arithmetic,
    # without what choosing them costs, for machines that lack kernels for experts.
    "deepseek-v2-lite-dense": {
        **_V2_LITE, "first_k_dense_replace": 27, "intermediate_size": 8 * 1408
    },
    "qwen2.5-32b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 5120,
        "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
    },
}  # fmt: skip
COMMON = {
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def config_of(shape: str, layers: int | None = None) -> dict[str, Any]:
    """A model's ``config.json``, of so many layers."""
    config = {**COMMON, **SHAPES[shape]}
    text = config.get("text_config")
    if layers is None:
        return config
    if text is not None:
        return {**config, "text_config": {**text, "num_hidden_layers": layers}}
    return {**config, "num_hidden_layers": layers}


def takes_images(shape: str) -> bool:
    """Whether a model of this shape does."""
    return "vision_config" in SHAPES[shape]


def save(folder: Path, shape: str, layers: int | None = None) -> None:
    """All that vLLM reads of a model but its weights."""
    (folder / "config.json").write_text(json.dumps(config_of(shape, layers)))
    if takes_images(shape):
        processor = {"image_processor_type": "Qwen2VLImageProcessor"}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        _save_tokenizer(folder, SHAPES[shape])


def _save_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """One that knows the tokens that stand for images: what makes images of a prompt asks it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokens = {"vision_bos_token": "vision_start", "vision_eos_token": "vision_end"}
    tokens |= {"image_token": "image", "video_token": "video"}
    known = {f"<{name}>": int(config[f"{name}_token_id"]) for name in tokens.values()}
    words = Tokenizer(WordLevel({"<bos>": 0, "<eos>": 1, "<unk>": 2, **known}, "<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens={name: f"<{word}>" for name, word in tokens.items()},
    ).save_pretrained(folder)  # fmt: skip


def write_weights(folder: Path, shape: str, layers: int | None, dtype: str) -> int:
    """A model's random weights as a checkpoint, which engines of any tensor parallel size read
    alike: vLLM's dummy weights differ by rank. Drawn on a GPU if there is one. Returns its bytes.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(shape, layers)
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, shape, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = model.all_tied_weights_keys if config.get("tie_word_embeddings") else ()
    parts: dict[str, dict[str, Any]] = {}
    for name, weight in model.state_dict().items():
        if name not in tied:
            layer = re.search(r"layers\.(\d+)\.", name)
            parts.setdefault(layer[1] if layer else name, {})[name] = weight.shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    where, total = {}, 0
    for number, (_, part) in enumerate(sorted(parts.items())):
        drawn = {}
        for name, size in part.items():
            weight = torch.empty(size, dtype=getattr(torch, dtype), device=device)
            is_norm = len(size) == 1 and not name.endswith("bias")
            drawn[name] = weight.fill_(1.0) if is_norm else weight.normal_(std=0.02)
            total += weight.nbytes
        file = f"model-{number:05}.safetensors"
        save_file(drawn, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(drawn, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class Words:
    """Random token ids of a shape's vocabulary, repeatable."""

    def __init__(self, shape: str, seed: int = 0) -> None:
        self.draw = random.Random(seed)
        config = SHAPES[shape]
        vocab = config.get("text_config", config)["vocab_size"]
        self._vocab = config.get("vision_start_token_id", vocab)  # none that stands for an image

    def __call__(self, count: int) -> tuple[int, ...]:
        return tuple(self.draw.randrange(2, self._vocab) for _ in range(count))


def parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of an engine has."""
    options = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    options.add_argument("--layers", type=int, help="fewer than the shape has, to try it out")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--block-size", type=int)
    options.add_argument("--attention-backend", help="vLLM's; CPU_MLA for latents on a CPU")
    options.add_argument("--gpu-memory-utilization", type=float)
    options.add_argument("--gpu-cache", help="GPU memory for chunks, such as 2GiB")
    options.add_argument("--store", default="memory://?capacity=32GiB")
    return options


def selecting(selector: str) -> dict[str, Any]:
    """Options of a call: the default as it ships, others as they were published, uncorrected. A
    selector's own options come behind its name: ``query:sees_from=0``.
    """
    name, *given = selector.split(":")
    values = (option.partition("=")[::2] for option in given)
    own = {"selector_options": {option: json.loads(value) for option, value in values}}
    call: dict[str, Any] = {"selector": name, **(own if given else {})}
    return call if name == "query" else {**call, "propagation_length": 0}


def size(text: str) -> tuple[int, int]:
    """Chunks and tokens a chunk of an option such as 6x1024."""
    chunks, _, tokens = text.partition("x")
    return int(chunks), int(tokens)


@contextlib.contextmanager
def opened(
    args: argparse.Namespace,
    tokens: int,
    *,
    in_process: bool = False,
    weights: Path | None = None,
    engine: Mapping[str, Any] | None = None,
    **config: Any,
) -> Iterator[tuple[Any, Words]]:
    """A ``CacheBlend`` that blends, and the words of its model.

    Args:
        args: of ``parser``.
        tokens: of the chunks of the longest prompt.
        in_process: vLLM's ``LLM`` in this process, instead of ``AsyncLLM`` and its own.
        weights: a folder of ``write_weights``; without one, each engine draws its own.
        engine: further arguments of vLLM's.
        **config: further fields of ``BlendConfig``, or others than ``args`` says.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if in_process:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from cacheblend_rag import BlendConfig, CacheBlend

    words = Words(args.shape)
    config = {
        "ingest_prefix": words(64), "store": args.store, "gpu_cache": args.gpu_cache, **config
    }  # fmt: skip
    options = {
        name: value
        for name in ("attention_backend", "block_size", "gpu_memory_utilization")
        if (value := getattr(args, name)) is not None
    }
    if takes_images(args.shape):
        options["skip_mm_profiling"] = True
    options |= engine or {}
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), args.shape, args.layers)
        with CacheBlend(
            weights or folder,
            config=BlendConfig(**config),
            engine="batch" if in_process else "serving",
            load_format="auto" if weights else "dummy",
            skip_tokenizer_init=not takes_images(args.shape),
            dtype=args.dtype,
            max_model_len=tokens + 2048,
            **options,
        ) as blend:
            assert blend.model_check.passed, blend.model_check.detail
            yield blend, words


def versions(blend: Any) -> str:
    """What a benchmark ran on, for its first line."""
    import torch

    from cacheblend_rag import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return (
        f"cacheblend-rag {__version__}, vLLM {blend.info.vllm_version}, torch {torch.__version__}, "
        f"{device}"
    )
