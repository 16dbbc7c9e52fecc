"""What a chunk's KV depends on besides its tokens, as one name: weights, dtype, RoPE, and what else
changes keys and values. How the engine was started is no part of it, so that any engine of the
same model reads what another one stored.

===================== ============================================================================
counted               weights (every byte of their files), ``config.json`` and what else in the
                      folder says how to read them; ``dtype``; ``quantization`` and
                      ``quantization_config`` where the checkpoint is not quantized itself;
                      ``hf_overrides``; ``model_class_overrides``; ``code_revision``; the model's
                      class (``model_impl``); the resolved sliding window
                      (``disable_sliding_window``); samples of the RoPE tables, and where there are
                      several which layer turns by which
counted by content    ``model``, ``model_weights``, ``revision``, ``hf_config_path``,
                      ``load_format``, ``download_dir``: they say where the weights are
not counted           context length, sizes of batches, blocks and caches; how the model is split
                      over GPUs, compiled, captured, offloaded; which kernels attend (rounding
                      only); ``kv_cache_dtype``: chunks keep what the model computes, before the
                      paged cache rounds it; tokenizer, sampling, serving: ``HARMLESS``
===================== ============================================================================

An option of a vLLM that is newer than this table is counted where it is set.

Weights that are not read from local files as they are (``load_format`` dummy, tensorizer or
sharded_state, object storage, ModelScope, a second checkpoint) are counted as they were loaded, a
part a rank: then the tensor parallel size is part of the name as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from cacheblend_rag.engine.rope import Rerotator

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

# fields of vLLM's ModelConfig and LoadConfig; of its other parts, none changes keys or values
COUNTED = {
    "model", "model_weights", "revision", "hf_config_path", "config_format", "load_format",
    "download_dir", "dtype", "quantization", "quantization_config", "hf_overrides",
    "model_class_overrides", "code_revision", "model_impl", "disable_sliding_window", "hf_config",
    "hf_text_config", "model_loader_extra_config",
}  # fmt: skip
HARMLESS = {
    "runner", "convert", "tokenizer", "tokenizer_mode", "trust_remote_code", "seed",
    "is_submodel_config", "word_embeddings_untied_by_checkpoint", "allowed_local_media_path",
    "allowed_media_domains", "tokenizer_revision", "max_model_len", "spec_target_max_model_len",
    "allow_deprecated_quantization", "enforce_eager", "return_sampling_mask",
    "enable_return_routed_experts", "max_logprobs", "logprobs_mode", "use_fp64_gumbel",
    "enable_trace_replay", "disable_cascade_attn", "skip_tokenizer_init", "enable_prompt_embeds",
    "served_model_name", "hf_token", "generation_config", "override_generation_config",
    "enable_sleep_mode", "sleep_preserve_parameter_names", "sleep_mode_backend",
    "sleep_mode_offload_cudagraph", "enable_nccl_comm_suspend", "enable_cumem_allocator",
    "override_attention_dtype", "logits_processors", "io_processor_plugin", "renderer_num_workers",
    "pooler_config", "multimodal_config",
    "safetensors_load_strategy", "safetensors_prefetch_num_threads",
    "safetensors_prefetch_block_size", "device", "ignore_patterns", "use_tqdm_on_load",
    "pt_load_map_location",
}  # fmt: skip

# what vLLM looks for, in this order; the first that is there is what it loads
_PATTERNS: Mapping[str, Sequence[str]] = {
    "mistral": ("consolidated*.safetensors",),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "runai_streamer": ("*.safetensors",),
    "bitsandbytes": ("*.safetensors", "*.bin", "*.pt"),
    "pt": ("*.pt",),
    "npcache": ("*.bin",),
}
# besides the weights: how they are read and computed with
_OTHER_FILES = (
    "config.json", "params.json", "*.index.json", "hf_quant_config.json", "quantize_config.json",
    "quant_config.json", "*.py",
)  # fmt: skip
_SPEED = {"enable_multithread_load", "num_threads", "concurrency", "memory_limit"}  # of loading
_PIECE, _BUFFER = 64 << 20, 1 << 20  # bytes a thread takes; read at once: a CPU's cache holds them


def fingerprint(model: Any, config: VllmConfig, rope: Rerotator, rank: int, size: int) -> str:
    """This rank's part of the name, hexadecimal; empty where the first rank's says it all."""
    files = weight_files(model, config.model_config, config.load_config)
    # All ranks read the same files, so one name is enough, and the number of ranks is no part of
    # it.
    if files and rank:
        return ""
    digest = xxhash.xxh3_128(json.dumps(facts(model, config, rope), sort_keys=True).encode())
    if files:
        digest.update(bytes_digest(files))
    else:
        # What a rank holds depends on how the model is split, so the split is part of the name.
        digest.update(f"{rank}of{size}".encode() + _loaded_digest(model))
    for path in _other_files(config.model_config, config.load_config):
        digest.update(path.name.encode() + b"/" + xxhash.xxh3_128_digest(path.read_bytes()))
    return digest.hexdigest()


def facts(model: Any, config: VllmConfig, rope: Rerotator) -> dict[str, Any]:
    """What counts besides the content of files."""
    chosen, loading = config.model_config, config.load_config
    unknown = {**_unknown(chosen), **_unknown(loading)}
    # Then the method is in ``config.json`` already, and vLLM's name for it differs by kernel and
    # machine.
    is_quantized = getattr(chosen.hf_config, "quantization_config", None) is not None
    quantized = "" if is_quantized else f"{chosen.quantization}/{chosen.quantization_config}"
    return {
        "class": type(model).__name__,
        "dtype": str(chosen.dtype),
        "quantization": quantized,
        "overrides": _overrides(chosen),
        "classes": sorted(chosen.model_class_overrides.items()),
        "code_revision": chosen.code_revision,
        "config_format": str(chosen.config_format),
        "window": chosen.get_sliding_window(),
        "rope": rope.sample(),
        "loader": {k: str(v) for k, v in _extra(loading).items() if k not in _SPEED},
        "unknown": unknown,
    }


def weight_files(model: Any, chosen: ModelConfig, loading: LoadConfig) -> list[Path]:
    """The files that the weights were read from as they are; none where that is not so."""
    if Path(chosen.model).is_file():  # GGUF
        return [Path(chosen.model)]
    mixed = getattr(model, "secondary_weights", ()) or getattr(
        model, "allow_patterns_overrides", None
    )
    folder = local_folder(chosen.model, chosen.revision, loading.download_dir)
    if folder is None or mixed or chosen.model_weights or _extra(loading).keys() - _SPEED:
        return []
    load_format = str(loading.load_format)
    if load_format == "auto":
        load_format = "mistral" if _found(folder, _PATTERNS["mistral"]) else "hf"
    return _found(folder, _PATTERNS.get(load_format, ()))


def bytes_digest(files: Iterable[Path]) -> bytes:
    """Of every byte of ``files``, in this order; in several threads, since none reads as fast as
    the memory that holds them after loading.
    """
    digest = xxhash.xxh3_128()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for piece in pool.map(_piece_digest, *zip(*_pieces(files), strict=True)):
            digest.update(piece)
    return digest.digest()


def _pieces(files: Iterable[Path]) -> Iterator[tuple[Path, int]]:
    for path in files:
        for start in range(0, max(1, path.stat().st_size), _PIECE):
            yield path, start


def _piece_digest(path: Path, start: int) -> bytes:
    digest, buffer, left = xxhash.xxh3_128(), memoryview(bytearray(_BUFFER)), _PIECE
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.digest()


def _loaded_digest(model: Any) -> bytes:
    """Of all parameters, as this rank holds them."""
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}/{tuple(parameter.shape)}/{parameter.dtype}/".encode())
        raw = parameter.detach().contiguous().view(-1).view(torch.uint8)
        for piece in raw.split(_PIECE):
            digest.update(piece.cpu().numpy().data)
    return digest.digest()


def _other_files(chosen: ModelConfig, loading: LoadConfig) -> list[Path]:
    """Small files of the model's folder, and of that which its configuration is taken from."""
    places = (chosen.model, chosen.hf_config_path)
    folders = [local_folder(p, chosen.revision, loading.download_dir) for p in places if p]
    groups = (sorted(f.glob(pattern)) for f in folders if f for pattern in _OTHER_FILES)
    return [path for path in itertools.chain.from_iterable(groups) if path.is_file()]


