"""Chunks and documents of a server: ingestion, and what is forgotten."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from tqdm import tqdm

from cacheblend_rag import ingest
from cacheblend_rag.client import replies
from cacheblend_rag.client.failures import reported_error
from cacheblend_rag.client.http import BASE, Connection
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import CacheBlendError, EmptyTextError
from cacheblend_rag.ingest import IngestReport, LeftContext
from cacheblend_rag.prompt import checked
from cacheblend_rag.token_ids import token_ids
from cacheblend_rag.undo import on_failure

MOST_BYTES = 32 << 20  # of a body; servers take 64 MiB if nothing else is set
_PAGE = 100  # most that a list has
_ENDED = ("completed", "failed", "cancelled")
_NOT_STORED = "not_stored"  # the store refused all: a failure to the server, a report here
_ASK_S = (0.05, 1.0)  # how often a job is asked for: at first, at last
Text = str | list[int]


class RemoteChunks:
    """The half of ``RemoteCacheBlend`` that is about what is stored."""

    config: BlendConfig
    _connection: Connection

    def _call(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        return self._connection.call(method, BASE + path, body, **more)

    # ---- ingestion -----------------------------------------------------------------------------

    def ingest(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        left_context: str | Sequence[LeftContext] | None = None,
        documents: str | Sequence[str | None] | None = None,
        progress: bool = True,
    ) -> IngestReport:
        start = time.perf_counter()
        chunks = _chunks(texts, left_context, documents, self.config.ingest_prefix)
        jobs, not_stored = list[Mapping[str, Any]](), dict[str, str]()
        with tqdm(
            total=len(chunks), desc="ingest", unit="chunk", disable=not (progress and chunks)
        ) as bar:
            for batch in batches(chunks, MOST_BYTES):
                jobs.append(self._job(batch, bar.update))
                not_stored |= self._not_stored(batch, jobs[-1])
        spent = time.perf_counter() - start
        return replies.ingested(jobs, not_stored, spent)

    def _job(self, chunks: Sequence[Any], advance: Callable[[int], object]) -> Mapping[str, Any]:
        """Have one job done; it is cancelled where the caller leaves early."""
        key = {"Idempotency-Key": uuid.uuid4().hex}  # so that it may be sent twice
        job = self._call("POST", "/ingestions", {"chunks": chunks}, headers=key, safe=True)
        with on_failure(partial(self._cancel, job["id"])):
            job = self._followed(job, advance)
        error = job.get("error") or {"message": f"the ingestion was {job['status']}"}
        if job["status"] != "completed" and error.get("code") != _NOT_STORED:
            raise reported_error(error, self._connection.url)
        return job

    def _cancel(self, job_id: str) -> None:
        with suppress(CacheBlendError):  # what failed may fail here too
            self._call("POST", f"/ingestions/{job_id}/cancel")

    def _followed(
        self, job: Mapping[str, Any], advance: Callable[[int], object]
    ) -> Mapping[str, Any]:
        """A job that has ended, asked for at longer and longer intervals."""
        done, wait = 0, _ASK_S[0]
        while True:
            now = int(job["counts"]["total"]) - int(job["counts"]["remaining"])
            advance(now - done)
            done = now
            if job["status"] in _ENDED:
                return job
            time.sleep(wait)
            wait = min(wait * 1.5, _ASK_S[1])
            job = self._call("GET", f"/ingestions/{job['id']}")

    def _not_stored(self, chunks: Sequence[Any], job: Mapping[str, Any]) -> dict[str, str]:
        """Why chunks of a job were not stored, by their keys; servers say only how many."""
        if not int(job["counts"].get("not_stored", 0)):
            return {}
        keys = {key for key in job.get("keys") or () if key}
        why = job.get("detail") or "the store did not keep it; the server's log says why"
        if job["status"] == "completed":  # some were
            texts = [chunk["text"] if isinstance(chunk, Mapping) else chunk for chunk in chunks]
            found = self._call("POST", "/chunks/keys", {"texts": texts}, safe=True)["data"]
            keys -= {row["id"] for row in found if row["stored"]}
        return dict.fromkeys(sorted(keys), why)

    def prefetch(self, texts: str | Sequence[str | Sequence[int]]) -> None:
        for batch in batches(_texts(texts), MOST_BYTES):
            self._call("POST", "/chunks/prefetch", {"texts": batch}, safe=True)

    # ---- what is stored ------------------------------------------------------------------------

    def key(self, text: str | Sequence[int]) -> str:
        return self._keys([_text(text)])[0]

    def _keys(self, texts: Sequence[Text]) -> list[str]:
        keys: list[str] = []
        for batch in batches(texts, MOST_BYTES):
            found = self._call("POST", "/chunks/keys", {"texts": batch}, safe=True)
            keys += [row["id"] for row in found["data"]]
        return keys

    def stored(self) -> set[str]:
        keys: set[str] = set()
        page: dict[str, Any] = {"limit": _PAGE}
        while True:
            found = self._call("GET", "/chunks", params=page)
            keys.update(row["id"] for row in found["data"])
            if not found["has_more"]:
                return keys
            page["after"] = found["last_id"]

    def forget(self, texts: str | Sequence[str | Sequence[int]]) -> None:
        for batch in batches(_texts(texts), MOST_BYTES):
            self._call("POST", "/chunks/delete", {"texts": batch})

    def forget_keys(self, keys: Iterable[str]) -> int:
        rows = ingest.chunk_keys(keys, "keys")
        return self._deleted("/chunks/delete", ({"ids": b} for b in batches(rows, MOST_BYTES)))

    def delete_except(self, texts: Iterable[str | Sequence[int]]) -> int:
        kept = _texts(texts)
        whole = list(batches(kept, MOST_BYTES))
        if len(whole) <= 1:
            return self._deleted("/chunks/delete", [{"except_texts": kept}])
        return self.forget_keys(self.stored() - set(self._keys(kept)))

    def _deleted(self, path: str, bodies: Iterable[Mapping[str, Any]]) -> int:
        return sum(int(self._call("POST", path, body)["deleted"]) for body in bodies)

    # ---- documents -----------------------------------------------------------------------------

    def register_documents(self, documents: Mapping[str, Iterable[str]]) -> None:
        for batch in batches(ingest.keys_by_document(documents), MOST_BYTES):
            self._call("POST", "/documents", {"documents": dict(batch)}, safe=True)

    def registered_documents(self, documents: str | Iterable[str]) -> set[str]:
        found: set[str] = set()
        for batch in batches(ingest.document_names(documents), MOST_BYTES):
            reply = self._call("POST", "/documents/registered", {"documents": batch}, safe=True)
            found.update(reply["data"])
        return found

    def forget_documents(
        self, documents: str | Iterable[str], only: Iterable[str] | None = None
    ) -> int:
        keys = None if only is None else list(only)
        named = batches(ingest.document_names(documents), MOST_BYTES)
        return self._deleted("/documents/delete", ({"documents": b, "only": keys} for b in named))


def batches(rows: Sequence[Any], most_bytes: int) -> Iterator[list[Any]]:
    """``rows`` in order, in lists that are at most ``most_bytes`` as JSON, or have one row."""
    return ingest.grouped(rows, lambda row: len(json.dumps(row)) + 2, lambda: most_bytes)


def _chunks(
    texts: object,
    left_context: str | Sequence[LeftContext] | None,
    documents: str | Sequence[str | None] | None,
    prefix: object,
) -> list[Any]:
    """What is sent for an ingestion, checked before anything is."""
    given = ingest.as_list(texts)
    known = ingest.for_each(given, left_context, prefix)
    names = ingest.document_for_each(given, documents)
    rows = zip(_numbered(given), known, names, strict=True)
    found = []
    for number, (text, context, name) in enumerate(rows, 1):
        with ingest.naming(f"left_context, text {number} of {len(given)}"):
            found.append(_chunk(text, context, name))
    return found


def _chunk(text: Text, context: LeftContext, document: str | None) -> Any:
    if context is None and document is None:
        return text
    behind = context if context is None or isinstance(context, str) else list(token_ids(context))
    return {"text": text, "left_context": behind, "document": document}


def _texts(texts: object) -> list[Text]:
    return _numbered(ingest.as_list(texts))


def _numbered(texts: Sequence[object]) -> list[Text]:
    """Each as it is sent; an error names the number of its text."""
    found = []
    for number, text in enumerate(texts, 1):
        with ingest.naming(f"text {number} of {len(texts)}"):
            found.append(_text(text))
    return found


def _text(text: object) -> Text:
    if not isinstance(text, str):
        ids = list(token_ids(text))
        if not ids:
            raise EmptyTextError("a chunk is empty; leave empty texts out of ingest()")
        return ids
    if not checked(text).strip():
        raise EmptyTextError("a chunk is empty; leave empty texts out of ingest()")
    return text
