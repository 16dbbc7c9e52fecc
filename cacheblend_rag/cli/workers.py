"""``ingest`` by workers of a cluster: what the command does itself, and who does the rest."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from cacheblend_rag import demo
from cacheblend_rag.cli.base import Screen, positive
from cacheblend_rag.cli.engine import engine_args
from cacheblend_rag.client.remote import plain_config
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import CacheBlendError, ConfigError, ModelError
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.models import resolve_model
from cacheblend_rag.retrieval import Document, Passage, split

GROUP = "cacheblend_rag.workers"  # entry points: what a cluster is called, and a function
_LOCAL = "local"


def add_workers(parser: argparse.ArgumentParser) -> None:
    """``--ray`` and ``--workers``."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const=_LOCAL,
        metavar="ADDRESS",
        help="by workers on Ray: of this machine, or of the cluster at this address",
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="engines that --ray starts (1)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what has no effect without ``--ray``.

    Raises:
        ConfigError: that was given.
    """
    if args.ray is not None:
        return
    if args.workers is not None:
        raise ConfigError("--workers is for --ray; add it, or leave --workers out")
    if not isinstance(args.store, Path):
        raise ConfigError(
            f"{args.store} is no folder, and only workers of --ray share such a store: add --ray, "
            "or name a folder"
        )


def by_workers(
    args: argparse.Namespace, documents: Sequence[Document], screen: Screen
) -> tuple[list[Passage], IngestReport]:
    """Passages of documents, and what the workers say of them.

    Raises:
        CacheBlendError: an option is refused, or a worker failed.
    """
    ingest_texts = _function("ray")
    model, folder = resolve_model(args.model), isinstance(args.store, Path)
    config = BlendConfig(
        system_prompt=demo.SYSTEM_PROMPT,
        store=args.store.as_uri() if folder else args.store,
        namespace=args.namespace,
    )
    passages = split(documents, args.chunk_tokens, _tokenizer(model))
    count = args.workers or 1
    where = "on this machine" if args.ray == _LOCAL else f"at {args.ray}"
    screen.note.print(f"Starting {count} workers on Ray, {where} ...", highlight=False)
    report = ingest_texts(
        [passage.text for passage in passages],
        # of a folder's documents, the command keeps the register
        [None if folder else passage.source for passage in passages],
        address=args.ray,
        workers=count,
        model=model,
        config=plain_config(config),
        engine_args=engine_args(args.model is None),
    )
    return passages, report


def _function(name: str) -> Callable[..., IngestReport]:
    """What another package brings: this one imports no integration.

    Raises:
        ConfigError: nothing is installed by this name.
    """
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise ConfigError(
            f"the workers of --{name} come with cacheblend-rag, which is not installed as it is "
            "now. Install it anew: pip install 'cacheblend-rag[ray]' (in a clone: make install)"
        )
    try:
        load: Callable[..., IngestReport] = found[0].load()
    except CacheBlendError:
        raise
    except ImportError as error:
        raise ConfigError(f"{found[0].value} can't be imported: {error}") from error
    return load


def _tokenizer(model: str) -> Any:
    """That of a model, without an engine."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"the tokenizer of {model} can't be loaded: {error}") from error
