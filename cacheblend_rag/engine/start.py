"""What both engines do to start vLLM: check the model, add our connector, name what failed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cacheblend_rag import errors
from cacheblend_rag.engine import compat
from cacheblend_rag.engine.base import (
    NO_PARSERS,
    WORKER_ERROR,
    EngineInfo,
    EngineRequest,
    ParserNames,
)
from cacheblend_rag.errors import (
    CacheBlendError,
    ConfigError,
    EngineDeadError,
    EngineError,
    ModelError,
)
from cacheblend_rag.options import unknown_option
from cacheblend_rag.plan import PARAMS_KEY
from cacheblend_rag.reason import Reason, Why

_OURS = ("kv_transfer_config", "worker_extension_cls")
WORKER = "cacheblend_rag.engine.worker.WorkerExtension"
# options of vLLM's server that its engine does not know, and that we take as well
_TOOL_PARSER, _TOOL_PLUGIN = "tool_call_parser", "tool_parser_plugin"
_TEMPLATE = "chat_template"
BY_FRONT_DOOR = {"opened_by": "cacheblend_rag.CacheBlend"}  # extra config of the connector
# Options by which users choose the steps that vLLM captures as CUDA graphs.
GRAPH_OPTIONS = (
    "compilation_config",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "enforce_eager",
    "optimization_level",
    "performance_mode",
    "speculative_config",  # has vLLM add sizes of its own
)
_GUARD = 'put what starts an engine under `if __name__ == "__main__":`'


class EngineSetup(NamedTuple):
    """Arguments for vLLM, and what is known before it starts."""

    engine_args: Any
    refusal: Why | None
    version: str
    parsers: ParserNames = NO_PARSERS
    template: str | None = None  # chat template in the place of the model's own


def prepare(args_class: str, model: str, options: Mapping[str, Any]) -> EngineSetup:
    """Check ``options`` and the model, and add our connector where the model can be blended.

    Args:
        args_class: ``EngineArgs`` or ``AsyncEngineArgs``.
        model: hub name or folder.
        options: vLLM's engine arguments, and its server's ``tool_call_parser``,
            ``tool_parser_plugin`` and ``chat_template``.

    Raises:
        EngineMissingError, ConfigError, ModelError.
    """
    version = compat.installed_version()
    import vllm.engine.arg_utils as arg_utils

    kind = getattr(arg_utils, args_class)
    known = kind.__dataclass_fields__
    parsers, options = _parsers(options)
    template, options = _template(options)
    for name in options:
        if name in _OURS:
            raise ConfigError(f"{name} is set by cacheblend-rag; leave it out")
        if name not in known:
            more = {_TOOL_PARSER, _TOOL_PLUGIN, _TEMPLATE}
            raise unknown_option(name, {*known, *more}, "vLLM's engine")
    defaults = _defaults(options)
    # Before our connector is among the options: some models can't even start with one.
    refusal = _model_refusal(kind, model, {**defaults, **options})
    ours: dict[str, Any] = {} if refusal else _connector_options(asks_for_hybrid(options))
    with naming_failures(model):
        args = kind(model=model, **{**defaults, **options, **ours})
    return EngineSetup(args, refusal, version, parsers, template)


def _parsers(options: Mapping[str, Any]) -> tuple[ParserNames, dict[str, Any]]:
    """The parsers that options name, and the options that vLLM's engine knows.

    Raises:
        ConfigError: vLLM has no such parser.
    """
    rest = dict(options)
    tool, plugin = rest.pop(_TOOL_PARSER, None), rest.pop(_TOOL_PLUGIN, None)
    names = ParserNames(tool or "", rest.get("reasoning_parser") or "")
    if not any(names):
        return names, rest
    from cacheblend_rag.engine.parsers import check_names

    check_names(names, plugin, rest.get("reasoning_parser_plugin"))
    return names, rest


def _template(options: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The chat template that options name, and the options that vLLM's engine knows."""
    rest = dict(options)
    return chat_template(rest.pop(_TEMPLATE, None)), rest


def chat_template(given: object) -> str | None:
    """The chat template in a file, or that is given itself; None for none.

    Raises:
        ConfigError: there is no such file, and it is no template either.
    """
    if given is None:
        return None
    try:
        return compat.load_chat_template(str(given))
    except compat.refusals() as error:
        raise ConfigError(
            f"chat_template can't be used: {_first_line(error)}. Pass the path of a Jinja file, or "
            "the template itself"
        ) from error


def asks_for_hybrid(options: Mapping[str, Any]) -> bool:
    """Whether vLLM's options ask for its hybrid KV cache manager. vLLM has it on where nobody says
    anything. Beside ours it saves memory and costs time, so it is for users to choose.
    """
    return options.get("disable_hybrid_kv_cache_manager") is False


