"""``serve``: vLLM's own server, whose answers are blended, with endpoints for ingestion."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from cacheblend_rag.cli.base import OK, Done, Screen, positive, share
from cacheblend_rag.cli.config_file import model_of, with_file
from cacheblend_rag.cli.parser import Parser
from cacheblend_rag.config import PREFIXES, BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.models import resolve_model
from cacheblend_rag.select import selectors
from cacheblend_rag.server.options import ServerOptions
from cacheblend_rag.store.url import parse_size, parse_url

WORKER = "cacheblend_rag.engine.worker.WorkerExtension"
_OURS_ALONE = ("--kv-transfer-config", "--worker-extension-cls")
_HYBRID = "--disable-hybrid-kv-cache-manager"  # vLLM's
_TEMPLATE, _ARGUMENTS = "--chat-template", "--default-chat-template-kwargs"  # vLLM's
# oneDNN prepares a program for each number of tokens that a step may have, a third of a MiB each,
# and would keep 1,024 of them: see docs/serving.md
_PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_SERVER = ("state", "tenants", "tenant_header", "max_body", "max_queued_tokens", "page")
_EPILOG = (
    "Every other option is one of vLLM's: cacheblend serve --help=vllm lists its groups, "
    "--help=all its options, --help=max-model-len one of them. A YAML file of --config FILE may "
    "have options of both."
)

_ABOUT: dict[str, Any] = {
    "usage": "cacheblend serve [MODEL] [options] [options of vllm serve]",
    "description": "vLLM's OpenAI-compatible server, with blending, and endpoints for ingestion "
    "under /v1/cacheblend. MODEL is a hub name or a folder; the embedded SmolLM2-135M-Instruct "
    "where it is left out.",
    "epilog": _EPILOG,
    "allow_abbrev": False,
}


class Command(NamedTuple):
    """A plain ``vllm serve``: what follows these words, and the variables that it needs."""

    arguments: list[str]
    environment: dict[str, str]

    def line(self) -> str:
        """For a shell."""
        set_first = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*set_first, "vllm serve", shlex.join(self.arguments)])


def add(commands: Any) -> None:
    """Add the command of this file. It takes arguments that only vLLM knows: see ``is_asked``."""
    about = {"help": "vLLM's OpenAI-compatible server with blending", **_ABOUT}
    parser = commands.add_parser("serve", **about)
    _fill(parser)
    parser.set_defaults(run=_never, json=False)


def _never(args: argparse.Namespace, screen: Screen) -> Done:
    raise AssertionError("main() calls run() instead")


def run(arguments: Sequence[str]) -> int:
    """The command, whose arguments argparse's own subcommands can't pass on.

    Raises:
        ConfigError: an option is wrong, or is for us to set.
    """
    parser = _parser()
    if arguments and arguments[0].startswith("--help="):
        return _vllm_help(arguments[0].partition("=")[2])
    args, theirs = with_file(parser, arguments)
    command = plain(args, theirs)
    if args.print_command:
        print(command.line())
        return OK
    if args.tenants:  # told at once, not after the model was loaded
        from cacheblend_rag.server.tenants import KeyFile

        KeyFile(args.tenants)
    _start(command, parser._option_string_actions)
    return OK


def plain(args: argparse.Namespace, theirs: Sequence[str]) -> Command:
    """The ``vllm serve`` that does the same.

    Args:
        args: our own options.
        theirs: what is left, for vLLM; without a ``--config``.
    """
    from cacheblend_rag.engine.launch import allowed_plugins

    _check(theirs)
    model, rest = model_of(theirs)
    embedded = _is_embedded(model, rest)
    options = _without(rest, "--no-enable-prompt-tokens-details")
    arguments = [
        *([] if model is None and not embedded else [resolve_model(model)]),
        *rest,
        *(["--served-model-name", "smollm2-135m-instruct"] if _unnamed(embedded, rest) else []),
        *([] if len(options) < len(rest) else ["--enable-prompt-tokens-details"]),
        *_by_device(rest),
        *_arguments(args, rest),
        *("--worker-extension-cls", WORKER),
        *("--kv-transfer-config", json.dumps(connector(args, rest))),
    ]
    environment = {"VLLM_PLUGINS": allowed_plugins(), **_environment(embedded)}
    return Command(arguments, environment)


def _check(theirs: Sequence[str]) -> None:
    """Raises:
    ConfigError: one of vLLM's options is for us to set, or is written so that we'd overlook it.
    """
    read = _read_here()
    for word in theirs:
        option = word.partition("=")[0].replace("_", "-")
        if not option.startswith("--"):
            continue
        if any(_means(option, ours) for ours in _OURS_ALONE):
            raise ConfigError(
                f"{option} is set by cacheblend serve; leave it out. To use other connectors with "
                "ours, start vllm serve yourself: --print-command shows what we would pass"
            )
        meant = [name for name in read if _begins(option, name)]
        if meant and option not in meant:
            raise ConfigError(f"write {option} in full, {' or '.join(meant)}: we read it too")


def _read_here() -> list[str]:
    """vLLM's options that change what we pass. vLLM takes their beginnings for them."""
    from cacheblend_rag.engine.start import GRAPH_OPTIONS

    switches = ["--enforce-eager", "--enable-prompt-tokens-details", _HYBRID]
    named = [f"--{name.replace('_', '-')}" for name in GRAPH_OPTIONS]
    others = [_TEMPLATE, _ARGUMENTS, "--block-size", "--served-model-name", "--model", "--config"]
    negated = [f"--no-{name.removeprefix('--')}" for name in switches]
    return sorted({*switches, *negated, *named, *others})


