"""The README names what is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cacheblend_rag
from cacheblend_rag.reason import Reason

PACKAGE = Path(cacheblend_rag.__file__).parent
WORDS = {
    Reason.NO_ATTENTION: ("without attention",),
    Reason.HYBRID: ("recurrent layers", "hybrids"),
    Reason.MLA: ("MLA",),
    Reason.ENCODER_DECODER: ("encoder-decoders",),
    Reason.NOT_GENERATIVE: ("generate no text",),
    Reason.MROPE: ("XD-RoPE",),
    Reason.NO_ROPE: ("no rotary positions",),
    Reason.ROPE_TABLES: ("RoPE tables that depend on more",),
    Reason.MOVED_KEYS_DIFFER: ("model check", "moves keys otherwise"),
    Reason.ATTENTION_DIFFERS: ("Our own attention must equal vLLM's",),
    Reason.ALIBI: ("ALiBi",),
    Reason.OWN_INPUTS: ("get more of a step than tokens",),
    Reason.ATTENTION_LAYER: ("attention layers of any other class",),
    Reason.SHARED_KV: ("share KV",),
    Reason.ATTENTION_SINKS: ("attention sinks",),
    Reason.NOT_CAUSAL: ("not causal",),
    Reason.SLIDING_WINDOW: ("sliding window", "max_tokens"),
    Reason.KV_GROUPS: ("KV cache groups",),
    Reason.RATIO_ONE_DIFFERS: ("ratio 1 must equal a plain prefill",),
    Reason.SPECULATIVE_DECODING: ("speculative decoding",),
    Reason.PIPELINE_PARALLEL: ("pipeline, data or context parallelism",),
    Reason.DATA_PARALLEL: ("pipeline, data or context parallelism",),
    Reason.CONTEXT_PARALLEL: ("pipeline, data or context parallelism",),
    Reason.ATTENTION_BACKEND: ("without a cache update of its own",),
    Reason.KV_HEADS: ("values of another size than keys", "different number of KV heads"),
    Reason.CUDA_GRAPHS: ("one CUDA graph",),
    Reason.LORA: ("LoRA", "LoRA adapter"),
    Reason.ENCODER_INPUTS: ("images",),
    Reason.PROMPT_LOGPROBS: ("`prompt_logprobs`",),
    Reason.PROMPT_EMBEDS: ("embeddings",),
    Reason.BEAM_SEARCH: ("beam search",),
    Reason.SKIPS_CACHE: ("`skip_reading_prefix_cache`",),
    Reason.WEIGHTS_CHANGED: ("weights changed in the running engine",),
    Reason.OTHER_CONNECTORS: ("other KV connectors",),
    Reason.ROWS_DIFFER: ("ratio 1 must equal a plain prefill",),
}
# what the caller's own mode, the chunks found, their costs or the store decide for a request
NOT_LISTED = {
    Reason.MODE,
    Reason.NO_CHUNK_FOUND,
    Reason.NO_WHOLE_BLOCK,
    Reason.PREFILL_AS_QUICK,
    Reason.HANDED_OVER,
    Reason.PREFIX_CACHED,
    Reason.CHUNKS_MISSING,
    Reason.CHANGED_TOO_OFTEN,
    Reason.BLEND_FAILED,
    Reason.MALFORMED_OPTIONS,
    Reason.PLANNING_FAILED,
    Reason.NOT_READY,
    Reason.NOT_REPORTED,
    Reason.PROBE_NOT_BLENDED,
}


def section() -> str:
    text = (PACKAGE.parent / "README.md").read_text()
    start = text.index("## What is refused")
    return " ".join(text[start : text.index("\n## ", start)].split())


def given() -> set[Reason]:
    """Every reason that the code gives."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "reason.py"]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    return {
        Reason[node.attr]
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Reason"
    }


def test_every_refusal_of_the_code_has_its_words() -> None:
    assert given() == set(Reason), "a reason that is never given"
    assert WORDS.keys() | NOT_LISTED == given()
    assert not WORDS.keys() & NOT_LISTED


@pytest.mark.parametrize("reason", WORDS)
def test_the_readme_names_it(reason: Reason) -> None:
    assert [word for word in WORDS[reason] if word not in section()] == []
