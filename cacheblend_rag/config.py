"""The one configuration object, frozen and validated when it is made."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from cacheblend_rag.errors import ConfigError, StoreError
from cacheblend_rag.select import create_selector
from cacheblend_rag.store.url import parse_size

Mode = Literal["blend", "full", "reuse", "off"]
When = Literal["pays", "always"]
Schedule = Literal["auto", "sync", "async"]

FIXED_RATIO = 0.15  # CacheBlend, section 4.2
REACH = 64  # chosen on the tuning half of docs/quality.md's questions
PREFIXES = ("auto", "head", "document", "bos", "none")
PER_CALL = (
    "mode",
    "recompute_ratio",
    "selector",
    "selector_options",
    "reach",
    "when",
    "schedule",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendConfig:
    """How chunks are cached and blended. All fields can be set at start, those in
    ``PER_CALL`` also for a single request (``generate(prompt, mode="off")``).

    Attributes:
        mode: ``blend``; ``reuse`` (ratio 0, the naive baseline); ``full`` (every token is
            prefilled, vLLM's prefix cache is not read); ``off`` (plain vLLM with its prefix cache).
        recompute_ratio: share of the reused tokens to recompute, 0 to 1 (CacheBlend, section 4.2),
            or ``auto``: ratio, selector, its options and reach are those that ``cacheblend
            calibrate`` found for this model; the defaults where it found none.
        selector: which of them: a name of ``cacheblend_rag.select.SELECTORS``.
        selector_options: the selector's own parameters by name, for instance ``{"window": 33}``.
        reach: tokens over which a recomputed token moves the reused ones around it as it was moved
            itself; 0: they stay as they are. Brings answers nearer to a full prefill's
            (docs/quality.md).
        calibration: a file that ``cacheblend calibrate --file`` wrote, for ``auto``; else the one
            it keeps for these weights.
        min_chunk_tokens: shorter chunks and shorter matches are not reused; at least 32.
        ingest_prefix: what a chunk is computed behind: ``auto`` (the head that the chat template
            and ``system_prompt`` put before the context, then neutral text), ``head`` (the same
            without the neutral text), ``document`` (the head, then the last tokens of what stands
            before the chunk in its own document, as many as the neutral text has, which fills up
            where less is known; see ``CacheBlend.ingest``), ``bos`` (the BOS token, if the model
            has one), ``none``, or a sequence of token ids.
        system_prompt: the system prompt your requests use; the template's default where None.
        when: ``pays`` blends where the measured costs predict a gain over a plain prefill (they are
            measured on a GPU only), ``always`` blends whatever is found.
        schedule: ``sync`` blends within one engine step, ``async`` in pieces so that other
            streams keep decoding, ``auto`` is sync only while nothing else runs.
        tile_tokens: most tokens recomputed at once, up to the engine's ``max_num_batched_tokens``;
            where it is None, all that a step may take, and where others decode meanwhile 512, in
            pieces of a few layers (256 at once without CUDA graphs).
        store: URL of the chunk store, see ``cacheblend_rag.store.open_store``.
        gpu_cache: GPU memory for chunks that are used often, for instance ``4GiB``: their KV needs
            no transfer. vLLM's ``gpu_memory_utilization`` must leave it free.
        namespace: tenant; chunks, counts and documents of another one are never seen.
    """

    mode: Mode = "blend"
    recompute_ratio: float | Literal["auto"] = FIXED_RATIO
    selector: str = "query"
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    reach: int = REACH
    calibration: str | None = None
    min_chunk_tokens: int = 32
    ingest_prefix: str | tuple[int, ...] = "auto"
    system_prompt: str | None = None
    when: When = "pays"
    schedule: Schedule = "auto"
    tile_tokens: int | None = None
    store: str = "memory://"
    gpu_cache: str | None = None
    namespace: str = ""

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, get_args(Mode))
        _one_of("schedule", self.schedule, get_args(Schedule))
        _one_of("when", self.when, get_args(When))
        _check_ratio(self.recompute_ratio)
        if isinstance(self.reach, bool) or not isinstance(self.reach, int) or self.reach < 0:
            raise ConfigError(f"reach is {self.reach!r}; it must be a number of tokens, 0 for none")
        if self.min_chunk_tokens < 32:
            raise ConfigError("min_chunk_tokens must be at least 32: anchors need that many")
        if self.tile_tokens is not None and self.tile_tokens < 1:
            raise ConfigError("tile_tokens must be positive, or None for the engine's own limit")
        if isinstance(self.ingest_prefix, str):
            _one_of("ingest_prefix", self.ingest_prefix, PREFIXES)
        else:
            object.__setattr__(self, "ingest_prefix", tuple(int(t) for t in self.ingest_prefix))
        if self.gpu_cache is not None:
            try:
                parse_size(self.gpu_cache)
            except StoreError as error:
                raise ConfigError(f"gpu_cache: {error}") from error
        object.__setattr__(self, "selector_options", MappingProxyType(dict(self.selector_options)))
        create_selector(self.selector, self.selector_options)  # raises ConfigError

    def for_call(self, options: Mapping[str, Any]) -> BlendConfig:
        """This configuration with one request's own options."""
        if "selector" in options and "selector_options" not in options:
            options = {**options, "selector_options": {}}
        return replace(self, **options) if options else self


def unknown_option(name: str, known: Iterable[str], what: str) -> ConfigError:
    """The error for a name that does not exist, with the closest one that does."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."
    return ConfigError(f"{what} has no option {name!r}.{hint}")


def _check_ratio(ratio: object) -> None:
    if ratio == "auto":
        return
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise ConfigError(f"recompute_ratio must be a number or 'auto', got {ratio!r}")
    if not 0 <= ratio <= 1:
        raise ConfigError(f"recompute_ratio is {ratio}, but it is a share: 0 (reuse all) to 1")


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
