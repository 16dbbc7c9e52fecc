"""The front door over the engine of a server: what the endpoints do, in other threads than the
event loop's.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from cacheblend_rag import __version__
from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engine.client import ClientEngine
from cacheblend_rag.errors import CacheBlendError, StoreError
from cacheblend_rag.front.learning import LearntIngestion
from cacheblend_rag.front.shadowing import Shadowing
from cacheblend_rag.ingest import IngestReport, naming
from cacheblend_rag.learn import LearnOptions
from cacheblend_rag.report import make_report
from cacheblend_rag.server.bodies import Given, Text
from cacheblend_rag.server.errors import NoStoreError
from cacheblend_rag.store.tenants import documents_of
from cacheblend_rag.store.url import redacted

logger = logging.getLogger("vllm.cacheblend_rag")
_LISTS_S = 2.0  # that a tenant's first request waits for a listing of the store


class Front(CacheBlend):
    """``CacheBlend`` of one namespace, in the key space that the server's requests are planned in.

    Attributes:
        is_tenant: it shares the engine with others, and sees what is its own only.
    """

    is_tenant = False
    _engine: ClientEngine

    @classmethod
    def of(cls, engine: ClientEngine, config: BlendConfig) -> Front:
        """That of the server's own namespace."""
        has_scheduler = bool(engine.state["has_scheduler"])
        return cls.from_engine(
            engine, config, engine.model_check(), engine.space, has_scheduler=has_scheduler
        )

    def tenant(self, config: BlendConfig, space: str) -> Front:
        """That of another namespace, whose requests name this space."""
        other = self.with_config(config, space=space)
        other.is_tenant, other._documents = True, documents_of(config.namespace)
        return other

    def _list_stored(self) -> None:
        """For a tenant, whose first request should not wait for as long as all that is stored may
        take. Where that is much, its requests find their chunks some seconds later.
        """
        thread = threading.Thread(target=self._list_all, name="cacheblend-list", daemon=True)
        thread.start()
        thread.join(_LISTS_S)

    def _list_all(self) -> None:
        try:
            super()._list_stored()
        except CacheBlendError as error:  # a store that is away is listed when it is back
            logger.warning("a tenant's stored chunks could not be listed: %s", error)

    def look(self) -> None:
        """Ask the engine anew whether it blends."""
        self.model_check = self._engine.model_check()

    @property
    def is_over(self) -> bool:
        """Whether the engine ends, or has ended."""
        return self._engine.is_dead

    def _has_store(self) -> bool:
        """True: blending may be off beside an open store, whose chunks can be listed and forgotten.

        Raises:
            NoStoreError: it is not open. "Nothing is there" would be wrong.
        """
        if not self._engine.state["is_open"] or self._engine.space is None:
            raise NoStoreError(
                "this server has not opened its store, as it does not blend: "
                f"{self.model_check.detail}. What the store holds stays, and a server that blends "
                "will find it"
            )
        return True

    def batch_tokens(self) -> int:
        """Of the next batch of an ingestion."""
        return self._engine.pace.tokens(self.info.max_num_batched_tokens)

    def check_ids(self, chunks: Sequence[Given]) -> None:
        """Raise PromptError where a chunk has a token id that the model has not."""
        for number, chunk in enumerate(chunks):
            for ids in (chunk.text, chunk.left_context):
                if ids and not isinstance(ids, str):
                    with naming(f"chunks[{number}]"):
                        self._check_vocabulary(ids)

    def ingest_given(self, batch: Sequence[Given]) -> IngestReport:
        """Compute and store chunks between the steps of answers.

        Raises:
            UnavailableError: the store can't be asked, so some were not stored.
        """
        contexts = [chunk.left_context for chunk in batch]
        left_context = contexts if any(context is not None for context in contexts) else None
        with self._engine.slicing():
            report = self.ingest(
                [chunk.text for chunk in batch],
                left_context=left_context,
                documents=[chunk.document for chunk in batch],
                progress=False,
            )
        if report.not_stored:
            # A store that is away keeps nothing, and says so as one that has no room does. But
            # that may pass, so the caller should try again. It fails here.
            self._ask_stores("cacheblend_contains", next(iter(report.not_stored)))
        return report

    def learnt_ingestion(self) -> LearntIngestion | None:
        """What has computed what the engine learns; None where it learns nothing."""
        if self.config.learn == "off" or not self.model_check.passed:
            return None
        return LearntIngestion(
            self._engine,
            LearnOptions.of(self.config.learn_options),
            min(self.info.max_model_len, self._positions),
            self.info.max_num_batched_tokens,
            self._sync,
        )

    def shadowing(self) -> Shadowing | None:
        """What has answers computed again; None where none are drawn."""
        if not self.config.shadow or not self.model_check.passed:
            return None
        return Shadowing(self._engine.rpc, lambda: self._engine.asked)

    def replace_document(self, name: str, keys: Iterable[str]) -> int:
        """Have a document consist of these chunks only; returns how many were forgotten."""
        known = set(keys)
        self._has_store()
        self.register_documents({name: sorted(known)})
        held = self._engine.rpc("cacheblend_document_keys", self._documents + name)
        gone = set(itertools.chain.from_iterable(held)) - known
        return self.forget_documents([name], only=gone) if gone else 0

    def page(self, after: str, limit: int, document: str | None) -> list[str]:
        """Keys of stored chunks in order, behind ``after``."""
        self._has_store()
        name = None if document is None else self._documents + document
        pages = self._stored_pages(after, limit, name)
        return list(itertools.islice(itertools.chain.from_iterable(pages), limit))

    def count(self) -> int:
        """How many chunks are stored."""
        self._has_store()
        return int(min(self._ask_stores("cacheblend_count", self._space.to_plain())))

    def owned(self, keys: Sequence[str]) -> list[str]:
        """Those of ``keys`` that are this namespace's: all where nobody shares the store."""
        self._has_store()
        if not self.is_tenant:
            return list(keys)
        ranks = self._ask_stores("cacheblend_owned", self._space.to_plain(), list(keys))
        return sorted(set.intersection(*map(set, ranks)))

    def described(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """Key and tokens of each text, and whether it is stored."""
        chunks = self._numbered(texts)
        keys = [chunk.key for chunk in chunks]
        self._has_store()
        absent = set().union(*self._ask_stores("cacheblend_missing", keys))
        return [
            {
                "object": "cacheblend.chunk",
                "id": chunk.key,
                "tokens": len(chunk.token_ids),
                "stored": chunk.key not in absent,
            }
            for chunk in chunks
        ]

    def keys_of(self, texts: Sequence[Text]) -> list[str]:
        """The keys of texts."""
        return [chunk.key for chunk in self._numbered(texts)]

    def reports(self, request: str) -> list[dict[str, Any]]:
        """What was done for a client's request: a report for each prompt and answer of it."""
        space = self._space.key(()) if self.is_tenant else None
        return [_report(done) for done in self._engine.rpc("cacheblend_reports", request, space)[0]]

    def state(self) -> dict[str, Any]:
        """What there is to know of the engine, the model and the store."""
        self.look()
        info, model_check = self.info, self.model_check
        blending = {
            "on": model_check.passed,
            "reason": model_check.reason,
            "detail": model_check.detail,
            "proving": bool(model_check.passed and self._engine.state["proving"]),
        }
        return {
            "object": "cacheblend.state",
            "version": __version__,
            "vllm_version": info.vllm_version,
            "model": info.model,
            "max_model_len": info.max_model_len,
            "block_size": info.block_size,
            "fingerprint": info.fingerprint,
            "namespace": self.config.namespace,
            "blending": blending,
            "parsers": self.parsers._asdict(),
            "config": self._shown_config(),
            **self._stored(),
        }

    def _stored(self) -> dict[str, Any]:
        """Counts of the store. Answers are given, and clients connect, where it can't be asked."""
        nothing: dict[str, Any] = {"chunks": None, "store": {}, "store_error": None}
        try:
            chunks = self.count()
            stats = [] if self.is_tenant else self._ask_stores("cacheblend_store_stats")
        except NoStoreError:  # as ``blending`` says
            return nothing
        except StoreError as error:
            return {**nothing, "store_error": str(error)}
        return {"chunks": chunks, "store": stats[0] if stats else {}, "store_error": None}

    def _shown_config(self) -> dict[str, Any]:
        shown = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        shown |= {name: dict(value) for name, value in shown.items() if isinstance(value, Mapping)}
        return {**shown, "store": redacted(self.config.store)}


def _report(done: dict[str, Any]) -> dict[str, Any]:
    """Times are the client's to measure."""
    report = make_report(
        None,
        done,
        mode=done["mode"],
        tokens_total=done["tokens"],
        ttft_s=0.0,
        total_s=0.0,
        tokenize_s=0.0,
    ).to_dict()
    stages = {name: took for name, took in report["stages_s"].items() if name != "tokenize"}
    return {**report, "ttft_s": None, "total_s": None, "stages_s": stages}
