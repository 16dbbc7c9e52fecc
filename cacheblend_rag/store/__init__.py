"""Where precomputed KV lives: open a store with ``open_store``, or make one yourself."""

from __future__ import annotations

from pathlib import Path

from cacheblend_rag.store.base import ChunkInfo, ChunkKV, KVStore, StoreStats
from cacheblend_rag.store.disk import DiskStore
from cacheblend_rag.store.memory import MemoryStore
from cacheblend_rag.store.null import NullStore
from cacheblend_rag.store.tiered import TieredStore
from cacheblend_rag.store.url import parse_url

__all__ = [
    "ChunkInfo",
    "ChunkKV",
    "DiskStore",
    "KVStore",
    "MemoryStore",
    "NullStore",
    "StoreStats",
    "TieredStore",
    "open_store",
]

_DEFAULT_MEMORY_BYTES = 4 * 1024**3


def open_store(url: str, *, namespace: str) -> KVStore:
    """Open the store that ``url`` names.

    ``memory://?capacity=4GiB`` keeps chunks in this process (4GiB where no capacity is given),
    ``file:///data/kv?capacity=100GiB&memory=2GiB`` on disk, with copies in memory where ``memory``
    is given, and ``null://`` nowhere. A plain path is a file URL and may start with ``~``.

    Args:
        url: what to open.
        namespace: short name of the model and the rank, which keeps their chunks apart on disk.

    Raises:
        StoreError: the URL is not supported or the store cannot be used.
    """
    scheme, path, sizes = parse_url(url)
    if scheme == "null":
        return NullStore()
    if scheme == "memory":
        return MemoryStore(sizes.get("capacity", _DEFAULT_MEMORY_BYTES))
    disk = DiskStore(Path(path), namespace=namespace, capacity_bytes=sizes.get("capacity"))
    return TieredStore(MemoryStore(sizes["memory"]), disk) if "memory" in sizes else disk
