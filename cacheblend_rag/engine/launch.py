"""vLLM's own ``serve`` command, called from ours. The ``vllm`` command of its CPU build does not
start.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.start import naming_failures
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.options import unknown_option
from cacheblend_rag.server.options import SERVER, ServerOptions

PLUGIN = "cacheblend"  # the name of both of our entry points
logger = logging.getLogger("vllm.cacheblend_rag")
_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
    "vllm.logits_processors",
)


def allowed_plugins() -> str:
    """``VLLM_PLUGINS`` with ours in it. It is a list of what is loaded: where it is not set, all
    plugins are that add no endpoints, so these are named too.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is None:
        names = [found.name for group in _GROUPS for found in entry_points(group=group)]
    else:
        names = [name for name in given.split(",") if name]
    return ",".join(dict.fromkeys([*names, PLUGIN]))


def has_plugins() -> bool:
    """Whether vLLM finds ours: it does where this package is installed."""
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    return all(PLUGIN in entry_points(group=group).names for group in groups)


def serve(arguments: Sequence[str], known: Collection[str] = ()) -> None:
    """Run ``vllm serve`` with these arguments, until it has to end.

    Args:
        known: options that are not vLLM's, one of which may be meant.

    Raises:
        EngineMissingError: there is no vLLM that was tested.
        ConfigError: there is no such option.
        SystemExit: an argument is refused, or asks for help.
    """
    command, parser, _ = _parsers(known)
    args = parser.parse_args(["serve", *arguments])
    configure = compat.configure_logging()
    if configure is not None:
        configure(args)
    # Before our own look at the model: a wrong option should be told at once, not after a download.
    command.validate(args)
    without_what_the_model_refuses(args)
    command.cmd(args)


def config_words(path: str) -> list[str]:
    """A file of vLLM's ``--config`` as words of its command line, by vLLM's own reader.

    Raises:
        EngineMissingError: there is no vLLM that was tested.
        ConfigError: the file can't be read, or is no table of options.
    """
    *_, options = _parsers()
    import yaml

    try:
        # Its subcommand's parser: only that one knows the options that end in --no-...
        words: list[str] = options.load_config_file(path)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"--config {path}: it can't be read ({type(error).__name__}: {error}). It must be a "
            "file .yaml or .yml with a line for each option, such as block-size: 16"
        ) from error
    return words


def _parsers(known: Collection[str] = ()) -> tuple[Any, Any, Any]:
    """vLLM's ``serve``, the parser of its command line, and the one of this command within it."""
    compat.installed_version()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # As the command does before it imports anything else: processes started later see it.
    compat.cli_env_setup()()

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            if left := re.search(r"unrecognized arguments: (--[^\s=]+)", message):
                names = {*known, *options._option_string_actions}
                raise unknown_option(left[1], names, "cacheblend serve")
            super().error(message)
            raise AssertionError("it ends the process")

    parser = Parser(prog="cacheblend")
    command: Any = ServeSubcommand()
    options = command.subparser_init(parser.add_subparsers(dest="subparser"))
    return command, parser, options


def _ours(extra: Mapping[str, Any]) -> list[str]:
    """Our options in a connector's extra config, as they are given to the command."""
    server = {name for name in extra.get(SERVER, {}) if name != "chat_template"}  # vLLM's own
    return [f"--{name.replace('_', '-')}" for name in sorted(extra.keys() - {SERVER} | server)]


def without_what_the_model_refuses(args: Any) -> None:
    """Serve a model that can't be blended without our connector: some can't start with one.

    Args:
        args: vLLM's, parsed; changed.

    Raises:
        ConfigError: there are tenants, whom only our endpoints keep apart.
        ModelError: the model can't be found or loaded.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    model = args.model = getattr(args, "model_tag", None) or args.model  # as the command does
    with naming_failures(model):
        config = AsyncEngineArgs.from_cli_args(args).create_model_config()
        refusal = compat.model_refusal(config)
    if refusal is None:
        return
    extra = getattr(args.kv_transfer_config, "kv_connector_extra_config", {})
    if ServerOptions.of(extra.get(SERVER, {})).has_tenants:
        raise ConfigError(
            f"{model} can't be blended ({refusal.detail}), and is then served by vLLM alone, which "
            "knows no tenants: leave --tenants and --tenant-header out, or take another model"
        )
    logger.warning("%s is served without blending: %s", model, refusal.detail)
    if given := _ours(extra):
        logger.warning("it is served by vLLM alone, so %s has no effect", ", ".join(given))
    args.kv_transfer_config, args.worker_extension_cls = None, ""