def local_folder(name: str, revision: str | None, cache: str | None) -> Path | None:
    """The local folder of a model by path or hub name; None where there is none."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from vllm import envs

    # Its cache is laid out otherwise. Weights are then counted as they were loaded.
    if envs.VLLM_USE_MODELSCOPE:
        return None
    try:
        found = snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True)
    except (OSError, ValueError):  # not in the cache, or no name of a repository
        return None
    return Path(found)


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    groups = (sorted(folder.glob(pattern)) for pattern in patterns)
    return next(filter(None, groups), [])


def _extra(loading: LoadConfig) -> Mapping[str, Any]:
    extra = loading.model_loader_extra_config
    return extra if isinstance(extra, Mapping) else {"config": extra}


def _overrides(chosen: ModelConfig) -> Any:
    """``hf_overrides``; of a function, what came of it."""
    if not callable(chosen.hf_overrides):
        return json.loads(json.dumps(chosen.hf_overrides, default=str))
    resolved = dict(chosen.hf_config.to_diff_dict())
    # Where the model lies and who wrote the file: neither changes a key.
    for volatile in ("_name_or_path", "transformers_version"):
        resolved.pop(volatile, None)
    return json.loads(json.dumps(resolved, default=str))


def _unknown(config: Any) -> dict[str, str]:
    """Options that are in neither table, where they are set."""
    names = {field.name for field in dataclasses.fields(config)} - COUNTED - HARMLESS
    return {name: str(value) for name in sorted(names) if (value := getattr(config, name, None))}
