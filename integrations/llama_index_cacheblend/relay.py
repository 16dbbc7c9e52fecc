"""Worker processes of an ingestion pipeline send their texts to the process that has the engine."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NamedTuple

from cacheblend_rag import CacheBlendError, EngineError, errors

_PAUSE_S = 0.05


class Batch(NamedTuple):
    """What is ingested at once: see ``SharedEngine.ingest``."""

    texts: Sequence[str]
    documents: Sequence[str | None]
    left_context: Sequence[str | None] | None


Ingest = Callable[[Batch], Any]


class Relay:
    """The side with the engine: runs ``ingest`` for whoever connects, one thread a connection.

    Only processes started by this one can connect: they inherit its ``authkey``.
    """

    def __init__(self, ingest: Ingest) -> None:
        self._ingest, self._closed = ingest, False
        self._listener = Listener(None, authkey=_authkey())
        self.address: Any = self._listener.address
        threading.Thread(target=self._accept, name="cacheblend-relay", daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError):  # somebody without our authkey knocked
                continue
            except OSError:  # closed; or somebody went away at the door, or this process is full
                time.sleep(_PAUSE_S)
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        with connection:
            batch = connection.recv()
            try:
                self._ingest(batch)
            except CacheBlendError as error:
                connection.send(_Failed(type(error).__name__, str(error)))
            else:
                connection.send(None)


class _Failed(NamedTuple):
    kind: str
    message: str


def send(address: Any, batch: Batch) -> None:
    """The worker's side: have ``batch`` ingested; returns when they are.

    Raises:
        CacheBlendError: what ingestion raised there.
        EngineError: that process is gone.
    """
    try:
        with Client(address, authkey=_authkey()) as connection:
            connection.send(batch)
            failed = connection.recv()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise EngineError(
            "the process that holds the engine does not answer; run the pipeline in the process "
            "that made this transformation, or without num_workers"
        ) from error
    if isinstance(failed, _Failed):
        raise getattr(errors, failed.kind)(failed.message)


def _authkey() -> bytes:
    return bytes(multiprocessing.current_process().authkey)
