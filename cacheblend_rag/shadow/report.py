"""What a report says of a request's shadow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cacheblend_rag.shadow.sampling import Figures

WAITING, DONE, DROPPED = "waiting", "done", "dropped"


@dataclass(frozen=True, kw_only=True)
class ShadowReport:
    """How far a blended answer was from the exact one; figures are None until they are known.

    Attributes:
        state: ``waiting`` for an idle engine, ``done``, or ``dropped``, for the reason ``detail``.
        template: what the prompt's template is called.
        tokens: of the answer that were compared, from the first on.
        kl: KL(exact || blended) in nats over the whole vocabulary, the mean over these tokens.
        agreement: share of them that an exact prefill finds likeliest, after the same tokens.
        changed: at some token the likeliest one differs: a greedy answer would be another.
        first_changed: at the first token.
    """

    state: str
    template: str
    detail: str = ""
    tokens: int = 0
    kl: float | None = None
    agreement: float | None = None
    changed: bool | None = None
    first_changed: bool | None = None

    def to_plain(self) -> dict[str, Any]:
        """As a table."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any] | None) -> ShadowReport | None:
        """That of a table, of whatever version; None of none."""
        if data is None:
            return None
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


def waiting(template: str) -> dict[str, Any]:
    """The table of one that was drawn."""
    return ShadowReport(state=WAITING, template=template).to_plain()


def done(template: str, figures: Figures) -> dict[str, Any]:
    """The table of one that was computed."""
    return ShadowReport(state=DONE, template=template, **figures._asdict()).to_plain()


def dropped(template: str, detail: str) -> dict[str, Any]:
    """The table of one that never will be."""
    return ShadowReport(state=DROPPED, template=template, detail=detail).to_plain()
