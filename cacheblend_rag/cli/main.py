"""Arguments to a command, its end to an exit code."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from cacheblend_rag._version import __version__
from cacheblend_rag.cli import (
    calibrate,
    capacity,
    demo,
    documents,
    evaluate,
    model,
    route,
    serve,
    store,
)
from cacheblend_rag.cli.base import INTERRUPTED, OUR_ERROR, Done, Screen
from cacheblend_rag.cli.output import nothing_else_on_stdout, quieten
from cacheblend_rag.cli.parser import Parser
from cacheblend_rag.errors import CacheBlendError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if (served := serve.is_asked(arguments)) is not None:
        return _served(served)
    args = _parser().parse_args(arguments)
    quieten()
    try:
        with nothing_else_on_stdout(args.json):
            note = Console(stderr=True)
            done: Done = args.run(args, Screen(note if args.json else Console(), note))
    except CacheBlendError as error:
        print(f"cacheblend: {error}", file=sys.stderr)
        return OUR_ERROR
    except KeyboardInterrupt:
        print("cacheblend: interrupted", file=sys.stderr)
        return INTERRUPTED
    if args.json:
        print(json.dumps(done.data, indent=2, ensure_ascii=False))
    return done.code


def _served(arguments: Sequence[str]) -> int:
    try:
        return serve.run(arguments)
    except CacheBlendError as error:
        print(f"cacheblend: {error}", file=sys.stderr)
        return OUR_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cacheblend",
        description="A shorter time to first token for RAG: the KV of documents is computed once, "
        "then blended into every prompt that contains them.",
    )
    parser.add_argument("--version", action="version", version=f"cacheblend-rag {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for family in (serve, route, capacity, documents, model, evaluate, calibrate, store, demo):
        family.add(commands)
    return parser
