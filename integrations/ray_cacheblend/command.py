"""``cacheblend ingest --ray``: the entry point by which the command finds this package."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from cacheblend_rag import errors
from cacheblend_rag.errors import CacheBlendError, ConfigError, EngineError
from cacheblend_rag.ingest import IngestReport
from ray_cacheblend.extra import ray_module
from ray_cacheblend.ingestion import COUNTS, ingest

# Those of ours that take words only.
_BY_NAME = {
    kind.__name__: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CacheBlendError) and "__init__" not in vars(kind)
}
_OURS = re.compile(r"^cacheblend_rag\.errors\.(\w+): (.*)$", re.MULTILINE)  # of a traceback
_ADDRESS = re.compile(r"auto|(ray://)?[A-Za-z0-9._\-\[\]:]+:[0-9]+")
_CONNECT_S = 5.0
_NUMBER = "_cacheblend_number"  # column: which of the texts it is


def ingest_texts(
    texts: Sequence[str],
    documents: Sequence[str | None],
    *,
    address: str,
    workers: int,
    model: str,
    config: Mapping[str, Any],
    engine_args: Mapping[str, Any],
) -> IngestReport:
    """Ingest by workers on Ray.

    Args:
        texts, documents: one of each for each chunk.
        address: of a Ray cluster: ``host:port``, ``ray://host:port`` or ``auto``; ``local`` starts
            one on this machine, and ends it.
        workers: engines.
        model, config, engine_args: of each worker, see ``ingest``.

    Raises:
        MissingExtraError, ConfigError, ModelError, StoreError: as ``ingest`` does.
        EngineError: Ray or a worker failed.
    """
    start = time.perf_counter()
    gpus = _gpus_of_a_worker(engine_args)
    rows = [
        {_NUMBER: i, "text": text, "document": document}
        for i, (text, document) in enumerate(zip(texts, documents, strict=True))
    ]
    with _cluster(address, workers, gpus):
        data = ray_module("ray.data")
        done = ingest(
            data.from_items(rows),
            model,
            workers=workers,
            config=config,
            engine_args=engine_args,
            document="document",
            num_gpus=gpus,
        )
        batches = list(done.iter_batches(batch_format="numpy", batch_size=1024))
    return _report(batches, len(texts), time.perf_counter() - start)


def _report(batches: Sequence[Mapping[str, Any]], count: int, seconds: float) -> IngestReport:
    """One of all workers."""
    totals = dict.fromkeys(COUNTS, 0)
    keys, not_stored = [""] * count, dict[str, str]()
    for batch in batches:
        for name in COUNTS:
            totals[name] += int(batch[name].sum())
        for number, key, problem in zip(
            batch[_NUMBER], batch["key"], batch["problem"], strict=True
        ):
            keys[int(number)] = str(key)
            if problem:
                not_stored[str(key)] = str(problem)
    counted: dict[str, Any] = {**totals, "not_stored": not_stored}
    return IngestReport(seconds=seconds, keys=keys, **counted)


def _gpus_of_a_worker(engine_args: Mapping[str, Any]) -> int:
    import torch

    ranks = int(engine_args.get("tensor_parallel_size", 1))
    return ranks if torch.cuda.is_available() else 0


@contextmanager
def _cluster(address: str, workers: int, gpus: int) -> Iterator[None]:
    """Connected to Ray, whose failures are ours."""
    if address != "local" and not _ADDRESS.fullmatch(address):
        raise ConfigError(
            f"{address!r} is no address of a Ray cluster. Write --ray for workers on this machine, "
            "or --ray with host:port, ray://host:port or auto; paths come before it"
        )
    _check_answers(address)
    ray = ray_module()
    try:
        ray.init(address=address, log_to_driver=False, **_local(address, workers))
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise _absent(address, error) from error
    try:
        _check_room(ray.cluster_resources(), address, workers, gpus)
        yield
    except ray.exceptions.RayError as error:
        raise _cause(error) from error
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would go on trying for minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _absent(address, error) from error


def _absent(address: str, error: BaseException) -> EngineError:
    return EngineError(
        f"there is no Ray cluster at {address}: {error}. Start one there (ray start --head), or "
        "write --ray without an address for workers on this machine"
    )


def _local(address: str, workers: int) -> dict[str, Any]:
    if address != "local":
        return {}
    # As Ray counts: one for each worker, and some for the steps before them.
    cpus = max(os.cpu_count() or 1, workers + 2)
    return {"num_cpus": cpus, "include_dashboard": False}


def _check_room(has: Mapping[str, float], address: str, workers: int, gpus: int) -> None:
    """Ray would wait for what a machine does not have, without end."""
    if address == "local" and workers * gpus > has.get("GPU", 0):
        raise ConfigError(
            f"{workers} workers want {workers * gpus} GPUs, and this machine has "
            f"{has.get('GPU', 0):.0f}; ask for fewer --workers"
        )


def _cause(error: BaseException) -> CacheBlendError:
    """What a worker raised, if it is one of ours; else Ray's own words."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, CacheBlendError):
            return found
        found = getattr(found, "cause", None) or found.__cause__
    # Ray Data raises an error of its own from a worker's, and what an exception was raised from is
    # not pickled: only the words of the traceback come.
    for name, message in _OURS.findall(str(error)):
        if (kind := _BY_NAME.get(name)) is not None:
            return kind(message)
    return EngineError(f"a worker failed: {error}")
