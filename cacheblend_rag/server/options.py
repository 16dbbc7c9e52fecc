"""The options of ``cacheblend serve`` for its endpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.options import from_table

SERVER = "server"  # key of these options in the connector's extra config


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Plain data, in the connector's extra config under ``server``.

    Attributes:
        state: folder of the jobs; None: in a store's folder, else one that is chosen.
        tenants: TOML file of API keys and the namespaces that they belong to.
        tenant_header: header in which a trusted proxy names the namespace.
        max_body: bytes of a request's body.
        max_queued_tokens: tokens of the texts that may wait to be ingested, about.
        page: whether there is a page at ``/`` to try the server with.
        chat_template: that of vLLM's option, for the prefix that chunks are computed behind.
    """

    state: str | None = None
    tenants: str | None = None
    tenant_header: str | None = None
    max_body: int = 64 * 1024 * 1024
    max_queued_tokens: int = 50_000_000
    page: bool = False
    chat_template: str | None = None

    def __post_init__(self) -> None:
        for name in ("state", "tenants", "tenant_header", "chat_template"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"{name} is {value!r}; it must be a text that is not empty")
        for name in ("max_body", "max_queued_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of 1 or more")
        if not isinstance(self.page, bool):
            raise ConfigError(f"page is {self.page!r}; it must be true or false")
        if self.tenants and self.tenant_header:
            raise ConfigError("give tenants or tenant_header, not both: who says whose a key is?")

    @classmethod
    def of(cls, data: object) -> ServerOptions:
        """From plain data.

        Raises:
            ConfigError: unknown options or refused values.
        """
        return from_table(cls, data, "server")

    def to_plain(self) -> dict[str, Any]:
        """What differs from the defaults."""
        return {name: value for name, value in asdict(self).items() if value != _DEFAULT[name]}

    @property
    def has_tenants(self) -> bool:
        """Whether each request belongs to a tenant."""
        return bool(self.tenants or self.tenant_header)


_DEFAULT = {f.name: f.default for f in fields(ServerOptions)}
