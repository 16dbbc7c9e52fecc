"""How much is learnt, and for how long it is kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cacheblend_rag.errors import ConfigError, StoreError
from cacheblend_rag.locate import ANCHOR_WIDTH
from cacheblend_rag.options import from_table
from cacheblend_rag.store.url import parse_size

_LEAST_TOKENS = 2 * ANCHOR_WIDTH


@dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """Plain data: the table ``BlendConfig.learn_options``.

    Attributes:
        ttl_s: seconds after which a prompt is remembered no more, and after which a chunk in the
            memory of the engine goes that no prompt contained meanwhile.
        capacity: memory for learnt chunks, for instance ``4GiB``.
        share: of the engine's time, while somebody asks, that learning may take; 0 to 1. Where
            nobody asks, it takes what there is.
        min_tokens: shorter repeats are not learnt; at least 32.
        remember_tokens: of prompts, those that are compared with the next ones.
    """

    ttl_s: float = 86_400.0
    capacity: str = "4GiB"
    share: float = 0.2
    min_tokens: int = 64
    remember_tokens: int = 2_000_000

    def __post_init__(self) -> None:
        for name in ("ttl_s", "share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"learn_options: {name} is {value!r}; it must be a number")
        if not self.ttl_s > 0:
            raise ConfigError(f"learn_options: ttl_s is {self.ttl_s}; it must be above 0 seconds")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"learn_options: share is {self.share}; it must be from 0 to 1")
        for name, least in (("min_tokens", _LEAST_TOKENS), ("remember_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"learn_options: {name} is {value!r}; it must be a whole number of {least} or "
                    "more"
                )
        try:
            parse_size(str(self.capacity))
        except StoreError as error:
            raise ConfigError(f"learn_options: capacity: {error}") from error

    @classmethod
    def of(cls, data: object) -> LearnOptions:
        """From plain data.

        Raises:
            ConfigError: unknown options or refused values.
        """
        return from_table(cls, data, "learn_options")

    @property
    def capacity_bytes(self) -> int:
        """Memory for learnt chunks, in bytes."""
        return parse_size(str(self.capacity))

    def to_plain(self) -> dict[str, Any]:
        """As a table."""
        return asdict(self)
