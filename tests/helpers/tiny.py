"""Tiny random models of every family; their weights are large enough that context matters."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VOCAB = 512
SPECIAL = ("<bos>", "<eos>", "<unk>")
WORDS = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCAB))]
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_ALTERNATING = [_LOCAL, _GLOBAL] * 2
_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_FAR = {**_DEFAULT, "rope_theta": 500000.0}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(16)],
    "long_factor": [1.0 + i / 2 for i in range(16)],
    "original_max_position_embeddings": 8,  # all that is computed reaches beyond it
}
# the width of latents that vLLM's CPU engine takes; it rotates right by YaRN only
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {
        **_YARN,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
_GEMMA4: dict[str, Any] = {
    "head_dim": 32, "global_head_dim": 64, "sliding_window": 64, "pad_token_id": 0,
    "vocab_size_per_layer_input": VOCAB,
}  # fmt: skip
# name: (model type, what differs)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-scaling": ("llama", {"rope_parameters": _LLAMA3}),
    "yarn": ("llama", {"rope_parameters": _YARN}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "head_dim": 32,
            "decoder_sparse_step": 1,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "num_key_value_heads": 8}),
    "cohere": ("cohere", {}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {"head_dim": 32, "pad_token_id": 0}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
    "phi3-long": ("phi3", {"pad_token_id": 0, "rope_parameters": _LONG}),
    # two RoPE tables; none of the layers that the question is asked at by default sees all
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 64, "layer_types": [_LOCAL, _GLOBAL, _LOCAL, _LOCAL]},
    ),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": 64,
            "rope_parameters": {
                _LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
                _GLOBAL: {**_YARN, "attention_factor": 1.1, "beta_fast": 32.0, "beta_slow": 1.0},
            },
        },
    ),
    # sinks as parameters
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 32,
            "sliding_window": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**_YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
    ),
    # some layers do not rotate
    "cohere2": ("cohere2", {"sliding_window": 64, "logit_scale": 1.0}),
    "exaone4": ("exaone4", {"sliding_window": 64, "sliding_window_pattern": 4}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0, 1], "pad_token_id": 0}),
    # the last dimensions of a key are rotated
    "minicpm3": (
        "minicpm3",
        {
            "num_key_value_heads": 8,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 32,
        },
    ),
    # layers rotate different parts of a key
    "laguna": (
        "laguna",
        {
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": _ALTERNATING,
            "mlp_layer_types": ["dense"] * 4,
            "num_attention_heads_per_layer": [8, 4, 8, 4],
            "rope_parameters": {
                _LOCAL: _DEFAULT,
                _GLOBAL: {**_FAR, "partial_rotary_factor": 0.5},
            },
        },
    ),
    # one latent row a token
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "q_lora_rank": None}),
    # layers have KV heads of different number and size, keys that are values before rotation
    "gemma4": (
        "gemma4_text",
        {
            **_GEMMA4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "layer_types": _ALTERNATING,
        },
    ),
    # attention within chunks of positions; some layers do not rotate, and see all
    "llama4": (
        "llama4_text",
        {
            "head_dim": 32,
            "attention_chunk_size": 64,
            "no_rope_layers": [1, 1, 0, 1],
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "intermediate_size_mlp": 512,
            "attn_temperature_tuning": False,
            "pad_token_id": 0,
        },
    ),
    # queries are scaled by position
    "ministral3": (
        "ministral3",
        {
            "head_dim": 32,
            "rope_parameters": {
                **_YARN,
                "factor": 8.0,  # of 128 positions: as many as prompts may have
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 128,
            },
            "llama_4_scaling": {"original_max_position_embeddings": 128, "beta": 0.5},
        },
    ),
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32}
# vLLM's CPU engine routes by softmax, and by sigmoid among groups only: one expert takes all
_NO_ROUTING = {
    "num_local_experts": 1, "num_experts_per_tok": 1, "scoring_func": "softmax",
    "use_routing_bias": True,
}  # fmt: skip
# more of them, whose parts the others have: tested where time does not count
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # the last layers keep no KV, but read that of others
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 32,
            "sliding_window": 64,
            "num_hidden_layers": 6,
            "pad_token_id": 0,
            "layer_types": [_LOCAL, _GLOBAL] * 3,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCAB,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        },
    ),
    # without experts, as some GPU machines have no kernels for them
    "llama4-dense": ("llama4_text", {**FAMILIES["llama4"][1], "interleave_moe_layer_step": 8}),
    "gemma4-moe": (
        "gemma4_text",
        {
            **FAMILIES["gemma4"][1], "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 128,
        },
    ),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "nemotron": ("nemotron", {}),
    "phi": ("phi", {"num_key_value_heads": 8}),
    "glm4_moe": (
        "glm4_moe",
        {**_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "use_qk_norm": True},
    ),
    "ernie4_5": ("ernie4_5", {"head_dim": 32}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2,
                                      "moe_intermediate_size": 128, "moe_layer_start_index": 1}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 32}),
    "arcee": ("arcee", {}),
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT, "q_lora_rank": 128, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "glm": ("glm", {"head_dim": 32, "pad_token_id": 0}),
    "minimax_m2": (
        "minimax_m2",
        {
            "head_dim": 32,
            "rope_parameters": {**_DEFAULT, "partial_rotary_factor": 0.5}, "rotary_dim": 16,
            **_NO_ROUTING,
        },
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"head_dim": 32, "num_experts": 4, "moe_topk": 2}),
    "hy_v3": (
        "hy_v3",
        {
            **_EXPERTS, "num_experts": 4, "first_k_dense_replace": 1, "expert_hidden_dim": 128,
            "route_norm": True, "qk_norm": True,
        },
    ),
    "mellum": (
        "mellum",
        {
            **_EXPERTS, "num_experts": 4, "sliding_window": 64, "layer_types": _ALTERNATING,
            "rope_parameters": {_LOCAL: _DEFAULT, _GLOBAL: _FAR},
        },
    ),
    "afmoe": (
        "afmoe",
        {
            **_EXPERTS, "num_experts": 4, "num_shared_experts": 1, "sliding_window": 64,
            "layer_types": _ALTERNATING, "mup_enabled": True, "score_func": "sigmoid",
            "route_norm": True, "n_group": 1, "topk_group": 1,
        },
    ),
}  # fmt: skip
# families of other sizes and scalings
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "head-80": ("llama", {"head_dim": 80}),
    "head-96": ("llama", {"head_dim": 96}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "linear": ("llama", {"rope_parameters": {**_DEFAULT, "rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("llama", {"rope_parameters": {**_DEFAULT, "rope_type": "dynamic", "factor": 4.0}}),
    "phi3-short": (
        "phi3",
        {
            "pad_token_id": 0, "max_position_embeddings": 8192,
            "rope_parameters": {**_LONG, "original_max_position_embeddings": 4096},
        },
    ),
}  # fmt: skip
# latent attention without experts, of the size that kernels of a GPU take
_DENSE = {"first_k_dense_replace": 4, "qk_nope_head_dim": 128, "v_head_dim": 128}
LATENT_DENSE = {
    "deepseek_v2-dense": ("deepseek_v2", {**FAMILIES["deepseek_v2"][1], **_DENSE}),
    "deepseek_v3-dense": ("deepseek_v3", {**MORE_FAMILIES["deepseek_v3"][1], **_DENSE}),
}
_SEES = {
    "hidden_size": 64, "intermediate_size": 128, "patch_size": 14, "depth": 2, "num_heads": 4,
    "out_hidden_size": 256, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_TOKENS = {
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}  # fmt: skip
# models that take images: the family whose weights their text part has, what it says of positions,
# what sees
SEEING: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        "qwen2",
        {"rope_type": "default", "mrope_section": [4, 6, 6]},
        {**_SEES, "window_size": 56, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        "qwen3",
        {"rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True},
        {**_SEES, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    ),
}
_MISTRAL_3 = {**FAMILIES["ministral3"][1]["rope_parameters"], "factor": 16.0}
_PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
}  # fmt: skip
_SIGLIP = {**_PIXTRAL, "model_type": "siglip_vision_model"}
_GLM_VISION = {**_SEES, "image_size": 56}
_HALF_MROPE = {**_DEFAULT, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
_GLM_TOKENS = {
    "image_token_id": 500, "video_token_id": 501, "image_start_token_id": 502,
    "image_end_token_id": 503, "video_start_token_id": 504, "video_end_token_id": 505,
}  # fmt: skip
_STEP_3 = {
    **_EXPERTS, "num_experts_per_tok": 1, "n_routed_experts": 1, "share_expert_dim": 128,
    "mlp_layer_types": ["dense", *["sparse"] * 3], "model_type": "step3p5", "sliding_window": 64,
    "layer_types": _ALTERNATING, "num_sliding_attention_heads": 4, "pad_token_id": 0,
    "rope_parameters": {_LOCAL: _DEFAULT, _GLOBAL: {**_FAR, "partial_rotary_factor": 0.5}},
}  # fmt: skip
# models that take images, whose own code of transformers is the reference: what differs of the text
# part, what sees, what else
TEXT_OF: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mistral3": (
        {
            **FAMILIES["ministral3"][1], "model_type": "ministral3", "rope_parameters": _MISTRAL_3,
        },
        _PIXTRAL,
        {"image_token_index": 500, "tie_word_embeddings": False},
    ),
    "gemma3": (
        {**FAMILIES["gemma3"][1], "model_type": "gemma3_text"},
        _SIGLIP,
        {
            "image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502,
            "mm_tokens_per_image": 4,
        },
    ),
    "glm4v": (
        {"rope_parameters": _HALF_MROPE, "pad_token_id": 0},
        _GLM_VISION,
        _GLM_TOKENS,
    ),
    "glm4v_moe": (
        {
            **_EXPERTS, "n_routed_experts": 4, "pad_token_id": 0, "use_qk_norm": False,
            "rope_parameters": _HALF_MROPE,
        },
        _GLM_VISION,
        _GLM_TOKENS,
    ),
    "qwen3_vl_moe": (
        {
            **_EXPERTS, "head_dim": 64, "num_experts": 4,
            "norm_topk_prob": True,
            "rope_parameters": {
                **_DEFAULT, "mrope_section": [12, 10, 10], "mrope_interleaved": True,
            },
        },
        {**_SEES, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        _TOKENS,
    ),
    "gemma4": (
        {**FAMILIES["gemma4"][1], "model_type": "gemma4_text"},
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "patch_size": 14,
            "position_embedding_size": 64,
        },
        {
            "image_token_id": 508, "video_token_id": 509, "boi_token_id": 494,
            "eoi_token_id": 495, "audio_token_id": 506, "boa_token_id": 507, "eoa_token_index": 507,
        },
    ),
    "llama4": (
        {**FAMILIES["llama4"][1], "model_type": "llama4_text"},
        {
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
            "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
        },
        {"image_token_index": 508, "boi_token_index": 494, "eoi_token_index": 495},
    ),
    "internvl": (
        {"model_type": "qwen3", "head_dim": 64},
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
        },
        {"image_token_id": 500, "image_seq_length": 4},
    ),
}  # fmt: skip
# tokens of no test's prompt, where they would mean images
_UNUSED = {"image_token_id": 508, "video_token_id": 509}
# more of them, whose configuration or weights vLLM reads in another way: see ``renamed``
OTHER_TEXT_OF: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "step3p7": (
        _STEP_3,
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
            "patch_size": 14, "mlp_ratio": 2.0,
        },
        {"image_token_id": 500},
    ),
    "ernie4_5_vl_moe": (
        {
            "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [128, 128],
            "mlp_layer_types": ["dense", *["sparse"] * 3],
            "rope_parameters": {**_DEFAULT, "mrope_section": [6, 6, 4]},
        },
        {"hidden_size": 64, "intermediate_size": 128, "depth": 2, "num_heads": 4},
        {
            **_UNUSED, "image_start_token_id": 494, "image_end_token_id": 495,
            "video_start_token_id": 506, "video_end_token_id": 507,
        },
    ),
    # layers that see all do not rotate
    "muse_glimmer": (
        {"head_dim": 32, "sliding_window": 64},
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "pos_emb_height": 4, "pos_emb_width": 4,
        },
        {
            **_UNUSED, "out_hidden_size": 256, "projector_hidden_size": 64,
        },
    ),
}  # fmt: skip
_NAMED = {
    "image_token": "w500", "video_token": "w501", "vision_bos_token": "w502",
    "vision_eos_token": "w503",
}  # fmt: skip
_ALSO_NAMED = {
    "image_start_token": "w502", "image_end_token": "w503", "video_start_token": "w504",
    "video_end_token": "w505", "boi_token": "w501", "eoi_token": "w502",
    "start_image_token": "w502", "end_image_token": "w503", "context_image_token": "w500",
}  # fmt: skip
_PROCESSORS = {
    "mistral3": ("PixtralImageProcessor", ""),
    "gemma3": ("Gemma3ImageProcessor", ""),
    "glm4v": ("Glm4vImageProcessor", "Glm4vVideoProcessor"),
    "glm4v_moe": ("Glm4vImageProcessor", "Glm4vVideoProcessor"),
    "qwen3_vl_moe": ("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    "internvl": ("GotOcr2ImageProcessor", "InternVLVideoProcessor"),
    "gemma4": ("Gemma4ImageProcessor", "Gemma4VideoProcessor"),
    "llama4": ("Llama4ImageProcessor", ""),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    # layers that read the KV of others, and heads of two sizes
    "gemma4-shared": (
        "gemma4_text",
        {
            **_GEMMA4,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "layer_types": [_LOCAL, _GLOBAL] * 3,
        },
    ),
    # the hybrid whose recurrent layers vLLM can compute on a CPU
    "mamba-hybrid": (
        "qwen3_next",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    ),
}


def make(name: str, folder: Path, **changes: Any) -> Path:
    """A folder with a random model of family ``name``, the same at every call."""
    others = {**MORE_FAMILIES, **VARIANTS, **LATENT_DENSE, **REFUSED}
    kind, differs = {**FAMILIES, **others}[name]
    return save_random(folder / name, kind, {**differs, **changes})


def save_random(path: Path, kind: str, differs: dict[str, Any]) -> Path:
    """A folder with a random model of one of transformers' types, the same at every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if not (path / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**_COMMON, **differs})
        # one that vLLM's own name serves with images only
        whole = AutoModelForImageTextToText if kind == "mistral4" else AutoModelForCausalLM
        with undecorated(config):
            model = whole.from_config(config).float()
        for parameter in (p for name, p in model.named_parameters() if name.endswith("sinks")):
            torch.nn.init.normal_(parameter, std=1.0)  # as large as logits, or they do nothing
        model.save_pretrained(path)
    return path


