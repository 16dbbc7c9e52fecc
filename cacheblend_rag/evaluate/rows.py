"""The ways of serving a prompt that are compared, and their names.

========================= ==========================================================================
``full``                  every token is prefilled: what all others are held against
``prefix_caching``        plain vLLM with its prefix cache
``ratio_1``                 blended at ratio 1: what other batch shapes alone do to answers
``reuse``                 naive reuse, ratio 0 (keys are re-rotated)
``query@0.15``            a selector at a ratio, as it was published: without propagation
``query:window=33@0.15``  the same with an option of its own; values are JSON or words
``query@0.15~64``         the same with a propagation length; of 64 tokens it is what ships
``.../none``              any of these behind another ingest prefix
========================= ==========================================================================

An ingest prefix is ``auto``, ``prompt_prefix``, ``document`` (other than ``auto`` only for cut
passages), ``bos``, ``none``, ``neutral:N`` (the prompt prefix, then N tokens of neutral text), or
``other_passages:N`` (the prompt prefix, then N tokens of other passages of the same set).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cacheblend_rag.config import PREFIXES, PROPAGATION_LENGTH, BlendConfig
from cacheblend_rag.engine import ChatRenderer
from cacheblend_rag.errors import ConfigError, DataError
from cacheblend_rag.options import BlendOptions
from cacheblend_rag.prefix import NEUTRAL_TEXT, prompt_prefix_ids

FULL = "full"
_FIXED: dict[str, BlendOptions] = {
    FULL: {"mode": "full"},
    "prefix_caching": {"mode": "off"},
    "ratio_1": {"recompute_ratio": 1.0},
    "reuse": {"mode": "reuse"},
}
_SIZED = re.compile(r"(neutral|other_passages):(\d+)")


@dataclass(frozen=True)
class Row:
    """One way of serving.

    Attributes:
        name: as above.
        options: of ``CacheBlend.generate``.
        prefix: the ingest prefix by name.
    """

    name: str
    options: BlendOptions = field(compare=False)
    prefix: str

    @property
    def blends(self) -> bool:
        """Whether chunks are reused."""
        return self.options.get("mode") not in ("full", "off")


def parse_row(text: str, prefix: str = "auto") -> Row:
    """The row of this name; ``prefix`` is that of names without one.

    Raises:
        ConfigError: there is no such row, selector, option or prefix.
    """
    name, _, own = text.partition("/")
    if own:
        check_prefix(own)
    options: BlendOptions = {"blend_if": "always"}  # a row that declines would not be one
    chosen = own or prefix
    if name in _FIXED:
        return Row(text, {**options, **_FIXED[name]}, chosen)
    selector, at, ratio = name.rpartition("@")
    if not at:
        raise ConfigError(
            f"row {text!r} is unknown: write {', '.join(_FIXED)}, or a selector and a ratio such "
            "as query@0.15"
        )
    options["selector"], options["selector_options"] = parse_selector(selector)
    share, _, propagation_length = ratio.partition("~")
    try:
        options["recompute_ratio"] = float(share)
        options["propagation_length"] = int(propagation_length or 0)
    except ValueError as error:
        raise ConfigError(f"row {text!r}: {ratio!r} is no ratio (and length)") from error
    return Row(text, options, chosen)


def parse_selector(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``query:window=33:layers=[0.5,0.75]``.

    Raises:
        ConfigError: there is no such selector or option.
    """
    kind, *given = text.split(":")
    options = {}
    for part in given:
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"selector {text!r}: write an option as name=value, not {part!r}")
        options[name] = _value(value)
    BlendConfig(selector=kind, selector_options=options)  # raises ConfigError
    return kind, options


def make_rows(
    selectors: Sequence[str],
    ratios: Sequence[float],
    prefixes: Sequence[str],
    others: Iterable[str] = (),
) -> list[Row]:
    """The usual rows: the fixed ones, naive reuse behind every prefix, every selector at every
    ratio behind the first prefix, that of the default with the default's propagation too; then
    ``others`` by name. ``full`` is always the first.

    Raises:
        ConfigError: see ``parse_row``.
    """
    for prefix in prefixes:
        check_prefix(prefix)
    first, *rest = prefixes
    names = [FULL, "prefix_caching", "ratio_1", "reuse", *(f"reuse/{p}" for p in rest)]
    names += [f"{selector}@{ratio:g}" for selector in selectors for ratio in ratios]
    if BlendConfig().selector in selectors:
        names += [f"{BlendConfig().selector}@{ratio:g}~{PROPAGATION_LENGTH}" for ratio in ratios]
    return [parse_row(name, first) for name in dict.fromkeys([*names, *others])]


def check_prefix(name: str) -> None:
    """Raise ConfigError where there is no such ingest prefix."""
    if name not in PREFIXES and not _SIZED.fullmatch(name):
        raise ConfigError(
            f"ingest prefix {name!r} is unknown: write {', '.join(PREFIXES)}, neutral:N "
            "or other_passages:N"
        )


def with_prefix(
    config: BlendConfig,
    name: str,
    tokenizer: Any,
    chat: ChatRenderer | None,
    passages: Iterable[str],
) -> BlendConfig:
    """``config`` behind the ingest prefix of this name; ``passages`` are the others.

    Raises:
        DataError: there are too few passages for it.
    """
    sized = _SIZED.fullmatch(name)
    if sized is None:
        return replace(config, ingest_prefix=name)
    prefix_ids = prompt_prefix_ids(config, tokenizer, chat, timeless=True)
    kind, size = sized[1], int(sized[2])
    texts = itertools.repeat(NEUTRAL_TEXT) if kind == "neutral" else (f"{p}\n\n" for p in passages)
    ids: list[int] = []
    for text in texts:
        if len(ids) >= size:
            break
        ids += tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < size:
        raise DataError(f"the set's passages have {len(ids)} tokens together, fewer than {size}")
    return replace(config, ingest_prefix=(*prefix_ids, *ids[:size]))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
