"""Why a request, or a whole model, is served without blending."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Reason(StrEnum):
    """One of a few, for programs; the sentence with the particulars is the ``detail``."""

    # what the caller or the plan decides
    MODE = "mode"
    """The request's mode reuses nothing."""
    NO_CHUNK_FOUND = "no_chunk_found"
    """The prompt holds no chunk that is known to be stored."""
    NO_WHOLE_BLOCK = "no_whole_block"
    """The chunks found fill no block of the paged cache."""
    PREFILL_AS_QUICK = "prefill_as_quick"
    """A plain prefill is predicted to take no longer than a blend."""

    CHANGED_TOO_OFTEN = "changed_too_often"
    """No ratio keeps the changed answers of the prompt's template within what is allowed."""

    # what the engine finds when it comes to the request
    HANDED_OVER = "handed_over"
    """Its KV came from another engine, which says whether it blended."""
    PREFIX_CACHED = "prefix_cached"
    """vLLM's prefix cache holds all that would be blended."""
    CHUNKS_MISSING = "chunks_missing"
    """The store had none of the chunks, or none in time."""
    BLEND_FAILED = "blend_failed"
    """The blend failed, and the prompt was computed exactly."""
    MALFORMED_OPTIONS = "malformed_options"
    """The request's options cannot be read."""
    PLANNING_FAILED = "planning_failed"
    """The request could not be planned, and the prompt was computed exactly."""
    PROMPT_EMBEDS = "prompt_embeds"
    """The prompt is given as embeddings, not as token ids."""
    LORA = "lora"
    """The request has another LoRA adapter than its chunks."""
    ENCODER_INPUTS = "encoder_inputs"
    """The prompt holds images or other inputs of an encoder."""
    PROMPT_LOGPROBS = "prompt_logprobs"
    """The request asks for log-probabilities of the prompt, which need all of it computed."""
    SKIPS_CACHE = "skips_cache"
    """The request asks vLLM to take nothing from caches."""
    BEAM_SEARCH = "beam_search"
    """The request is a part of a beam search, to which vLLM's server hands on no options."""
    NOT_REPORTED = "not_reported"
    """The engine did not say what it did."""

    # how the engine was started, and what was done to it
    OTHER_CONNECTORS = "other_connectors"
    """Another KV connector than ours could hand on blended KV as exact."""
    NOT_READY = "not_ready"
    """The engine's store is not open yet, or its configuration was refused: see ``detail``."""
    WEIGHTS_CHANGED = "weights_changed"
    """Weights were changed in the running engine, or are to be: chunks are of the old ones."""
    SPECULATIVE_DECODING = "speculative_decoding"
    """Speculative decoding is on, on a GPU or by a method that was not tested."""
    PIPELINE_PARALLEL = "pipeline_parallel"
    """Layers are spread over several workers."""
    DATA_PARALLEL = "data_parallel"
    """One engine has several replicas."""
    CONTEXT_PARALLEL = "context_parallel"
    """A worker does not hold all of a sequence's KV."""
    CUDA_GRAPHS = "cuda_graphs"
    """Steps with prefills are one CUDA graph, in which rows can't be changed."""
    ATTENTION_BACKEND = "attention_backend"
    """The attention backend does not let KV be written."""

    # what the model is
    NO_ATTENTION = "no_attention"
    """The model has no attention layers."""
    HYBRID = "hybrid"
    """The model mixes attention with recurrent layers."""
    MLA = "mla"
    """The model uses multi-head latent attention of a kind that was not tested."""
    ENCODER_DECODER = "encoder_decoder"
    """The model has an encoder and a decoder."""
    NOT_GENERATIVE = "not_generative"
    """The model generates no text."""
    MROPE = "mrope"
    """The model's positions have several dimensions, of which text needs more than one."""
    NO_ROPE = "no_rope"
    """No layer of the model rotates its keys by position."""
    ROPE_TABLES = "rope_tables"
    """The model's RoPE tables depend on more than the position, or end before ``max_model_len``."""
    ALIBI = "alibi"
    """The model's attention is biased by distance."""
    OWN_INPUTS = "own_inputs"
    """The model is given more of a step than tokens and their positions."""
    ATTENTION_LAYER = "attention_layer"
    """The model has attention layers of a class we do not know."""
    SHARED_KV = "shared_kv"
    """Layers of the model share KV, and layers with KV of their own stand behind them."""
    ATTENTION_SINKS = "attention_sinks"
    """The model's attention has sinks as parameters, which the attention backend does not show."""
    NOT_CAUSAL = "not_causal"
    """The model's attention looks ahead."""
    SLIDING_WINDOW = "sliding_window"
    """The model's sliding window is shorter than what would be blended."""
    KV_HEADS = "kv_heads"
    """Values are of another size than keys, or ranks can't share the model's KV heads."""
    KV_GROUPS = "kv_groups"
    """Layers are in several KV cache groups, in a way that was not tested."""

    # what the model check measured
    MOVED_KEYS_DIFFER = "moved_keys_differ"
    """Moved keys or values are not those computed there."""
    ATTENTION_DIFFERS = "attention_differs"
    """Attention outside of the paged cache is not that of the model's backend."""
    ROWS_DIFFER = "rows_differ"
    """Rows of vLLM's step are not what a plain prefill gives."""
    PROBE_NOT_BLENDED = "probe_not_blended"
    """The engine did not blend the probe prompt."""
    RATIO_ONE_DIFFERS = "ratio_one_differs"
    """Recomputing every token does not give the plain prefill."""


class Why(NamedTuple):
    """A reason and the sentence that says it, with its particulars."""

    reason: Reason
    detail: str


class RefusedError(Exception):
    """A blend that cannot be exact, or is not worth it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.why = Why(reason, detail)