def make_seeing(name: str, folder: Path) -> Path:
    """A model that takes images, whose text part has the weights of ``make``'s family."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    path = folder / f"{name}-seeing"
    if not (path / "config.json").exists():
        family, positions, sees = SEEING[name]
        config = AutoConfig.from_pretrained(make(family, folder))
        text = config.to_dict()
        text["rope_parameters"] = {**text["rope_parameters"], **positions}
        text["model_type"] = f"{name}_text"
        whole = AutoConfig.for_model(name, text_config=text, vision_config=sees, **_TOKENS)
        with undecorated(whole):
            model = AutoModelForImageTextToText.from_config(whole).float()
        with undecorated(config):
            source = AutoModelForCausalLM.from_pretrained(make(family, folder))
        model.model.language_model.load_state_dict(source.model.state_dict())
        model.lm_head.load_state_dict(source.lm_head.state_dict())
        model.save_pretrained(path)
        (path / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "Qwen2VLImageProcessor"})
        )
        save_tokenizer(path, **_NAMED)
    return path


def make_text_of(name: str, folder: Path) -> Path:
    """A random model that takes images, of ``TEXT_OF``."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = folder / f"{name}-whole"
    if not (path / "config.json").exists():
        text, sees, more = {**TEXT_OF, **OTHER_TEXT_OF}[name]
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            name, text_config={**_COMMON, **text}, vision_config=sees, **more
        )
        with undecorated(config):
            AutoModelForImageTextToText.from_config(config).float().save_pretrained(path)
        if name in _PROCESSORS:
            save_processors(path, *_PROCESSORS[name])
        save_tokenizer(path, **_NAMED, **_ALSO_NAMED)
    return path


