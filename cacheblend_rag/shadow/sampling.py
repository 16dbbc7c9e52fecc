"""Which requests are shadowed, what their prompts have in common, and what was found."""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.shadow.controller import LADDER

OTHER = "other"  # what is counted together
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_NAMES = 64


class Drawn(NamedTuple):
    """A request that is to be shadowed.

    Attributes:
        namespace, template: as metrics name them.
        key: of the template, for the controller; empty where the ratio is the request's own.
        most_tokens, most_waiting: see ``ShadowOptions``.
    """

    namespace: str
    template: str
    key: str
    most_tokens: int
    most_waiting: int


class ShadowJob(NamedTuple):
    """An answer that was given, to be computed again.

    Attributes:
        request_id: vLLM's own; name: the caller's.
        token_ids: of the prompt, and of the answer as far as it is compared.
        prompt_tokens: how many of them are the prompt.
        ratio: by which it was blended.
    """

    request_id: str
    name: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    ratio: float
    drawn: Drawn


class Figures(NamedTuple):
    """How far a blended answer is from the exact one, over its own tokens.

    Attributes:
        tokens: of the answer that were compared.
        kl: KL(exact || blended) in nats over the whole vocabulary, the mean over these tokens.
        agreement: share of them that an exact prefill would have chosen as the likeliest.
        changed: at some token, the likeliest one differs: a greedy answer would be another.
        first_changed: at the first token.
    """

    tokens: int
    kl: float
    agreement: float
    changed: bool
    first_changed: bool

    @classmethod
    def of(cls, rows: Sequence[tuple[float, bool, bool]]) -> Figures:
        """Of each token: KL, whether the exact prefill chooses it, and whether both have the same
        likeliest one.
        """
        count = len(rows)
        return cls(
            tokens=count,
            kl=max(0.0, sum(kl for kl, _, _ in rows) / count),  # rounding may end below zero
            agreement=sum(chosen for _, chosen, _ in rows) / count,
            changed=not all(same for _, _, same in rows),
            first_changed=not rows[0][2],
        )


class Shadowed(NamedTuple):
    """What the controller is told of an answer."""

    key: str
    ratio: float
    changed: bool


class Sampler:
    """Draws requests, again the same ones with the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def draw(self, share: float) -> bool:
        """Whether the next request is drawn, which so many of all are."""
        return self._random.random() < share


class Names:
    """Keeps the number of time series bounded: what comes behind the first ones is ``other``."""

    def __init__(self, most: int = _MOST_NAMES) -> None:
        self._most, self._known = most, set[tuple[str, str]]()

    def of(self, namespace: str, template: str) -> tuple[str, str]:
        """How metrics name these."""
        if (namespace, template) not in self._known:
            if len(self._known) >= self._most:
                return OTHER, OTHER
            self._known.add((namespace, template))
        return namespace, template


def ratio_name(ratio: float) -> str:
    """How metrics name a ratio: the next one of a few that is not below it."""
    return f"{next((r for r in (0.0, *LADDER) if ratio <= r), 1.0):g}"


def template_name(space: str, head: Sequence[int]) -> str:
    """A digest of what a prompt begins with. Tenants' ones differ.

    Args:
        space: tells apart whose prompts these are.
        head: token ids.
    """
    digest = hashlib.sha256(space.encode())
    digest.update(array("q", head).tobytes())
    return digest.hexdigest()[:12]


def check_template(name: Any) -> None:
    """That a caller's name of a template may stand in metrics.

    Raises:
        ConfigError: it may not.
    """
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(
            f"template is {name!r}; it must be a name of 1 to 64 letters, digits, dots, hyphens "
            "and underscores"
        )
