"""Ingestion as a step of a Ray Data pipeline: texts in, keys and counts out.

A worker is an actor that keeps its engine, or its connection to a server. Where one dies, Ray
starts another one and gives it the same rows again. What is stored by then costs a look-up.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.client.remote import plain_config
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ConfigError, EngineDeadError, ModelError
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.models import resolve_model
from cacheblend_rag.store.url import parse_url
from ray_cacheblend.extra import ray_module

Batch = Mapping[str, Any]  # of Ray's: an array for each column

COUNTS = (
    "chunks",
    "computed",
    "present",
    "repeated",
    "too_short",
    "too_long",
    "not_stored",
    "tokens",
    "bytes",
)
_GROUP = "_cacheblend_group"
_BLOCKS_A_WORKER = 16  # what a worker that dies has to do again is at most one of them


class Step(ABC):
    """A callable class for ``Dataset.map_batches``.

    Of each row it drops the text and adds these columns:

    - ``key``: the chunk's; empty where the text is too short or too long to be reused.
    - ``problem``: why a chunk that was computed was not stored; empty where it was.
    - what ``cacheblend_rag.IngestReport`` counts (``COUNTS``). The first row of a batch has the
      counts of its batch and the others have 0, so sums are right.

    Args:
        text: column of the texts, or of their token ids.
        document: column of the documents that they belong to; None: they belong to none.
        left_context: column of what stands before each in its document; None: not known.
    """

    def __init__(self, text: str, document: str | None, left_context: str | None) -> None:
        self._text, self._document, self._left_context = text, document, left_context
        self._blend = self._opened()

    @abstractmethod
    def _open(self) -> CacheBlend:
        """What ingests."""

    def _opened(self) -> CacheBlend:
        blend = self._open()
        check = blend.model_check
        if not check.passed:
            blend.close()
            raise ModelError(f"nothing can be ingested: {check.detail}")
        return blend

    def __call__(self, batch: Batch) -> dict[str, Any]:
        """Ingest a batch.

        Raises:
            ConfigError: a column is missing, or is there already.
            CacheBlendError: as ``CacheBlend.ingest`` does.
        """
        columns = self._checked(batch)
        texts = [_plain(text) for text in batch[self._text]]
        return {**columns, **_columns(self._ingested(texts, batch), len(texts))}

    def _checked(self, batch: Batch) -> dict[str, Any]:
        """The columns that stay."""
        named = (self._text, self._document, self._left_context)
        missing = [name for name in named if name is not None and name not in batch]
        if missing:
            raise ConfigError(
                f"the data set has no column {', '.join(missing)}; it has {', '.join(batch)}. Name "
                "the columns by text=, document= and left_context="
            )
        stays = {n: v for n, v in batch.items() if n not in (self._text, _GROUP)}
        if taken := sorted(stays.keys() & {"key", "problem", *COUNTS}):
            raise ConfigError(
                f"the data set has a column {', '.join(taken)}, which an ingestion adds; rename it "
                "first: Dataset.rename_columns"
            )
        return stays

    def _ingested(self, texts: Sequence[Any], batch: Batch) -> IngestReport:
        documents = None if self._document is None else list(map(_name, batch[self._document]))
        before = None if self._left_context is None else batch[self._left_context]
        contexts = None if before is None else [_plain(context) for context in before]
        options: dict[str, Any] = {"documents": documents, "left_context": contexts}
        try:
            report = self._blend.ingest(texts, progress=False, **options)
        except EngineDeadError:
            # The engine's process ended and this one did not. A second time is no accident.
            self._blend.close()
            self._blend = self._opened()
            report = self._blend.ingest(texts, progress=False, **options)
        if report.reason:  # since the worker started
            raise ModelError(f"nothing is ingested any more: {report.detail}")
        return report


class Ingestor(Step):
    """Has an engine of its own, over a store that others share.

    Args:
        model: hub name or folder.
        config: fields of ``BlendConfig``.
        engine_args: vLLM's engine arguments.
        text, document, left_context: columns, see ``Step``.
    """

    def __init__(
        self,
        model: str,
        *,
        config: Mapping[str, Any] | None = None,
        engine_args: Mapping[str, Any] | None = None,
        text: str = "text",
        document: str | None = None,
        left_context: str | None = None,
    ) -> None:
        # The engine in this process: with the actor ends all of it, and another one finds its GPU
        # free. Several workers of a machine share its cores.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self._model, self._engine_args = model, dict(engine_args or {})
        self._config = BlendConfig.of(dict(config or {}), "config")
        super().__init__(text, document, left_context)

    def _open(self) -> CacheBlend:
        return CacheBlend(self._model, config=self._config, engine="batch", **self._engine_args)


class HttpIngestor(Step):
    """Has the chunks computed by a server, or by whatever stands before a fleet of them.

    Args:
        url: of ``cacheblend serve``, or of ``ray_cacheblend.serving.build_app``.
        options: others of ``CacheBlend.connect``, such as ``api_key``.
        text, document, left_context: columns, see ``Step``.
    """

    def __init__(
        self,
        url: str,
        *,
        options: Mapping[str, Any] | None = None,
        text: str = "text",
        document: str | None = None,
        left_context: str | None = None,
    ) -> None:
        self._url, self._options = url, dict(options or {})
        super().__init__(text, document, left_context)

    def _open(self) -> CacheBlend:
        return CacheBlend.connect(self._url, **self._options)


def ingest(
    dataset: Any,
    model: str | None = None,
    *,
    url: str | None = None,
    workers: int = 1,
    config: BlendConfig | Mapping[str, Any] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    connect: Mapping[str, Any] | None = None,
    text: str = "text",
    document: str | None = None,
    left_context: str | None = None,
    batch_size: int = 64,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **ray_remote_args: Any,
) -> Any:
    """Have the texts of a ``ray.data.Dataset`` ingested. Lazy as all of Ray Data: it runs when the
    result is used. Rows of equal text go to one worker, so each chunk is computed once.

    Args:
        dataset: Ray's.
        model: hub name or folder, for workers with an engine each.
        url: of a server that computes, in place of ``model``.
        workers: actors.
        config: of ``model``; its store is one that all workers and servers reach.
        engine_args: vLLM's, of ``model``. A worker of tensor parallel size n wants n GPUs.
        connect: options of ``CacheBlend.connect``, of ``url``.
        text, document, left_context: columns, see ``Step``.
        batch_size: texts that a worker is given at once.
        num_cpus, num_gpus: of a worker, as Ray counts them.
        **ray_remote_args: others of ``Dataset.map_batches``, such as ``runtime_env``.

    Returns:
        Another ``Dataset``, with the columns that ``Step`` describes.

    Raises:
        MissingExtraError: there is no Ray.
        ConfigError, ModelError, StoreError: an option is refused, before anything runs.
    """
    data = ray_module("ray.data")
    columns = {"text": text, "document": document, "left_context": left_context}
    step, arguments = _step(model, url, config, engine_args, connect)
    for name, count in (("workers", workers), ("batch_size", batch_size)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"{name} is {count!r}; it must be a whole number of 1 or more")
    grouped = dataset.map_batches(
        _with_group, fn_kwargs={"text": text}, batch_format="numpy", batch_size=1024
    ).repartition(workers * _BLOCKS_A_WORKER, keys=[_GROUP])
    return grouped.map_batches(
        step,
        fn_constructor_kwargs={**arguments, **columns},
        compute=data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        batch_format="numpy",
        batch_size=batch_size,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        **ray_remote_args,
    )


def totals(dataset: Any) -> dict[str, int]:
    """The counts of an ingestion, summed over its rows. Runs it where it has not run."""
    found = dict.fromkeys(COUNTS, 0)
    # Ray's own sum is a shuffle, whose tasks take longer to start than the numbers to come here.
    for batch in dataset.select_columns(list(COUNTS)).iter_batches(batch_format="numpy"):
        for name in COUNTS:
            found[name] += int(batch[name].sum())
    return found


def _step(
    model: str | None,
    url: str | None,
    config: BlendConfig | Mapping[str, Any] | None,
    engine_args: Mapping[str, Any] | None,
    connect: Mapping[str, Any] | None,
) -> tuple[type[Step], dict[str, Any]]:
    """The class of the workers and what they are made with, checked here: what an actor raises
    when it starts, Ray shows among much else.
    """
    if (model is None) == (url is None):
        raise ConfigError("give a model, for workers with engines, or the url of a server: one")
    if url is not None:
        if config is not None or engine_args:
            raise ConfigError(
                "config and engine_args are those of the server at url; leave them out"
            )
        return HttpIngestor, {"url": url, "options": dict(connect or {})}
    if connect:
        raise ConfigError("connect is for the server at url; leave it out, or give url")
    if not isinstance(config, BlendConfig):
        config = BlendConfig.of(dict(config or {}), "config")
    scheme = parse_url(config.store).scheme
    if scheme in ("memory", "null"):
        raise ConfigError(
            f"the store is {scheme}://, which ends with each worker: name one that is shared, such "
            "as redis://host:6379/0, s3://bucket/path or a folder that all machines have"
        )
    assert model is not None
    named = {"model": resolve_model(model), "config": plain_config(config)}
    return Ingestor, {**named, "engine_args": dict(engine_args or {})}


def _with_group(batch: Batch, text: str) -> dict[str, Any]:
    """With a number that equal texts share."""
    if text not in batch:
        raise ConfigError(f"the data set has no column {text}; it has {', '.join(batch)}")
    groups = [_digest(_plain(row)) for row in batch[text]]
    return {**batch, _GROUP: np.array(groups, dtype=np.int64)}


def _digest(text: Any) -> int:
    whole = text if isinstance(text, str) else repr(text)
    digest = hashlib.blake2b(whole.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def _plain(text: Any) -> Any:
    """A text, token ids or None, without NumPy; of what else there is, ``ingest`` complains."""
    return text.tolist() if isinstance(text, np.ndarray | np.generic) else text


def _name(document: Any) -> Any:
    """Of a document; None where the row has none."""
    document = _plain(document)
    return None if isinstance(document, float) and document != document else document


def _columns(report: IngestReport, rows: int) -> dict[str, Any]:
    counts = {name: getattr(report, name) for name in COUNTS}
    counts["not_stored"] = len(report.not_stored)
    found: dict[str, Any] = {
        "key": np.array(report.keys, dtype=object),
        "problem": np.array([report.not_stored.get(k, "") for k in report.keys], dtype=object),
    }
    for name, count in counts.items():
        found[name] = np.zeros(rows, dtype=np.int64)
        found[name][:1] = count
    return found
