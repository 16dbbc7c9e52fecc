"""What is asked of vLLM's completions endpoint, from the options of a call. Pure."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, NamedTuple

from cacheblend_rag.config import BlendConfig, refuse_fields_of_start
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.options import (
    OURS,
    PER_CALL,
    PER_REQUEST,
    blend_options,
    sampling_options,
    unknown_option,
)
from cacheblend_rag.plan import PARAMS_KEY
from cacheblend_rag.tools import ToolUse, tool_use

# vLLM's own, where the embedded engine leaves them out. A server would take the model's instead.
_DEFAULTS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
# sampling parameters that the completions endpoint of every vLLM from 0.26 on takes
SAMPLING = frozenset(
    {
        *_DEFAULTS,
        "allowed_token_ids",
        "bad_words",
        "extra_args",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "min_tokens",
        "n",
        "seed",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "structured_outputs",
    }
)
# those that only some versions take; the server says whether its own does
OF_SOME_VERSIONS = frozenset(
    {"logprob_token_ids", "repetition_detection", "thinking_token_budget", "watermarking"}
)
_OF_PROMPTS = "a BlendResult has no place for it; ask the server's /v1/completions"
_REFUSED = {
    "detokenize": "a server always sends text; read token_ids of the result",
    "flat_logprobs": "leave it out: log-probabilities come as a dict a token",
    "prompt_logprobs": _OF_PROMPTS,
    "prompt_logprob_start": _OF_PROMPTS,
    "prompt_logprob_token_ids": _OF_PROMPTS,
    "skip_reading_prefix_cache": "pass mode='full', which does it",
}


class Options(NamedTuple):
    """Those of one call.

    Attributes:
        config: what the call asks for, as far as this side knows.
        params: options of ours that are sent.
        sampling: vLLM's sampling parameters.
        model: name of a LoRA adapter that the server has; None: the model itself.
        tools: that the model may call.
    """

    config: BlendConfig
    params: Mapping[str, Any]
    sampling: Mapping[str, Any]
    model: str | None
    tools: ToolUse | None = None


def split(
    options: Mapping[str, Any],
    config: BlendConfig,
    own: Collection[str],
    known: Collection[str] = SAMPLING,
) -> Options:
    """The options of a call, sorted and checked.

    Args:
        options: as given to ``generate``.
        config: what holds where a call says nothing.
        own: the fields of ``config`` that are sent with every request: the others are the server's.
        known: the sampling parameters that the server takes.

    Raises:
        ConfigError: an unknown option, a refused value, or what a server can't do.
    """
    ours = blend_options(options)
    asked = config.for_call(ours)
    sampling = sampling_options(options)
    refuse_fields_of_start(sampling)
    for name in sampling:
        if name in _REFUSED:
            raise ConfigError(f"{name} can't be asked of a server: {_REFUSED[name]}")
        if name not in known:
            raise unknown_option(name, {*known, *OURS}, "generate, to this server,")
    if sampling.get("n", 1) != 1:
        raise ConfigError("n must be 1: for several answers pass the prompt several times")
    sent = _sent(asked, {*own, *ours})
    return Options(asked, sent, sampling, _adapter(options), tool_use(options))


def _sent(config: BlendConfig, names: set[str]) -> dict[str, Any]:
    if "selector" in names:
        names = {*names, "selector_options"}
    defaults = config.request_defaults()
    return {name: defaults[name] for name in PER_REQUEST if name in names}


def _adapter(options: Mapping[str, Any]) -> str | None:
    """The name of the LoRA adapter that a call asks for, by which servers know them."""
    asked = options.get("lora_request")
    name = getattr(asked, "lora_name", asked)
    if name is not None and not isinstance(name, str):
        raise ConfigError(
            f"lora_request is {asked!r}; for a server it is the name of one of its adapters "
            "(cacheblend serve --lora-modules NAME=FOLDER), or a LoRARequest with that name"
        )
    return name


def completion(ids: Sequence[int], options: Options, max_model_len: int) -> dict[str, Any]:
    """The body of a request for one streamed answer, for vLLM's completions."""
    return {**_body(options, max_model_len - len(ids)), "prompt": list(ids)}


def chat(
    messages: Sequence[Mapping[str, Any]],
    ids: Sequence[int],
    options: Options,
    max_model_len: int,
) -> dict[str, Any]:
    """The same for vLLM's chat completions, which read the answer by the server's parsers.

    Args:
        messages: the prompt; ``ids``: what it comes to.
        options: of the call.
        max_model_len: tokens that prompt and answer may have together.
    """
    body = _body(options, max_model_len - len(ids))
    body.setdefault("max_tokens", 16)  # as completions have it; these would fill the context
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    if arguments := dict(options.config.chat_template_kwargs):
        body["chat_template_kwargs"] = arguments
    tools = {} if options.tools is None else options.tools.body()
    return {**body, **tools, "messages": [dict(message) for message in messages]}


def _body(options: Options, room: int) -> dict[str, Any]:
    """What both have in common; ``room``: tokens that an answer may have at most."""
    sampling = {name: _plain(value) for name, value in options.sampling.items()}
    if "extra_args" in sampling:
        sampling["vllm_xargs"] = sampling.pop("extra_args")
    if sampling.get("max_tokens", 16) is None:  # a server would take 16
        sampling["max_tokens"] = room
    given = {name: value for name, value in sampling.items() if value is not None}
    body = {**_DEFAULTS, **given, "stream": True, "return_token_ids": True}
    if "logprobs" in given:
        body["return_tokens_as_token_ids"] = True
    if options.params:
        body["kv_transfer_params"] = {PARAMS_KEY: dict(options.params)}
    if options.config.mode == "full":  # reads no block that another request left
        body["cache_salt"] = f"full:{uuid.uuid4().hex}"
    if options.model is not None:
        body["model"] = options.model
    return body


def _plain(value: Any) -> Any:
    """vLLM's parameter objects, such as StructuredOutputsParams, as the plain data they hold."""
    if is_dataclass(value) and not isinstance(value, type):
        own = {n: v for n, v in asdict(value).items() if not n.startswith("_")}
        return {name: v for name, v in own.items() if v is not None}
    return value


def merged(server: BlendConfig, asked: BlendConfig | None) -> tuple[BlendConfig, frozenset[str]]:
    """The configuration of a front to a server, and which of its fields requests carry.

    Args:
        server: the server's.
        asked: the caller's. A field that only the server can set, and that has its default here,
            is the server's.

    Raises:
        ConfigError: such a field differs.
    """
    if asked is None:
        return server, frozenset()
    ours = blend_options({name: getattr(asked, name) for name in PER_CALL})
    for name in sorted({f.name for f in fields(BlendConfig)} - set(PER_CALL) - _PASSED_OVER):
        value = getattr(asked, name)
        if value not in (getattr(server, name), getattr(_UNSET, name)):
            raise ConfigError(
                f"{name} is {value!r} here and {getattr(server, name)!r} at the server, and only "
                f"the server can set it: cacheblend serve --{name.replace('_', '-')} ...; or leave "
                "it out"
            )
    return server.for_call(ours), frozenset(PER_REQUEST)


_UNSET = BlendConfig()
# the store's URL is shown in part; the others change nothing in what the server computes for us
_PASSED_OVER = {"store", "gpu_cache", "calibration", "likely_system_prompt"}


def server_config(plain: Mapping[str, Any]) -> BlendConfig:
    """A server's configuration, as far as this version knows its fields."""
    known = {f.name for f in fields(BlendConfig)}
    return BlendConfig.of({n: v for n, v in plain.items() if n in known}, "the server")
