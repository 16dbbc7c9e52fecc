"""The options of one call, as types: an IDE lists them, and a type checker knows their names. And
how a name that is no option is refused, anywhere.

What a name or a value is worth is decided when it is used: by ``BlendConfig`` for ours, by vLLM for
its own, whose versions differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, TypedDict, TypeVar, cast

from cacheblend_rag.errors import ConfigError

_Table = TypeVar("_Table")
_RENAMED = {"reach": "propagation_length", "when": "blend_if", "ratio": "recompute_ratio"}
Mode = Literal["blend", "full", "reuse", "off"]
BlendIf = Literal["faster", "always"]
Refine = int | Literal["off", "idle"]


class BlendOptions(TypedDict, total=False):
    """The fields of ``BlendConfig`` that can be set for one call too; it says what they do."""

    mode: Mode
    recompute_ratio: float | Literal["auto"]
    selector: str
    selector_options: Mapping[str, Any]
    propagation_length: int
    blend_if: BlendIf
    refine: Refine
    template: str | None
    chat_template_kwargs: Mapping[str, Any]


class SamplingOptions(TypedDict, total=False):
    """vLLM's sampling parameters, by its own names. Some versions lack some of them."""

    allowed_token_ids: list[int] | None
    bad_words: list[str] | None
    detokenize: bool
    extra_args: dict[str, Any] | None
    flat_logprobs: bool
    frequency_penalty: float
    ignore_eos: bool
    include_stop_str_in_output: bool
    logit_bias: dict[int, float] | None
    logprob_token_ids: list[int] | None
    logprobs: int | None
    max_tokens: int | None
    min_p: float
    min_tokens: int
    n: int
    presence_penalty: float
    prompt_logprob_start: int | None
    prompt_logprob_token_ids: Any  # a numpy array
    prompt_logprobs: int | None
    repetition_detection: Any  # vLLM's RepetitionDetectionParams
    repetition_penalty: float
    routed_experts_prompt_start: int
    seed: int | None
    skip_reading_prefix_cache: bool | None
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    stream_interval: int | None
    structured_outputs: Any  # vLLM's StructuredOutputsParams, or a dict of its fields
    temperature: float
    thinking_token_budget: int | None
    top_k: int
    top_p: float
    trace_decode_token_ids: list[int] | None
    watermarking: bool | None


class ToolOptions(TypedDict, total=False):
    """Tools that the model may call, in OpenAI's form; with prompts of chat messages only."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None  # none, auto, required, or a tool
    parallel_tool_calls: bool | None


class CallOptions(BlendOptions, SamplingOptions, ToolOptions, total=False):
    """All options of ``generate``, ``stream``, ``agenerate`` and ``astream``."""

    lora_request: Any  # vLLM's LoRARequest; of a server also the adapter's name


PER_CALL = tuple(BlendOptions.__annotations__)
TOOL_OPTIONS = tuple(ToolOptions.__annotations__)
OURS = (*PER_CALL, *TOOL_OPTIONS, "lora_request")  # what vLLM's sampling does not know
PER_REQUEST = tuple(name for name in PER_CALL if name != "chat_template_kwargs")


def blend_options(options: Mapping[str, Any]) -> BlendOptions:
    """Those among a call's options that are ours."""
    return cast(BlendOptions, {name: options[name] for name in PER_CALL if name in options})


def sampling_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a call's options: vLLM's sampling parameters, and what has a wrong name."""
    return {name: value for name, value in options.items() if name not in OURS}


def unknown_option(name: str, known: Iterable[str], what: str) -> ConfigError:
    """The error for a name that does not exist, with the closest one that does."""
    if (renamed := _RENAMED.get(name, "")) in known:
        return ConfigError(f"{what} has no option {name!r}: it is called {renamed!r}.")
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."
    return ConfigError(f"{what} has no option {name!r}.{hint}")


def refuse_unknown(names: Iterable[object], known: Iterable[str], what: str) -> None:
    """That ``what`` has all these options.

    Raises:
        ConfigError: the first one that it has not.
    """
    known = frozenset(known)
    for name in names:
        if name not in known:
            raise unknown_option(str(name), known, what)


def from_table(cls: type[_Table], data: object, what: str) -> _Table:
    """A dataclass of options from plain data, such as JSON; ``what`` has them, for messages.

    Raises:
        ConfigError: no table, unknown options or values that the class refuses.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what} is {data!r}; it must be a table of options")
    refuse_unknown(data, {f.name for f in fields(cast(Any, cls))}, what)
    return cls(**data)
