"""Who runs the jobs: one thread of one API process, whose lock dies with it."""

from __future__ import annotations

import fcntl
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO

from cacheblend_rag.errors import (
    CacheBlendError,
    ClosedError,
    EngineDeadError,
    PromptError,
    StoreError,
    UnavailableError,
)
from cacheblend_rag.front.learning import LearntIngestion
from cacheblend_rag.front.shadowing import Shadowing
from cacheblend_rag.ingest import IngestReport, grouped
from cacheblend_rag.server.bodies import Given
from cacheblend_rag.server.errors import NoStoreError
from cacheblend_rag.server.front import Front
from cacheblend_rag.server.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    NOT_STORED,
    Job,
    Jobs,
)
from cacheblend_rag.server.jobs_file import is_full
from cacheblend_rag.undo import logging_failures

_LOOKS_EVERY_S = 0.5
_TRIES, _PAUSE_S = 5, 1.0  # of a batch whose store can't be asked
_FULL = (
    "the disk of the ingestions' own file is full. Free disk space, or start with another --state"
)

logger = logging.getLogger("vllm.cacheblend_rag")


class Interrupted(Exception):
    """The server shuts down."""


class NotStoredError(StoreError):
    """The store refused every chunk of a job."""


class Runner:
    """Runs a server's jobs one behind the other, as soon as no other process does.

    Args:
        front_of: the front of a namespace.
        lock: file that says which process runs them.
        learnt: what is computed where there is no job; None: nothing.
        shadowing: what is computed where nothing else is to do; None: nothing.
    """

    def __init__(
        self,
        jobs: Jobs,
        front_of: Callable[[str], Front],
        lock: Path,
        learnt: LearntIngestion | None = None,
        shadowing: Shadowing | None = None,
    ) -> None:
        self._shadowing, self._learnt = shadowing, learnt
        self._warned, self._file_warned = set[str](), False
        self._jobs, self._front_of, self._base = jobs, front_of, front_of("")
        self._lock: IO[bytes] = lock.open("wb")
        self._wanted, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._serve, name="cacheblend-jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is a new job."""
        self._wanted.set()

    def stop(self, within_s: float = 5.0) -> None:
        """End behind the batch that is under way; its job goes on another time."""
        self._stopped.set()
        self._wanted.set()
        self._thread.join(within_s)

    def _serve(self) -> None:
        # Whatever ends this, the jobs are kept: another process, or the next start, goes on.
        with closing(self._lock), logging_failures(logger, "ingestions stop"):
            try:
                while not self._owns():
                    self._jobs.erase()  # of jobs that were ended from here
                    if self._stopped.wait(_LOOKS_EVERY_S):
                        return
                while not self._stopped.is_set():
                    self._serve_while_written()
            except (Interrupted, ClosedError, EngineDeadError):
                logger.info("ingestions stop with the server; those that did not end are kept")

    def _serve_while_written(self) -> None:
        """Run jobs until their file can't be written. A full disk may have room again."""
        try:
            self._jobs.resume()
            while not self._stopped.is_set():
                if not (self._run_one() or self._learn() or self._shadow()):
                    self._jobs.erase()
                    self._wanted.wait(_LOOKS_EVERY_S)
                    self._wanted.clear()
        except sqlite3.Error as error:
            if not self._file_warned:
                logger.warning("ingestions wait until their file can be written: %s", error)
            self._file_warned = True
            self._stopped.wait(_PAUSE_S)

    def _owns(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _run_one(self) -> bool:
        """Run the oldest job, if there is one."""
        begun = self._jobs.begin()
        if begun is None:
            return False
        job, chunks = begun
        front = self._base
        try:
            front = self._front_of(job.tenant)
            whole = self._run(job, front, chunks)
        except (Interrupted, ClosedError, EngineDeadError):
            self._jobs.put_back(job)
            raise
        except sqlite3.Error as error:  # of the jobs' own file
            if not is_full(error):
                raise  # what is noted of this job is what it was: it goes on another time
            self._fail(job, StoreError(f"{_FULL}: {error}"))
        except Exception as error:  # of one job: it fails with its cause, and the others go on
            if front.is_over:
                self._jobs.put_back(job)
                raise Interrupted from error
            self._fail(job, error)
        else:  # where this can't be noted, it is done again: no job fails that was done
            self._finish(job, whole)
        return True

    def _learn(self) -> bool:
        """Compute some of what was learnt; returns whether there may be more to do at once."""
        return self._learnt is not None and self._aside(
            self._learnt.once, "what was learnt could not be computed"
        )

    def _shadow(self) -> bool:
        """Compute some of an answer again; returns whether there may be more to do at once."""
        return self._shadowing is not None and self._aside(
            self._shadowing.once, "answers could not be computed again"
        )

    def _aside(self, once: Callable[[], bool], failed: str) -> bool:
        """What nobody waits for: where it fails, the log says so once."""
        try:
            return once()
        except (ClosedError, EngineDeadError):
            raise
        except CacheBlendError as error:
            if self._base.is_over:
                raise Interrupted from error
            if failed not in self._warned:
                logger.warning("%s: %s", failed, error)
            self._warned.add(failed)
            return False

    def _run(self, job: Job, front: Front, chunks: Sequence[Given]) -> bool:
        """Compute what is left of a job; returns whether it was not cancelled."""
        front.look()
        seen = set(self._jobs.keys(job))
        for batch in batches(chunks[job.done.place :], front.batch_tokens):
            if self._stopped.is_set():
                raise Interrupted
            keys = self._compute(job, front, batch, seen)
            seen.update(keys)
            waiting = max(0, job.waiting - sum(chunk.tokens for chunk in batch))
            job.waiting = waiting
            if not self._jobs.progress(job, keys, waiting):
                return False
        if job.done.kept_nothing:  # a document keeps what it had
            raise NotStoredError(f"the store kept none of the chunks; {job.done.detail}")
        if job.replaces and job.done.reason is None and job.document is not None:
            if not self._jobs.completes(job):  # what it was to replace stays
                return False
            front.replace_document(job.document, seen - {""})
        return True

    def _compute(self, job: Job, front: Front, batch: Sequence[Given], seen: set[str]) -> list[str]:
        """A batch but for documents that were deleted; the key of each chunk, or nothing."""
        deleted = self._jobs.deleted(job)
        kept = [chunk for chunk in batch if chunk.document not in deleted]
        try:
            report = self._ingest(front, kept) if kept else IngestReport(chunks=0)
        except PromptError as error:  # it names the number of a text within the batch
            first, last = job.done.place, job.done.place + len(batch) - 1
            raise type(error)(f"of chunks[{first}] to chunks[{last}], {error}") from error
        job.done.add(report, seen)
        job.done.place += len(batch) - len(kept)
        job.done.deleted += len(batch) - len(kept)
        keys = iter(report.keys)
        return ["" if chunk.document in deleted else next(keys, "") for chunk in batch]

    def _ingest(self, front: Front, batch: Sequence[Given]) -> IngestReport:
        for pause in range(1, _TRIES):
            try:
                return front.ingest_given(batch)
            except UnavailableError:
                if self._stopped.wait(pause * _PAUSE_S):
                    raise Interrupted from None
        return front.ingest_given(batch)

    def _finish(self, job: Job, whole: bool) -> None:
        self._jobs.end(job, COMPLETED if whole else CANCELLED)
        self._file_warned = False

    def _fail(self, job: Job, error: Exception) -> None:
        ours = isinstance(error, CacheBlendError)
        if not ours:
            logger.error("ingestion %s failed", job.id, exc_info=error)
        message = str(error) if ours else f"{type(error).__name__}; the server's log has the cause"
        self._jobs.end(job, FAILED, {"code": _code(error), "message": message})


def batches(chunks: Sequence[Given], most: Callable[[], int]) -> Iterator[list[Given]]:
    """Chunks of at most so many tokens together, in order; a longer one goes alone."""
    return grouped(chunks, lambda chunk: chunk.tokens, most)


def _code(error: Exception) -> str:
    if isinstance(error, UnavailableError):
        return "store_unavailable"
    if isinstance(error, NoStoreError):
        return "not_available"
    if isinstance(error, NotStoredError):
        return NOT_STORED
    if isinstance(error, PromptError):
        return "invalid_chunk"
    return "ingestion_failed"