def connector_name(*, hybrid: bool) -> str:
    """The name of the connector. vLLM decides by its class whether the hybrid manager is on."""
    return "CacheBlendHybridConnector" if hybrid else "CacheBlendConnector"


def _connector_options(hybrid: bool) -> dict[str, Any]:
    from vllm.config import KVTransferConfig

    return {
        "kv_transfer_config": KVTransferConfig(
            kv_connector=connector_name(hybrid=hybrid),
            kv_connector_module_path="cacheblend_rag.engine.connector",
            kv_role="kv_both",
            kv_connector_extra_config=dict(BY_FRONT_DOOR),
            kv_load_failure_policy="fail",  # what cannot be written must not be read
        ),
        "worker_extension_cls": WORKER,
    }


def _defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our defaults for options the user did not set; ``given``: those that were set."""
    from vllm.platforms import current_platform

    options: dict[str, Any] = {"disable_log_stats": True}
    if current_platform.is_cpu():
        # compiling needs a C++ compiler that a fresh machine lacks, and half a minute
        options["enforce_eager"] = True
        # vLLM would take half of the machine's memory
        # Here at the latest: vLLM reads it as the platform is configured.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    else:
        # ingestion waits for page-locked memory, which several threads get sooner
        os.environ.setdefault(
            "PYTORCH_CUDA_ALLOC_CONF",
            "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
        )
        if not any(name in given for name in GRAPH_OPTIONS):
            options["cudagraph_capture_sizes"] = list(graph_sizes())
    return options


def graph_sizes() -> tuple[int, ...]:
    """Rows of a step that vLLM captures as CUDA graphs: its own sizes up to 512, and those of most
    blends. A larger step is launched kernel by kernel, which takes a host longer than the GPU.
    """
    return (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16), *range(576, 2049, 64))


def _model_refusal(kind: Any, model: str, options: Mapping[str, Any]) -> Why | None:
    with naming_failures(model):
        return compat.model_refusal(kind(model=model, **options).create_model_config())


@contextlib.contextmanager
def naming_failures(model: str) -> Iterator[None]:
    """Turn whatever vLLM raises while starting into our exceptions, the cause attached."""
    refused: tuple[type[Exception], ...] = (
        *compat.refusals(),
        KeyError,
        ImportError,  # a kernel or a package that this build of vLLM lacks
        NotImplementedError,
        AssertionError,
    )
    try:
        yield
    except (ModelError, ConfigError, EngineError):
        raise
    except OSError as error:
        raise ModelError(
            f"cannot load model {model!r}: {_first_line(error)}. Give a folder with config.json, "
            "weights and tokenizer, or a hub name that can be reached from here (offline, set "
            "HF_HUB_OFFLINE=1 and download it first)"
        ) from error
    except TypeError as error:
        raise ConfigError(f"vLLM refused an engine option: {_first_line(error)}") from error
    except refused as error:
        raise ModelError(
            f"vLLM cannot serve {model!r} with these options: {_first_line(error)}. Check the "
            "architecture and max_model_len, or try another model"
        ) from error
    except RuntimeError as error:
        if "bootstrapping phase" in str(error):
            # Said by multiprocessing in the engine's new process, which imports the script anew.
            # The script's own process learns no more than that the new one ended.
            raise EngineError(f"the engine's process imports your script: {_GUARD}") from error
        raise EngineError(
            f"the vLLM engine did not start: {_first_line(error)}. Its log above has the cause. "
            "Where memory ran out, lower max_model_len or gpu_memory_utilization (on a CPU: "
            f"VLLM_CPU_KVCACHE_SPACE). In a script, {_GUARD}"
        ) from error


@contextlib.contextmanager
def naming_death() -> Iterator[None]:
    """Turn vLLM's "engine is dead" into ours."""
    from vllm.v1.engine.exceptions import EngineDeadError as VllmDead
    from vllm.v1.engine.exceptions import EngineGenerateError

    try:
        yield
    except VllmDead as error:
        raise EngineDeadError(
            "the vLLM engine process has died (its log has the cause). Close this CacheBlend and "
            "make a new one; chunks in a file:// store are kept"
        ) from error
    except EngineGenerateError as error:
        raise EngineError(f"vLLM failed on this request: {_first_line(error)}") from error


@contextlib.contextmanager
def naming_refusals() -> Iterator[None]:
    """Turn what vLLM raises for a request it does not take into ours."""
    try:
        yield
    except CacheBlendError:
        raise
    except compat.refusals() as error:
        raise ConfigError(f"vLLM refused the request: {_first_line(error)}") from error


def failed(output: Any) -> bool:
    """Whether vLLM ended a request with an error, as this last output of it says."""
    return bool(output.finished) and output.outputs[0].finish_reason == "error"