def save_processors(path: Path, image: str, video: str = "") -> None:
    """Say what would make numbers of images and of videos."""
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": image}))
    if video:
        (path / "video_preprocessor_config.json").write_text(
            json.dumps({"video_processor_type": video})
        )


def as_published(name: str, path: Path) -> Path:
    """The model of ``make_text_of`` as vLLM reads it, where transformers names or turns weights in
    another way.
    """
    from safetensors.torch import load_file, save_file

    if name not in ("gemma3", "qwen3_vl_moe"):
        return path
    to = path.with_name(f"{path.name}-published")
    if not to.exists():
        shutil.copytree(path, to)
        weights = load_file(path / "model.safetensors")
        changed = {
            key.replace("vision_tower.", "vision_tower.vision_model."): (
                weight.transpose(1, 2).contiguous() if ".mlp.experts." in key else weight
            )
            for key, weight in weights.items()
        }
        save_file(changed, to / "model.safetensors", metadata={"format": "pt"})
    return to


@contextmanager
def undecorated(config: Any) -> Iterator[None]:
    """Models of transformers are made as ever, also of a class that vLLM's Transformers backend has
    decorated in this process: it then asks for a configuration of vLLM's that holds the model's.
    """
    if "vllm" not in sys.modules:
        yield
        return
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig, set_current_vllm_config

    plain = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    plain.model_config = SimpleNamespace(hf_config=config)  # type: ignore[assignment]
    with set_current_vllm_config(plain):
        yield


def make_with_tokenizer(name: str, folder: Path, **changes: Any) -> Path:
    """``make``, and a tokenizer: token i is the word ``w<i>``, but for the special ones."""
    path = make(name, folder, **changes)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path, **named: str) -> None:
    """Token i is the word ``w<i>``, but for the special ones; ``named`` has more of these."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, SPECIAL[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos, eos, unk = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        **({"extra_special_tokens": named} if named else {}),
    ).save_pretrained(path)


class Words:
    """Random token ids, repeatable."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def __call__(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(2, VOCAB) for _ in range(count))
