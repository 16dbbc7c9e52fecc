"""vLLM's own ``serve`` command, called from ours. The ``vllm`` command of its CPU build does not
start.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from cacheblend_rag.engine import compat

PLUGIN = "cacheblend"  # the name of both of our entry points
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


def serve(arguments: Sequence[str]) -> None:
    """Run ``vllm serve`` with these arguments, until it is told to end.

    Raises:
        EngineMissingError: there is no vLLM that was tested.
        SystemExit: an argument is refused, or asks for help.
    """
    compat.installed_version()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    compat.cli_env_setup()()
    parser = FlexibleArgumentParser(prog="cacheblend")
    command: Any = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *arguments])
    configure = compat.configure_logging()
    if configure is not None:
        configure(args)
    command.validate(args)
    command.cmd(args)