def connector(args: argparse.Namespace, rest: Sequence[str] = ()) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config``, our options in it.

    Args:
        args: our own options.
        rest: vLLM's. What they say of chat prompts holds for the prefix of chunks too.

    Raises:
        ConfigError: one is refused.
    """
    from cacheblend_rag.engine.start import connector_name

    given = {name: value for name, value in vars(args).items() if value is not None}
    ours = {name: given[name] for name in _CONFIG if name in given}
    if "store" in ours and parse_url(ours["store"]).scheme == "file" and "://" not in ours["store"]:
        path, *options = ours["store"].split("?", 1)
        ours["store"] = "?".join([os.path.abspath(os.path.expanduser(path)), *options])
    if _has_parts(rest, _ARGUMENTS):
        raise ConfigError(
            f"give {_ARGUMENTS} as one JSON object, not in parts: it is for the prefix of chunks "
            "too, which we read it for"
        )
    if "chat_template_kwargs" not in ours and (theirs := _value(rest, _ARGUMENTS)):
        try:
            ours["chat_template_kwargs"] = _table(theirs)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"{_ARGUMENTS}: {error}") from error
    BlendConfig(**ours)
    server = {name: given[name] for name in _SERVER if name in given}
    if template := _value(rest, _TEMPLATE):
        path = os.path.abspath(os.path.expanduser(template))
        server["chat_template"] = path if os.path.exists(path) else template
    for name in ("state", "tenants"):
        if name in server:
            server[name] = os.path.abspath(os.path.expanduser(server[name]))
    extra = ours | ({"server": server} if ServerOptions.of(server).to_plain() else {})
    return {
        "kv_connector": connector_name(hybrid=_has(rest, f"--no-{_HYBRID.removeprefix('--')}")),
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }


def _arguments(args: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Arguments of the chat template, for vLLM's own endpoints."""
    if args.chat_template_kwargs is None:
        return []
    if any(word.replace("_", "-").startswith(_ARGUMENTS) for word in rest):
        raise ConfigError(
            f"--chat-template-kwargs and {_ARGUMENTS} are the same here; give one of them"
        )
    return [_ARGUMENTS, json.dumps(args.chat_template_kwargs)]


def _value(words: Sequence[str], option: str) -> str | None:
    """What vLLM's option is set to among ``words``; None: nothing."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        name, has_value, value = word.partition("=")
        if name.replace("_", "-") == option:
            found = value if has_value else following
    return found


def _means(option: str, ours: str) -> bool:
    """Whether vLLM would read ``option`` as ``ours``: a part of its name, or of its table."""
    return _begins(option, ours) or option.startswith(f"{ours}.")


def _begins(option: str, name: str) -> bool:
    """Whether ``option`` is long enough to be the option ``name``, or its beginning."""
    return len(option) > 5 and name.startswith(option)


def _is_embedded(model: str | None, rest: Sequence[str]) -> bool:
    return model is None and not _has(rest, "--model")


def _unnamed(embedded: bool, rest: Sequence[str]) -> bool:
    return embedded and not _has(rest, "--served-model-name")


def _has(words: Sequence[str], *options: str) -> bool:
    return any(word.partition("=")[0].replace("_", "-") in options for word in words)


def _has_parts(words: Sequence[str], option: str) -> bool:
    """Whether a table of vLLM's is given as ``--table.key value``."""
    return any(word.replace("_", "-").startswith(f"{option}.") for word in words)


def _without(words: Sequence[str], option: str) -> list[str]:
    return [word for word in words if word.replace("_", "-") != option]


def _by_device(rest: Sequence[str]) -> list[str]:
    """What a CPU needs: compiling takes a compiler and half a minute; small blocks leave less of a
    prompt's last chunk to compute. On a GPU, CUDA graphs for steps as large as a blend's.
    """
    import torch

    from cacheblend_rag.engine.start import GRAPH_OPTIONS, graph_sizes

    if torch.cuda.is_available():
        options = [f"--{name.replace('_', '-')}" for name in GRAPH_OPTIONS]
        # ``--compilation-config.mode`` and the like, and the short ``-O2`` and ``-cc``.
        words = [word.partition(".")[0] for word in rest]
        if _has(words, *options, "--no-enforce-eager") or any(
            word.startswith(("-O", "-cc", "-sc")) for word in rest
        ):
            return []
        return ["--cudagraph-capture-sizes", *map(str, graph_sizes())]
    eager = [] if _has(rest, "--enforce-eager", "--no-enforce-eager") else ["--enforce-eager"]
    blocks = [] if _has(rest, "--block-size") else ["--block-size", "32"]
    return [*eager, *blocks]


