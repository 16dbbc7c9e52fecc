"""Tiny random models of classes that transformers lacks: the weights of a class of the same
mathematics, under the names by which vLLM reads them. That class is the reference.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    _LATENT,
    _MISTRAL_3,
    _UNUSED,
    FAMILIES,
    MORE_FAMILIES,
    VOCAB,
    make_text_of,
    save_random,
    save_tokenizer,
)

Weights = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]

# what a model's own folder has where neither transformers nor vLLM knows its configuration
_CODE = """from transformers import CONFIG_MAPPING, PreTrainedConfig


def _part(given):
    if not isinstance(given, dict):
        return given
    kind = given.get("model_type")
    if kind == "step3p5":
        from vllm.transformers_utils.configs.step3p5 import Step3p5Config

        return Step3p5Config(**given)
    return (CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PreTrainedConfig)(**given)


class TinyConfig(PreTrainedConfig):
    model_type = "{model_type}"

    def __init__(self, **given):
        parts = {{name: _part(given.pop(name)) for name in list(given) if name.endswith("_config")}}
        super().__init__(**given)
        for name, part in parts.items():
            setattr(self, name, part)
"""

# and what makes tokens of images and sounds, which are not asked for
_PROCESSOR = """from types import SimpleNamespace

from transformers import ProcessorMixin


class TinyProcessor(ProcessorMixin):
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, **unused):
        super().__init__(tokenizer)
        self.audio_processor = SimpleNamespace(sampling_rate=16000)
        self.image_processor = SimpleNamespace(dynamic_hd=1)
"""


class Renamed(NamedTuple):
    """A model under other names.

    Attributes:
        architecture: vLLM's name of its class.
        base: the type of the reference and what differs, or a name of ``TEXT_OF``.
        config: what its configuration says, of that of the reference.
        weights: those of the reference, renamed.
        options: of the engine.
        sees: whether it takes images.
    """

    architecture: str
    base: tuple[str, Config] | str
    config: Callable[[Config], Config]
    weights: Callable[[Weights], Weights]
    options: Config
    sees: bool = False
    preprocessor: Config | None = None
    has_processor: bool = False

    @property
    def is_mistrals(self) -> bool:
        """Whether it is in Mistral's own format."""
        return self.options.get("config_format") == "mistral"


class Made(NamedTuple):
    """Folders of a model and of its reference."""

    path: Path
    reference: Path
    takes_images: bool  # the reference does


def make_renamed(name: str, folder: Path) -> Made:
    """A random model of ``RENAMED``, the same at every call."""
    model = RENAMED[name]
    path, base = folder / f"{name}-renamed", folder / f"{name}-reference"
    if isinstance(model.base, str):
        base = make_text_of(model.base, folder)
    if not (path / "made").exists():
        path.mkdir(parents=True, exist_ok=True)
        if not isinstance(model.base, str):
            _tell_norms_apart(save_random(base, *model.base))
        config = model.config(json.loads((base / "config.json").read_text()))
        if not model.is_mistrals:
            config = {**config, "architectures": [model.architecture]}
        if config.pop("needs_code", False):
            code = _CODE.format(model_type=config["model_type"])
            (path / "configuration_tiny.py").write_text(code)
            config["auto_map"] = {"AutoConfig": "configuration_tiny.TinyConfig"}
        files = ("params.json", "consolidated") if model.is_mistrals else ("config.json", "model")
        (path / files[0]).write_text(json.dumps(config))
        weights = {k: w.contiguous() for k, w in model.weights(_load(base)).items()}
        save_file(weights, path / f"{files[1]}.safetensors", metadata={"format": "pt"})
        if model.is_mistrals:
            _save_tekken(path)
        else:
            save_tokenizer(path)
        if model.preprocessor is not None:
            (path / "preprocessor_config.json").write_text(json.dumps(model.preprocessor))
        if model.has_processor:
            (path / "processing_tiny.py").write_text(_PROCESSOR)
            own = {"auto_map": {"AutoProcessor": "processing_tiny.TinyProcessor"}}
            (path / "processor_config.json").write_text(
                json.dumps({**own, "processor_class": "TinyProcessor"})
            )
        (path / "made").touch()
    return Made(path, base, isinstance(model.base, str))


