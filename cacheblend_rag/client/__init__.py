"""The front door over HTTP: ``CacheBlend.connect`` to the server that ``cacheblend serve`` runs.

Nothing here imports vLLM or torch: an application needs neither.
"""

from cacheblend_rag.client.remote import RemoteCacheBlend
from cacheblend_rag.client.shared import SharedServer

__all__ = ["RemoteCacheBlend", "SharedServer"]
