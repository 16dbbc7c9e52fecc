"""Salts of vLLM's prefix cache that a server of several tenants gives their requests."""

from __future__ import annotations

import hashlib
import json


def tenant_salt(space: str, own: str | None) -> str:
    """The salt of a tenant's requests, and within it the client's own.

    Args:
        space: name of the tenant's space.
        own: ``cache_salt`` as the client gave it.
    """
    return hashlib.sha256(json.dumps(["cacheblend", space, own]).encode()).hexdigest()
