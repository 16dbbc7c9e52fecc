"""What every command needs: where text goes, how it ends, and kinds of arguments."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from cacheblend_rag.cli.parser import Parser
from cacheblend_rag.errors import StoreError
from cacheblend_rag.models import cache_home
from cacheblend_rag.store.tenants import tenant_id
from cacheblend_rag.store.url import parse_size, parse_url

OK, OUR_ERROR, REFUSED, INTERRUPTED = 0, 1, 3, 130  # argparse ends with 2


class Screen(NamedTuple):
    """Where text for people goes."""

    out: Console  # results
    note: Console  # progress


class Done(NamedTuple):
    """How a command ended, and what ``--json`` prints."""

    code: int
    data: Mapping[str, Any]


Run = Callable[[argparse.Namespace, Screen], Done]


def command(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    """A new command; every one has ``--json``."""
    parser: Parser = commands.add_parser(name, help=text, description=text)
    parser.refuses_rest = True
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)
    return parser


def add_store(parser: argparse.ArgumentParser) -> None:
    """``--store``, a folder."""
    default = cache_home() / "store"
    text = f"the store's folder ({default})"
    parser.add_argument("--store", type=folder, default=default, metavar="DIR", help=text)


def add_any_store(parser: argparse.ArgumentParser) -> None:
    """``--store``, a folder or the URL of another store."""
    default = cache_home() / "store"
    text = f"the store's folder ({default}), or the URL of a shared one, for --ray"
    parser.add_argument("--store", type=folder_or_url, default=default, metavar="DIR", help=text)


def add_namespace(parser: argparse.ArgumentParser, default: str | None = "") -> None:
    """``--namespace``, a tenant; None by default where a command is about all of them."""
    text = "whose documents and KV; tenants see nothing of each other"
    if default is None:
        text = "only what is of this tenant (all)"
    parser.add_argument("--namespace", default=default, metavar="NAME", help=text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """``--model``, the embedded one by default."""
    text = "a hub name or a folder (the embedded SmolLM2-135M-Instruct)"
    parser.add_argument("--model", metavar="M", help=text)


def _number(text: str, low: int) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= low:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {low} or more")


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    return _number(text, 1)


def at_least_32(text: str) -> int:
    """A whole number of 32 or more."""
    return _number(text, 32)  # shorter chunks are never reused


def share(text: str) -> float:
    """A number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a share; give a number from 0 to 1, such as 0.15"
    )


def size(text: str) -> int:
    """Bytes, of a text such as 512MiB."""
    try:
        return parse_size(text)
    except StoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def folder(text: str) -> Path:
    """The absolute path of a folder."""
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a folder; a store of this command is one"
        )
    return Path(text).expanduser().absolute()


def folder_or_url(text: str) -> Path | str:
    """The absolute path of a folder, or the URL of a store that is none."""
    if "://" not in text:
        return folder(text)
    try:
        url = parse_url(text)
    except StoreError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if url.scheme == "file":
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; give its plain path")
    return text


def index_of(store: Path, namespace: str | None = None) -> Path:
    """The folder of the FAISS index, in the store's folder; a tenant has its own."""
    suffix = f"-{tenant_id(namespace)}" if namespace else ""
    return store.with_name(f"{store.name}-index{suffix}")


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB"


def milliseconds(seconds: float) -> str:
    """A time for people."""
    return f"{seconds * 1000:.1f} ms"