def _environment(embedded: bool) -> dict[str, str]:
    found = {"VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1")}
    import torch

    if not torch.cuda.is_available():
        cache = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1" if embedded else "4")
        found["VLLM_CPU_KVCACHE_SPACE"] = cache
        found |= {_PRIMITIVES: os.environ.get(_PRIMITIVES, "256")}
    return found


def _start(command: Command, known: Collection[str]) -> None:
    from cacheblend_rag.engine.launch import has_plugins, serve

    if not has_plugins():
        raise ConfigError(
            "vLLM does not find the plugins of cacheblend-rag, which it looks up among installed "
            "packages. Install it anew: pip install cacheblend-rag (in a clone: make install)"
        )
    os.environ.update(command.environment)
    serve(command.arguments, known)


def _vllm_help(what: str) -> int:
    from cacheblend_rag.engine.launch import serve

    serve(["--help" if what == "vllm" else f"--help={what}"])
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cacheblend serve", **_ABOUT)
    _fill(parser)
    return parser


def _fill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--print-command", action="store_true", help="print the vllm serve line that does the same"
    )
    _add_config(parser.add_argument_group("blending"))
    _add_server(parser.add_argument_group("server"))


def _add_config(group: Any) -> None:
    for name, (kind, about) in _CONFIG.items():
        choices = kind if isinstance(kind, tuple) else None
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=str if choices else kind,
            choices=choices,
            metavar=None if choices else about.partition(":")[0],
            help=about.partition(":")[2],
        )


def _add_server(group: Any) -> None:
    group.add_argument(
        "--state", metavar="DIR", help="folder where ingestions are kept (the store's)"
    )
    group.add_argument("--tenants", metavar="FILE", help="TOML: a namespace for each API key")
    group.add_argument(
        "--tenant-header", metavar="NAME", help="header in which a trusted proxy names the tenant"
    )
    group.add_argument(
        "--page", action="store_true", default=None, help="have a page at / to try the server with"
    )
    group.add_argument(
        "--max-body",
        type=_size,
        metavar="SIZE",
        help="most bytes of a request to our endpoints (64MiB)",
    )
    group.add_argument(
        "--max-queued-tokens",
        type=positive,
        metavar="N",
        help="tokens of texts that may wait to be ingested (50000000)",
    )


def _size(text: str) -> int:
    return parse_size(text)


def _table(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"window": 33}}')
    return found


def _ratio(text: str) -> float | str:
    return text if text == "auto" else share(text)


def _refine(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _prefix(text: str) -> Any:
    if text in PREFIXES:
        return text
    words = text.strip("[]").replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        known = ", ".join(PREFIXES)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}, nor a list of token ids")
    return [int(word) for word in words]


_CONFIG: dict[str, tuple[Any, str]] = {
    "store": (str, "URL:of the chunk store, or a folder (in memory)"),
    "namespace": (str, "NAME:whose chunks these are"),
    "mode": (("blend", "reuse", "full", "off"), ":of requests that name none (blend)"),
    "recompute_ratio": (_ratio, "R:share of the reused tokens to recompute, or auto (0.15)"),
    "selector": (tuple(sorted(selectors())), ":which tokens are recomputed (query)"),
    "selector_options": (_table, "JSON:the selector's own options"),
    "propagation_length": (int, "N:tokens around a recomputed one that are corrected (64)"),
    "calibration": (str, "FILE:that cacheblend calibrate wrote, for the ratio auto"),
    "min_chunk_tokens": (int, "N:shorter chunks are not reused (32)"),
    "ingest_prefix": (_prefix, "KIND:what is put before a chunk while its KV is computed (auto)"),
    "system_prompt": (str, "TEXT:the one that your requests use"),
    "likely_system_prompt": (str, "TEXT:the one that your requests probably use"),
    "chat_template_kwargs": (_table, "JSON:arguments of the chat template"),
    "blend_if": (("faster", "always"), ":blend where it is faster, or always (faster)"),
    "refine": (_refine, "N:tokens of a blend computed again with each step, idle or off (off)"),
    "gpu_cache": (str, "SIZE:GPU memory for chunks that are used often"),
    "learn": (("off", "memory", "store"), ":compute text that comes again in prompts (off)"),
    "learn_options": (_table, "JSON:how much is learnt, and for how long"),
    "shadow": (
        share,
        "S:share of blended answers that are computed again, exactly (0)",
    ),
    "shadow_options": (_table, "JSON:how these are drawn and bounded"),
    "changed_allowed": (share, "S:of answers, what the ratio auto keeps with --shadow (0.05)"),
    "template": (str, "NAME:of the prompt template, in metrics"),
}


def is_asked(arguments: Sequence[str] | None) -> list[str] | None:
    """The arguments of this command, if it is the one that is asked for."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return given[1:] if given[:1] == ["serve"] else None
