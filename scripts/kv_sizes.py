"""Prints how much storage the KV of chunks takes, by model: the README's table (which has fewer
rows), and behind it that of docs/serving.md: of a text, and how fast a store has to be.

    python scripts/kv_sizes.py                       # the usual models
    python scripts/kv_sizes.py path/to/config.json   # yours

A token's KV is 2 (keys and values) x layers x KV heads x head size x bytes of an element.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

CHUNK, CORPUS = 512, 100_000  # tokens a chunk, chunks
TEXT_BYTES = 4  # of English text a token, about
PREFILL = 10_000  # tokens a second


class Shape(NamedTuple):
    """What the size of a model's KV depends on."""

    layers: int
    kv_heads: int
    head_size: int
    element_bytes: int = 2  # bfloat16

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_size * self.element_bytes


# as in each model's published config.json
MODELS = {
    "Qwen2.5-7B": Shape(28, 4, 128),
    "Llama-3.1-8B, Mistral-7B": Shape(32, 8, 128),
    "Qwen3-8B": Shape(36, 8, 128),
    "Qwen2.5-32B, Qwen3-32B": Shape(64, 8, 128),
    "Llama-3.3-70B": Shape(80, 8, 128),
}
IN_README = ("Qwen2.5-7B", "Llama-3.1-8B, Mistral-7B", "Llama-3.3-70B")


def from_config(config: dict[str, Any]) -> Shape:
    """The shape that a ``config.json`` describes."""
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return Shape(
        layers=config["num_hidden_layers"],
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        element_bytes=4 if dtype == "float32" else 2,
    )


def table(models: dict[str, Shape]) -> str:
    """Markdown, a row a model."""
    lines = [
        f"| model | KV of a token | of a chunk of {CHUNK} | of {CORPUS:,} chunks "
        "| with `dtype=fp8` |",
        "|---|---|---|---|---|",
    ]
    for name, shape in models.items():
        size = shape.token_bytes
        corpus = size * CHUNK * CORPUS / 1e12
        lines.append(
            f"| {name} | {size / 1024:g} KiB | {size * CHUNK / 2**20:g} MiB | {corpus:.2g} TB | "
            f"{corpus / (shape.element_bytes):.2g} TB |"
        )
    return "\n".join(lines)


def serving_table(models: dict[str, Shape]) -> str:
    """Markdown, a row a model."""
    lines = [
        "| model | KV of 1 MB of text | in FP8 | as quick to load as a prefill of "
        f"{PREFILL:,} tokens a second |",
        "|---|---|---|---|",
    ]
    for name, shape in models.items():
        of_text = shape.token_bytes * 1e6 / TEXT_BYTES / 1e9
        lines.append(
            f"| {name} | {of_text:.2g} GB | {of_text / shape.element_bytes:.2g} GB | "
            f"{shape.token_bytes * PREFILL / 1e9:.2g} GB/s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="*", type=Path, metavar="config.json")
    configs = parser.parse_args().configs
    given = {str(path): from_config(json.loads(path.read_text())) for path in configs}
    print(table(given or MODELS))
    print()
    print(serving_table(given or MODELS))


if __name__ == "__main__":
    main()
