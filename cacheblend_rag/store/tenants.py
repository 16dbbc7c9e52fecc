"""Tenants: whose chunks a namespace holds is part of its name."""

from __future__ import annotations

import hashlib
import re

_MARK = re.compile(r"-tenant-([0-9a-f]{16})(?:-|$)")


def tenant_id(tenant: str) -> str:
    """What stores call a tenant, 16 hexadecimal digits: its name may be private."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:16]


def documents_of(tenant: str) -> str:
    """What the names of a tenant's documents begin with, where it shares a store with others."""
    return f"{tenant_id(tenant)}/"


def of_tenant(namespace: str, tenant: str) -> str:
    """The tenant's own namespace; ``namespace`` itself for the one without a name."""
    return f"{namespace}-tenant-{tenant_id(tenant)}" if tenant else namespace


def belongs(namespace: str, tenant: str) -> bool:
    """Whether ``namespace`` is of that tenant; "": of none."""
    match = _MARK.search(namespace)
    return match[1] == tenant_id(tenant) if match and tenant else not (match or tenant)