def plan_name(request: EngineRequest) -> str:
    """By what name the workers know a request's blend; empty where it has none."""
    return str(((request.params or {}).get(PARAMS_KEY) or {}).get("request_id", ""))


def failure(causes: Iterable[str]) -> EngineError:
    """What to raise for a request that vLLM ended with an error; ``causes``: what workers say."""
    known = [cause for cause in causes if cause]
    if not known:
        return EngineError("vLLM ended this request with an error; its log has the cause")
    return EngineError(
        f"the engine could not compute this request: {known[0]}. Ask again; where memory ran out, "
        "lower gpu_memory_utilization or max_num_batched_tokens"
    )


def unwrap(results: Iterable[Any]) -> list[Any]:
    """Results of an RPC, one a rank; an error of ours that a worker met is raised here."""
    results = list(results)
    for result in results:
        if isinstance(result, dict) and WORKER_ERROR in result:
            raise getattr(errors, result[WORKER_ERROR])(result["message"])
    return results


def make_info(prepared: EngineSetup, config: Any, inspect: Callable[[], list[Any]]) -> EngineInfo:
    """Facts about the started engine, asking every rank to inspect its model."""
    model, scheduler = config.model_config, config.scheduler_config
    refusal = prepared.refusal or compat.engine_refusal(config)
    facts = [] if refusal else inspect()
    refusal = refusal or next((_why(*f["refusal"]) for f in facts if "refusal" in f), None)
    return EngineInfo(
        model=str(model.model),
        vllm_version=prepared.version,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(config.device_config.device_type),
        block_size=int(config.cache_config.block_size),
        max_model_len=int(model.max_model_len),
        max_num_batched_tokens=int(scheduler.max_num_batched_tokens),
        vocab_size=int(model.get_vocab_size()),
        fingerprint=_joint(f["fingerprint"] for f in facts),
        positions=min((f.get("positions", 0) for f in facts), default=0),
        refusal=refusal,
        kv_bytes_per_token=max((f.get("kv_bytes_per_token", 0) for f in facts), default=0),
        window=facts[0].get("window") if facts else None,
        longest_blend=facts[0].get("longest_blend") if facts else None,
        extra={
            name: [row for f in facts for row in f.get(name, [])]
            for name in ("checks", "attention")
        },
    )


def _why(reason: str, detail: str) -> Why:
    return Why(Reason(reason), detail)


def _joint(parts: Iterable[str]) -> str:
    """One fingerprint of those of the ranks; most are empty, see ``engine.fingerprint``."""
    return hashlib.sha256("/".join(filter(None, parts)).encode()).hexdigest()


def sampling_params(options: Mapping[str, Any], params: Mapping[str, Any] | None) -> Any:
    """vLLM's SamplingParams that streams deltas, with a plan inside.

    Raises:
        ConfigError: unknown name or refused value.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    values = dict(options)
    if params is not None:
        values["extra_args"] = {**(values.get("extra_args") or {}), "kv_transfer_params": params}
    try:
        if isinstance(values.get("structured_outputs"), Mapping):  # plain data: no vLLM to import
            values["structured_outputs"] = StructuredOutputsParams(**values["structured_outputs"])
        made = SamplingParams(output_kind=RequestOutputKind.DELTA, **values)
        _check_sent(values, made)
        return made
    except compat.refusals() as error:
        raise ConfigError(f"vLLM refused {_culprit(values)}: {_first_line(error)}") from error


def _culprit(values: Mapping[str, Any]) -> str:
    """The first of these that vLLM refuses alone: its message may not name it."""
    from vllm import SamplingParams

    refused: tuple[type[Exception], ...] = (ConfigError, *compat.refusals())
    for name, value in values.items():
        if name == "extra_args":  # has the plan, too
            continue
        if name == "structured_outputs" and isinstance(value, Mapping):  # it became none
            return name
        try:
            _check_sent({name: value}, SamplingParams(**{name: value}))
        except refused:
            return f"the sampling parameter {name}={value!r}"
    return "these sampling parameters together"


def _check_sent(values: Mapping[str, Any], params: Any) -> None:
    """Refuse what can't be sent to vLLM's core. Its front end takes values of any type, but a
    wrong one ends the thread of the core that reads requests: no later one would be answered.
    """
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    encoder = MsgpackEncoder()
    for name, value in values.items():
        try:
            encoder.encode(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name} can't be sent to vLLM: {_first_line(error)}. Pass plain numbers, texts, "
                "lists and dicts"
            ) from error
    MsgpackDecoder(type(params)).decode(encoder.encode(params))


def sampling_names() -> frozenset[str]:
    """Names of vLLM's sampling parameters that a caller may set."""
    from vllm import SamplingParams

    internal = {"output_kind", "skip_clone", "output_text_buffer_length"}
    return frozenset(
        name for name in SamplingParams.__struct_fields__ if not name.startswith("_")
    ) - frozenset(internal)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
