"""Stores that several machines share: never trusted, and never waited for long."""

from __future__ import annotations

from collections.abc import Mapping

from cacheblend_rag.store.chunk_file import Encoding
from cacheblend_rag.store.remote.base import Backend, BackendError
from cacheblend_rag.store.remote.store import RemoteStore

__all__ = ["Backend", "BackendError", "RemoteStore", "open_remote"]


def open_remote(
    url: str,
    *,
    namespace: str,
    encoding: Encoding,
    timeout_s: float,
    options: Mapping[str, str],
) -> RemoteStore:
    """The store at ``url``. Nothing is connected to before the first use.

    Raises:
        MissingExtraError: the client's package is not installed.
        StoreError: the client does not take the URL or an option.
    """
    backend: Backend
    if url.startswith(("redis://", "rediss://")):
        from cacheblend_rag.store.remote.redis import RedisBackend

        backend = RedisBackend(url, timeout_s)
    else:
        from cacheblend_rag.store.remote.objects import ObjectBackend, open_bucket

        backend = ObjectBackend(open_bucket(url, timeout_s, options))
    return RemoteStore(backend, namespace=namespace, encoding=encoding, timeout_s=timeout_s)
