"""The engine that commands start."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from cacheblend_rag import demo
from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.cli.base import Screen
from cacheblend_rag.cli.output import ENVIRONMENT, descriptor
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import EngineError, MissingExtraError
from cacheblend_rag.models import resolve_model

EXTRAS = {
    "faiss": "faiss-cpu",
    "langchain_text_splitters": "langchain-text-splitters",
    "sentence_transformers": "sentence-transformers",
}


@contextlib.contextmanager
def started(
    name: str | None,
    store: Path | None,
    screen: Screen,
    *,
    namespace: str = "",
    config: BlendConfig | None = None,
    **more: Any,
) -> Iterator[CacheBlend]:
    """The engine over a store in this folder, or in memory; closed at the end. ``config``, where
    given, names store and namespace itself. ``more``: engine arguments.
    """
    model = resolve_model(name)
    screen.note.print(f"Starting vLLM with {model} ...", highlight=False, soft_wrap=True)
    start = time.perf_counter()
    url = store.as_uri() if store else "memory://"
    config = config or BlendConfig(system_prompt=demo.SYSTEM_PROMPT, store=url, namespace=namespace)
    options = {**engine_args(name is None), **more}
    with tempfile.TemporaryFile() as log:
        try:
            with _errors_to(log, Path(model).is_dir()):
                blend = CacheBlend(model, config=config, engine="batch", **options)
            with blend as opened:
                took = time.perf_counter() - start
                screen.note.print(f"Ready after {took:.0f} s.", highlight=False)
                yield opened
        except EngineError:
            log.seek(0)
            screen.note.print(log.read().decode(errors="replace"), markup=False, highlight=False)
            raise


@contextlib.contextmanager
def _errors_to(log: IO[bytes], wanted: bool) -> Iterator[None]:
    """Send to ``log`` what is written to stderr meanwhile, and what processes started meanwhile
    ever write there. Not for a model from the hub: its download is worth watching.
    """
    if not wanted or os.environ["VLLM_LOGGING_LEVEL"] != ENVIRONMENT["VLLM_LOGGING_LEVEL"]:
        yield
        return
    with descriptor(2, log.fileno()):
        yield


def engine_args(embedded: bool) -> dict[str, Any]:
    """vLLM's, of a command's engine."""
    import torch

    args: dict[str, Any] = {"use_tqdm_on_load": not embedded}  # loaded before a bar can be read
    if not torch.cuda.is_available():
        # Small blocks leave less of a prompt's last chunk to compute; on a GPU they are small. A
        # worker of its own gets the OpenMP library that vLLM wants preloaded.
        args |= {"block_size": 32, "distributed_executor_backend": "mp"}
        if embedded:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return args


def require_extras() -> None:
    """Say what is missing before the engine is started in vain."""
    for module, package in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "cli")
