"""Where precomputed KV lives: open a store with ``open_store``, or make one yourself."""

from __future__ import annotations

from pathlib import Path

from cacheblend_rag.store.base import Changes, ChunkInfo, ChunkKV, KVStore, StoreStats
from cacheblend_rag.store.chunk_file import Encoding
from cacheblend_rag.store.disk import DiskStore
from cacheblend_rag.store.evict import Policy, create_policy
from cacheblend_rag.store.memory import MemoryStore
from cacheblend_rag.store.null import NullStore
from cacheblend_rag.store.part import Heads, PartStore
from cacheblend_rag.store.seal import cipher_from_environment
from cacheblend_rag.store.tenants import of_tenant
from cacheblend_rag.store.tiered import TieredStore
from cacheblend_rag.store.url import StoreURL, parse_seconds, parse_url
from cacheblend_rag.store.write_back import WriteBackStore

__all__ = [
    "Changes",
    "ChunkInfo",
    "ChunkKV",
    "DiskStore",
    "Encoding",
    "Heads",
    "KVStore",
    "MemoryStore",
    "NullStore",
    "PartStore",
    "StoreStats",
    "TieredStore",
    "WriteBackStore",
    "open_store",
]

_DEFAULT_MEMORY_BYTES = 4 * 1024**3


_DEFAULT_TIMEOUT = "5s"


def open_store(
    url: str, *, namespace: str, tenant: str = "", heads: Heads | None = None
) -> KVStore:
    """Open the store that ``url`` names.

    ========================= ======================================================================
    ``memory://``             in this process; ``capacity`` (4GiB)
    ``file:///data/kv``       on disk; ``capacity`` of the folder, ``quota`` of this model,
                              ``memory`` for copies in memory. A plain path may start with ``~``
    ``redis://host:6379/0``   in Redis or Valkey (``rediss://``: over TLS); ``timeout`` (5s) a call,
                              ``write`` (``through``, or ``back``: later, by another thread),
                              ``memory`` and ``disk=/data/kv`` for copies here, ``capacity`` and
                              ``quota`` of that disk
    ``s3://bucket/path``      in object storage, also ``gs://`` and ``az://``; as for Redis, with
                              ``endpoint`` and ``region``
    ``null://``               nowhere
    ========================= ======================================================================

    All but the last also take ``evict`` (``gdsf``, ``gdsf-strict`` or ``lru``); those that outlive
    the process take ``dtype=fp8`` and ``encrypt=yes``. See docs/store.md.

    Args:
        url: what to open.
        namespace: short name of the model, which keeps its chunks apart.
        tenant: keeps chunks, counts and documents of tenants apart as well; any text.
        heads: KV heads of this process, one of several that share the model: stored chunks are
            whole, ``get`` returns these heads of them. ``put`` takes whole chunks where it leads,
            its own heads elsewhere, and at once: the others read what it wrote.

    Raises:
        StoreError: the URL is not supported or the store cannot be used.
        MissingExtraError: it needs a package that is not installed.
    """
    parsed = parse_url(url)
    if parsed.scheme == "null":
        return NullStore()
    policy = create_policy(parsed.options["evict"]) if "evict" in parsed.options else None
    if parsed.scheme == "memory":
        capacity = parsed.sizes.get("capacity", _DEFAULT_MEMORY_BYTES)
        return MemoryStore(capacity, policy=policy, heads=heads)
    namespace = of_tenant(namespace, tenant)
    slow = _slow_tiers(parsed, namespace, policy, may_wait=heads is None)
    # Outside of the memory tier, which then keeps this rank's heads only.
    if heads is not None:
        slow = PartStore(slow, heads)
    if "memory" not in parsed.sizes:
        return slow
    return TieredStore(MemoryStore(parsed.sizes["memory"], policy=policy, heads=heads), slow)


def _slow_tiers(
    parsed: StoreURL, namespace: str, policy: Policy | None, *, may_wait: bool
) -> KVStore:
    options = dict(parsed.options)
    is_encrypted = options.pop("encrypt", "no") == "yes"
    encoding = Encoding(
        fp8=options.pop("dtype", "auto") == "fp8",
        cipher=cipher_from_environment() if is_encrypted else None,
    )
    options.pop("evict", None)
    path = parsed.path if parsed.scheme == "file" else options.pop("disk", None)
    disk = path and DiskStore(
        Path(path).expanduser().absolute(),
        namespace=namespace,
        capacity_bytes=parsed.sizes.get("capacity"),
        quota_bytes=parsed.sizes.get("quota"),
        policy=policy,
        encoding=encoding,
    )
    if parsed.scheme == "file":
        assert disk
        return disk
    from cacheblend_rag.store.remote import open_remote

    is_written_later = options.pop("write", "through") == "back"
    timeout_s = parse_seconds(options.pop("timeout", _DEFAULT_TIMEOUT))
    remote: KVStore = open_remote(
        parsed.path, namespace=namespace, encoding=encoding, timeout_s=timeout_s, options=options
    )
    # Ranks of one model read what the leading one wrote, at once: nothing may wait in its memory.
    if is_written_later and may_wait:
        remote = WriteBackStore(remote)
    return TieredStore(disk, remote) if disk else remote