def _load(path: Path) -> Weights:
    weights: Weights = load_file(path / "model.safetensors")
    return weights


def _tell_norms_apart(path: Path) -> None:
    """Norms are all alike in a new model; here one can't stand for another unseen."""
    draw = torch.Generator().manual_seed(0)
    weights = _load(path)
    for name, weight in weights.items():
        if weight.ndim == 1 and "norm" in name:
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _save_tekken(path: Path) -> None:
    """A tokenizer of Mistral's own kind: bytes, and special tokens of which some are of images."""
    pytest.importorskip("mistral_common")  # vLLM's requirement, which a copied vLLM may lack
    from mistral_common.tokens.tokenizers.base import SpecialTokens

    special = [token.value for token in SpecialTokens]
    pairs = [(a, b) for a in range(97, 123) for b in range(97, 123)]
    texts = [bytes([i]) for i in range(256)] + [bytes(pair) for pair in pairs]
    count = 200
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(text).decode(), "token_str": None}
        for i, text in enumerate(texts[: VOCAB - count])
    ]
    tokenizer = {
        "config": {
            "pattern": r"\s+|\w+|[^\w\s]+", "num_vocab_tokens": len(vocab),
            "default_vocab_size": VOCAB, "default_num_special_tokens": count, "version": "v11",
        },
        "vocab": vocab,
        "special_tokens": [
            {"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(special)
        ],
        "image": {"image_patch_size": 14, "max_image_size": 56, "spatial_merge_size": 1},
    }  # fmt: skip
    (path / "tekken.json").write_text(json.dumps(tokenizer))


def renamed(weights: Weights, names: Iterable[tuple[str, str]]) -> Weights:
    """Weights by other names: of each, what patterns find is replaced, one after another."""
    found = {}
    for name, weight in weights.items():
        for pattern, to in names:
            name = re.sub(pattern, to, name)
        found[name] = weight
    return found


def _bailing(weights: Weights) -> Weights:
    found = renamed(
        weights,
        [
            ("self_attn.o_proj", "attention.dense"),
            ("self_attn.q_norm", "attention.query_layernorm"),
            ("self_attn.k_norm", "attention.key_layernorm"),
            ("embed_tokens", "word_embeddings"),
            ("gate.e_score_correction_bias", "gate.expert_bias"),
        ],
    )
    for name in [name for name in found if name.endswith("self_attn.q_proj.weight")]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        name = name.replace("self_attn.q_proj", "attention.query_key_value")
        found[name] = torch.cat(parts)
    return found


def _plamo_3(weights: Weights) -> Weights:
    offsets = {"post_mixer_norm": 1 / 5, "post_mlp_norm": 1 / 5**1.5}
    found = renamed(
        weights,
        [
            (r"layers\.(\d+)", r"layers.layers.\1"),
            ("self_attn.", "mixer."),
            ("input_layernorm", "pre_mixer_norm"),
            ("post_attention_layernorm", "post_mixer_norm"),
            ("pre_feedforward_layernorm", "pre_mlp_norm"),
            ("post_feedforward_layernorm", "post_mlp_norm"),
        ],
    )
    for name in list(found):
        for kind, offset in offsets.items():
            if f".{kind}." in name:
                found[name] = found[name] + 1 - offset
        if name.endswith("q_proj.weight"):
            parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            found[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        if name.endswith("gate_proj.weight"):
            parts = [found.pop(name.replace("gate", part)) for part in ("gate", "up")]
            found[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    embedding = found["model.embed_tokens.weight"]
    found["lm_head.weight"] = embedding.clone()
    found["model.embed_tokens.weight"] = embedding * embedding.shape[1] ** 0.5
    return found


def _plain(model_type: str, **more: Any) -> Callable[[Config], Config]:
    """The reference's configuration, of another type, which comes with its code."""
    return lambda config: {**config, "model_type": model_type, "needs_code": True, **more}


def _bailing_config(config: Config) -> Config:
    return {
        **_plain("bailing_moe")(config), "num_experts": config["n_routed_experts"],
        "num_shared_experts": 1, "use_bias": False, "use_qkv_bias": False, "use_rmsnorm": True,
        "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "embedding_dropout": 0.0,
    }  # fmt: skip


def _plamo_3_config(config: Config) -> Config:
    window = config["sliding_window"]
    windows = [window if kind == _LOCAL else None for kind in config["layer_types"]]
    return {
        **_plain("plamo3")(config), "interleaved_sliding_window": windows,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _mistral_config(config: Config) -> Config:
    """In Mistral's own words."""
    rope = config["rope_parameters"]
    taken = (
        "vocab_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
        "v_head_dim", "max_position_embeddings", "head_dim",
    )  # fmt: skip
    found = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"],
        "hidden_dim": config["intermediate_size"], "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "yarn": {
            "factor": rope["factor"], "alpha": rope["beta_slow"], "beta": rope["beta_fast"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        },
        "llama_4_scaling": {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        },
        **{name: config[name] for name in taken if name in config},
    }  # fmt: skip
    if "n_routed_experts" in config:
        found["moe"] = {
            "num_experts": config["n_routed_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
            "expert_hidden_dim": config["moe_intermediate_size"],
            "first_k_dense_replace": config["first_k_dense_replace"], "route_every_n": 1,
            "num_shared_experts": 1, "routed_scale": 1.0, "num_expert_groups": 1,
            "num_expert_groups_per_tok": 1,
        }  # fmt: skip
    return found


_MISTRALS = [
    (r"^model\.", ""),
    ("embed_tokens", "tok_embeddings"),
    ("lm_head", "output"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
    (r"self_attn\.([qkv][_a-z]*?)_layernorm", r"attention.\1_norm"),
    (r"self_attn\.([qkv][_a-z]*?)_proj", r"attention.w\1"),
    (r"attention\.wkv_a_proj_with_mqa", "attention.wkv_a_with_mqa"),
    (r"mlp\.(gate\.weight|experts|shared_experts)", r"\1"),
    (r"mlp\.", "feed_forward."),
    ("gate_proj", "w1"),
    ("down_proj", "w2"),
    ("up_proj", "w3"),
]


def _experts_apart(weights: Weights) -> Weights:
    found = {}
    for name, weight in weights.items():
        before, is_of_experts, part = name.partition(".experts.")
        if not is_of_experts:
            found[name] = weight
            continue
        parts = ["down_proj"] if part == "down_proj" else ["gate_proj", "up_proj"]
        for expert, both in enumerate(weight):
            for kind, one in zip(parts, both.chunk(len(parts)), strict=True):
                found[f"{before}.experts.{expert}.{kind}.weight"] = one.contiguous()
    return found


def _mistral(weights: Weights) -> Weights:
    """In Mistral's format, rotated pairs are neighbours, and each expert is for itself."""
    found = renamed(_experts_apart(weights), _MISTRALS)
    for name, weight in found.items():
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            heads = weight.view(-1, 2, _HEAD // 2, weight.shape[1])
            found[name] = heads.transpose(1, 2).reshape(weight.shape)
    return found


def _step_3_5_config(config: Config) -> Config:
    text = config["text_config"]
    sliding = text["num_sliding_attention_heads"]
    text.pop("per_layer_config")
    turns = [text["rope_parameters"][kind] for kind in text["layer_types"]]
    return {
        **text, "architectures": ["Step3p5ForCausalLM"], "moe_num_experts": 1, "moe_top_k": 1,
        "num_attention_groups": text["num_key_value_heads"], "moe_layers_enum": "1,2,3",
        "use_head_wise_attn_gate": True, "rope_parameters": None,
        "rope_theta": [turn["rope_theta"] for turn in turns],
        "partial_rotary_factors": [turn.get("partial_rotary_factor", 1.0) for turn in turns],
        "attention_other_setting": {
            "attention_type": _LOCAL, "num_attention_heads": sliding,
            "num_attention_groups": text["num_key_value_heads"], "head_dim": text["head_dim"],
        },
    }  # fmt: skip


def _step_3_5(weights: Weights) -> Weights:
    return {name: w for name, w in weights.items() if not name.startswith("vi")}


def _step_3_7_config(config: Config) -> Config:
    sees = config["vision_config"]
    text = {**_step_3_5_config(config), "model_type": "step3p5"}
    return {
        **config, "needs_code": True, "model_type": "step3p7", "text_config": text,
        "understand_projector_stride": 2,
        "vision_config": {
            "width": sees["hidden_size"], "layers": sees["num_hidden_layers"],
            "heads": sees["num_attention_heads"], "image_size": sees["image_size"],
            "patch_size": sees["patch_size"], "mlp_ratio": sees["mlp_ratio"],
            "hidden_act": "quick_gelu", "use_cls_token": False, "use_ln_pre": True,
            "use_ln_post": False, "use_abs_posemb": True, "use_rope2d": True,
            "ls_init_value": 0.1, "output_dim": None,
        },
    }  # fmt: skip


def _kimi_config(config: Config) -> Config:
    vision = {**_SEES, "pos_emb_height": 4, "pos_emb_width": 4, "merge_kernel_size": [2, 2]}
    return {
        "model_type": "kimi_k25", "text_config": config, "vision_config": vision,
        "projection_hidden_size": 64, "tie_word_embeddings": False, **_UNUSED,
        "vision_start_token_id": 506, "vision_end_token_id": 507,
    }  # fmt: skip


def _kimi_tower() -> Shapes:
    layer: Shapes = {
        "mlp.fc0.weight": (128, 64), "mlp.fc0.bias": (128,), "mlp.fc1.weight": (64, 128),
        "mlp.fc1.bias": (64,), "norm0.weight": (64,), "norm0.bias": (64,), "norm1.weight": (64,),
        "norm1.bias": (64,), "wo.weight": (64, 64), "wo.bias": (64,), "wqkv.weight": (192, 64),
        "wqkv.bias": (192,),
    }  # fmt: skip
    return {
        **_layers("vision_tower.encoder.blocks", layer),
        "vision_tower.encoder.final_layernorm.weight": (64,),
        "vision_tower.encoder.final_layernorm.bias": (64,),
        "vision_tower.patch_embed.pos_emb.weight": (4, 4, 64),
        "vision_tower.patch_embed.proj.weight": (64, 3, 14, 14),
        "vision_tower.patch_embed.proj.bias": (64,),
        "mm_projector.pre_norm.weight": (64,), "mm_projector.pre_norm.bias": (64,),
        "mm_projector.proj.0.weight": (256, 256), "mm_projector.proj.0.bias": (256,),
        "mm_projector.proj.2.weight": (256, 256), "mm_projector.proj.2.bias": (256,),
    }  # fmt: skip


def _ernie_config(config: Config) -> Config:
    text, sees = config["text_config"], config["vision_config"]
    experts = text["moe_num_experts"]
    last = text["num_hidden_layers"] - 1
    vision = {
        **sees, "model_type": "", "embed_dim": sees["hidden_size"],
        "mlp_ratio": sees["intermediate_size"] / sees["hidden_size"],
    }  # fmt: skip
    return {
        **config, **text, "needs_code": True, "model_type": "ernie4_5_moe_vl",
        "text_config": None, "vision_config": vision, "moe_num_experts": [experts, experts],
        "moe_layer_start_index": [1, 1], "moe_layer_end_index": [last, last],
        "pixel_hidden_size": sees["hidden_size"], "spatial_conv_size": 2, "temporal_conv_size": 2,
        "use_temporal_conv": True, "im_patch_id": config["image_token_id"],
        "freq_allocation": text["rope_parameters"]["mrope_section"][2],
        "tie_word_embeddings": True,
    }  # fmt: skip


def _muse_config(config: Config) -> Config:
    vision = {
        **config["vision_config"], "output_dim": config["out_hidden_size"],
        "adapter_dim": config["projector_hidden_size"], "merge_kernel_size": 2,
    }  # fmt: skip
    return {**config, "vision_config": vision}


_SEES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip


def _intern_config(config: Config) -> Config:
    vision = {
        **_SEES, "model_type": "intern_vit_6b", "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm", "num_channels": 3,
        "initializer_factor": 0.1,
    }  # fmt: skip
    return {
        "model_type": "internvl_chat", "needs_code": True, "text_config": config,
        "vision_config": vision, "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2",
        "force_image_size": 56, "min_dynamic_patch": 1, "max_dynamic_patch": 1,
        "dynamic_image_size": False, "use_thumbnail": False,
    }  # fmt: skip


def _intern_tower() -> Shapes:
    layer: Shapes = {
        "attn.qkv.weight": (192, 64), "attn.qkv.bias": (192,), "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,), "mlp.fc1.weight": (128, 64), "mlp.fc1.bias": (128,),
        "mlp.fc2.weight": (64, 128), "mlp.fc2.bias": (64,), "norm1.weight": (64,),
        "norm1.bias": (64,), "norm2.weight": (64,), "norm2.bias": (64,), "ls1": (64,),
        "ls2": (64,),
    }  # fmt: skip
    return {
        **_layers("vision_model.encoder.layers", layer),
        "vision_model.embeddings.class_embedding": (1, 1, 64),
        "vision_model.embeddings.patch_embedding.weight": (64, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (64,),
        "vision_model.embeddings.position_embedding": (1, 17, 64),
        "mlp1.0.weight": (256,), "mlp1.0.bias": (256,), "mlp1.1.weight": (256, 256),
        "mlp1.1.bias": (256,), "mlp1.3.weight": (256, 256), "mlp1.3.bias": (256,),
    }  # fmt: skip


def _layers(prefix: str, layer: Shapes) -> Shapes:
    """Of two layers."""
    return {f"{prefix}.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}


def _tower(shapes: Shapes) -> Weights:
    """Random weights of what sees."""
    draw = torch.Generator().manual_seed(1)
    return {name: 0.06 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def _phi_4_config(config: Config) -> Config:
    audio = {
        "name": "cascades",
        "config": {
            "attention_dim": 64, "attention_heads": 4, "num_blocks": 1, "linear_units": 64,
            "kernel_size": 3, "input_size": 80, "ext_pw_out_channel": 64,
            "depthwise_seperable_out_channel": 64, "depthwise_multiplier": 1,
            "cnn_layer_norm": True,
            "nemo_conv_settings": {"conv_channels": 64}, "chunk_size": -1, "left_chunk": 18,
            "time_reduction": 8, "input_layer": "nemo_conv", "bias_in_glu": True,
            "conv_activation": "swish", "activation": "swish", "causal": True,
            "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": 500},
            "encoder_embedding_config": {"input_size": 80},
        },
    }  # fmt: skip
    part = {"embedding_cls": "image", "projection_cls": "mlp"}
    return {
        **_plain("phi4mm")(config), "img_processor": None, "audio_processor": audio,
        "embd_layer": {
            "embedding_cls": "image_audio",
            "image_embd_layer": {**part, "crop_size": 448},
            "audio_embd_layer": {**part, "embedding_cls": "audio", "downsample_rate": 1,
                                 "compression_rate": 8},
        },
    }  # fmt: skip


def _pixtral_config(config: Config) -> Config:
    return {
        **_mistral_config(config),
        "vision_encoder": {
            "hidden_size": 64, "num_channels": 3, "image_size": 56, "patch_size": 14,
            "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "rope_theta": 10000.0, "image_token_id": 5, "max_image_size": 56,
        },
    }  # fmt: skip


def _pixtral_tower() -> Shapes:
    layer: Shapes = {
        "attention.wq.weight": (64, 64), "attention.wk.weight": (64, 64),
        "attention.wv.weight": (64, 64), "attention.wo.weight": (64, 64),
        "attention_norm.weight": (64,), "ffn_norm.weight": (64,),
        "feed_forward.w1.weight": (128, 64), "feed_forward.w2.weight": (64, 128),
        "feed_forward.w3.weight": (128, 64),
    }  # fmt: skip
    return {
        **_layers("vision_encoder.transformer.layers", layer),
        "vision_encoder.patch_conv.weight": (64, 3, 14, 14),
        "vision_encoder.ln_pre.weight": (64,),
        "vision_language_adapter.w_in.weight": (256, 64),
        "vision_language_adapter.w_in.bias": (256,),
        "vision_language_adapter.w_out.weight": (256, 256),
        "vision_language_adapter.w_out.bias": (256,),
    }


_LOCAL = "sliding_attention"
_HEAD = 32
# in Mistral's own format, only latent attention has these
_UNSCALED = {name: value for name, value in _MISTRAL_3.items() if "mscale" not in name}
_MISTRAL_4 = {
    **{name: value for name, value in _LATENT.items() if name != "first_k_dense_replace"},
    "q_lora_rank": 128, "pad_token_id": 0, "rope_parameters": _MISTRAL_3,
}  # fmt: skip
_OWN_CODE: Config = {"trust_remote_code": True}
_OWN_FORMAT: Config = {
    "config_format": "mistral", "load_format": "mistral", "tokenizer_mode": "mistral",
}  # fmt: skip
RENAMED: dict[str, Renamed] = {
    "bailing_moe_v2": Renamed(
        "BailingMoeV2ForCausalLM",
        MORE_FAMILIES["glm4_moe"],
        _bailing_config,
        _bailing,
        _OWN_CODE,
    ),
    "plamo3": Renamed(
        "Plamo3ForCausalLM",
        (
            "gemma3_text",
            {
                **FAMILIES["gemma3"][1], "hidden_activation": "silu",
                "query_pre_attn_scalar": _HEAD,
            },
        ),
        _plamo_3_config,
        _plamo_3,
        _OWN_CODE,
    ),
    "mistral_large_3": Renamed(
        "MistralLarge3ForCausalLM",
        ("mistral4", _MISTRAL_4),
        _mistral_config,
        _mistral,
        {**_OWN_FORMAT, "attention_backend": "CPU_MLA"},
    ),
    "step3p5": Renamed("Step3p5ForCausalLM", "step3p7", _step_3_5_config, _step_3_5, {}),
    "step3p7": Renamed(
        "Step3p7ForConditionalGeneration",
        "step3p7",
        _step_3_7_config,
        lambda weights: weights,
        _OWN_CODE,
        sees=True,
    ),
    "kimi_k25": Renamed(
        "KimiK25ForConditionalGeneration",
        MORE_FAMILIES["deepseek_v3"],
        _kimi_config,
        lambda weights: {
            **renamed(weights, [("^", "language_model.")]), **_tower(_kimi_tower()),
        },
        {"attention_backend": "CPU_MLA"},
        sees=True,
        preprocessor={
            "media_proc_cfg": {
                "patch_size": 14, "merge_kernel_size": 2, "in_patch_limit": 16,
                "patch_limit_on_one_side": 4, "fixed_output_tokens": None,
                "temporal_merge_kernel_size": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            },
        },
    ),
    "ernie4_5_vl_moe": Renamed(
        "Ernie4_5_VLMoeForConditionalGeneration",
        "ernie4_5_vl_moe",
        _ernie_config,
        lambda weights: renamed(weights, [(r"^model\.vision_model", "vision_model")]),
        _OWN_CODE,
        sees=True,
        has_processor=True,
    ),
    "muse_glimmer": Renamed(
        "MuseGlimmerForConditionalGeneration",
        "muse_glimmer",
        _muse_config,
        lambda weights: weights,
        {},
        sees=True,
    ),
    "internvl_chat": Renamed(
        "InternVLChatModel",
        FAMILIES["qwen3"],
        _intern_config,
        lambda weights: {
            **renamed(weights, [("^", "language_model.")]), **_tower(_intern_tower()),
        },
        _OWN_CODE,
        sees=True,
    ),
    "phi4mm": Renamed(
        "Phi4MMForCausalLM",
        FAMILIES["phi3-long"],
        _phi_4_config,
        lambda weights: weights,
        {**_OWN_CODE, "language_model_only": True},  # its towers have 800 million parameters
        sees=True,
        has_processor=True,
    ),
    "pixtral": Renamed(
        "PixtralForConditionalGeneration",
        ("ministral3", {**FAMILIES["ministral3"][1], "rope_parameters": _UNSCALED}),
        _pixtral_config,
        lambda weights: {**_mistral(weights), **_tower(_pixtral_tower())},
        _OWN_FORMAT,
        sees=True,
    ),
    "pixtral-latent": Renamed(
        "PixtralForConditionalGeneration",
        ("mistral4", _MISTRAL_4),
        _pixtral_config,
        lambda weights: {**_mistral(weights), **_tower(_pixtral_tower())},
        {**_OWN_FORMAT, "attention_backend": "CPU_MLA"},
        sees=True,
    ),
}  # fmt: skip
