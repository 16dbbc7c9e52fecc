"""How much of live traffic is computed a second time, and what the controller may do with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.options import from_table


@dataclass(frozen=True, kw_only=True)
class ShadowOptions:
    """Plain data: the table ``BlendConfig.shadow_options``.

    Attributes:
        seed: of the draw; the same requests in the same order are drawn again with it.
        most_share: with ``recompute_ratio="auto"``, the share that is drawn while the controller
            has too little evidence; the share ``shadow`` where that is more.
        most_waiting: requests that may wait for an idle engine. The oldest goes where there are
            more.
        most_tokens: of an answer, so many are compared, from the first on.
        least_ratio, most_ratio: the controller's bounds.
    """

    seed: int = 0
    most_share: float = 0.2
    most_waiting: int = 16
    most_tokens: int = 128
    least_ratio: float = 0.05
    most_ratio: float = 0.5

    def __post_init__(self) -> None:
        for name, least, most in (
            ("seed", 0, 1 << 63),
            ("most_waiting", 1, 64),
            ("most_tokens", 1, 1024),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(
                    f"shadow_options: {name} is {value!r}; it must be a whole number from {least} "
                    f"to {most}"
                )
        for name in ("most_share", "least_ratio", "most_ratio"):
            check_share(f"shadow_options: {name}", getattr(self, name))
        if self.least_ratio > self.most_ratio:
            raise ConfigError(
                f"shadow_options: least_ratio is {self.least_ratio}, above most_ratio "
                f"{self.most_ratio}; swap them"
            )

    @classmethod
    def of(cls, data: object) -> ShadowOptions:
        """From plain data.

        Raises:
            ConfigError: unknown options or refused values.
        """
        return from_table(cls, data, "shadow_options")

    def to_plain(self) -> dict[str, Any]:
        """As a table."""
        return asdict(self)


def check_share(name: str, value: object) -> None:
    """That a value is a share.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}, but it is a share: 0 to 1")
