"""The one configuration object, frozen and validated when it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from cacheblend_rag.errors import ConfigError, PromptError, StoreError
from cacheblend_rag.learn.options import LearnOptions
from cacheblend_rag.options import (
    PER_REQUEST,
    BlendIf,
    BlendOptions,
    Mode,
    Refine,
    refuse_unknown,
)
from cacheblend_rag.select import create_selector
from cacheblend_rag.shadow.options import ShadowOptions, check_share
from cacheblend_rag.shadow.sampling import check_template
from cacheblend_rag.store.url import parse_size, redacted
from cacheblend_rag.token_ids import token_ids

Learn = Literal["off", "memory", "store"]

FIXED_RATIO = 0.15  # CacheBlend, section 4.2
UNCALIBRATED_RATIO = 0.5  # of ``auto``: the lowest that kept all of docs/quality.md's bounds
PROPAGATION_LENGTH = 64  # chosen on the tuning half of docs/quality.md's questions
PREFIXES = ("auto", "prompt_prefix", "document", "bos", "none")
_TEMPLATE_OWN = {  # what rendering sets itself, or what would cut a prompt
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendConfig:
    """How chunks are cached and blended. All fields can be set at start, those of
    ``BlendOptions`` also for a single request (``generate(prompt, mode="off")``).

    Attributes:
        mode: ``blend``; ``reuse`` (ratio 0, the naive baseline); ``full`` (every token is
            prefilled, vLLM's prefix cache is not read); ``off`` (plain vLLM with its prefix cache).
        recompute_ratio: share of the reused tokens to recompute, 0 to 1 (CacheBlend, section 4.2),
            or ``auto``: ratio, selector, its options and propagation length are those that
            ``cacheblend calibrate`` found for this model, or that ship with this package for it;
            0.5 with the other defaults where there are none (docs/quality.md). With ``shadow``,
            that ratio is where a controller begins: see ``changed_allowed``.
        selector: which of them: a name of ``cacheblend_rag.select.selectors()``.
        selector_options: the selector's own parameters by name, for instance ``{"window": 33}``.
        propagation_length: each recomputed token also corrects the reused tokens near it in its
            chunk, by a part of its own change. At this distance in tokens the part has fallen to
            1/e; 0: none is corrected. Brings answers closer to a full prefill's (docs/quality.md).
        calibration: a file that ``cacheblend calibrate --file`` wrote, for ``auto``; else the one
            it keeps for these weights, else the one that ships for them.
        min_chunk_tokens: shorter chunks and shorter matches are not reused; at least 32.
        ingest_prefix: the text put before a chunk while its KV is computed. ``auto``: the prompt
            prefix, which the chat template and ``system_prompt`` put before the context, then
            neutral text. ``prompt_prefix``: the same without the neutral text. ``document``: the
            prompt prefix, then the text before the chunk in its own document, as many tokens as the
            neutral text has (see ``CacheBlend.ingest``); the neutral text fills up where less is
            known. ``bos``: the BOS token, if the model has one. ``none``: nothing. Or a sequence of
            token ids.
        system_prompt: the system prompt your requests use; the template's default where None. Leave
            out of it what changes, such as a date: it is part of every chunk's key.
        likely_system_prompt: the same as a guess, where ``system_prompt`` is None: passed over
            where the template takes no system message.
        chat_template_kwargs: more arguments of the chat template by name, for instance
            ``{"enable_thinking": False}``. Those of a call are added to them.
        blend_if: ``faster`` blends where the measured costs predict a gain over a plain prefill
            (they are measured on a GPU only), ``always`` blends whatever is found.
        refine: ``idle`` computes a blend's tokens again while its answer is generated and no other
            request is in the engine, some with each step, so that the KV becomes a full prefill's;
            a number is how many with each step. ``off`` leaves the KV as it was blended.
            Reports say where it can't be had (docs/refinement.md).
        store: URL of the chunk store, see ``cacheblend_rag.store.open_store``.
        gpu_cache: GPU memory for chunks that are used often, for instance ``4GiB``: their KV needs
            no transfer. vLLM's ``gpu_memory_utilization`` must leave it free.
        namespace: tenant; chunks, counts and documents of another one are never seen.
        learn: have text that comes again in prompts computed as chunks, with no ingestion:
            ``memory`` keeps them in the memory of the engine, ``store`` puts them into the store;
            ``off`` learns nothing. See docs/serving.md.
        learn_options: how much, and for how long: see ``learn.LearnOptions``.
        shadow: share of the blended requests whose answer is also computed exactly, while nobody
            asks, to measure how far it is from that: see docs/serving.md. 0: none.
        shadow_options: how it is drawn and bounded: see ``shadow.ShadowOptions``.
        changed_allowed: share of answers that may differ from an exact prefill's. With ``shadow``
            and the ratio ``auto``, the ratio is moved to keep it, template by template.
        template: what metrics and the controller call the prompt template; None: it is told by the
            prompt prefix, where a prompt has it, else by all tokens before the first chunk.
    """

    mode: Mode = "blend"
    recompute_ratio: float | Literal["auto"] = FIXED_RATIO
    selector: str = "query"
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    propagation_length: int = PROPAGATION_LENGTH
    calibration: str | None = None
    min_chunk_tokens: int = 32
    ingest_prefix: str | tuple[int, ...] = "auto"
    system_prompt: str | None = None
    likely_system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    blend_if: BlendIf = "faster"
    refine: Refine = "off"
    store: str = "memory://"
    gpu_cache: str | None = None
    namespace: str = ""
    learn: Learn = "off"
    learn_options: Mapping[str, Any] = field(default_factory=dict)
    shadow: float = 0.0
    shadow_options: Mapping[str, Any] = field(default_factory=dict)
    changed_allowed: float = 0.05
    template: str | None = None

    if not TYPE_CHECKING:  # whose names are those of the fields

        def __new__(cls, **options: Any) -> BlendConfig:
            """Refuse a field that there is not, with the one that was meant."""
            refuse_unknown(options, [f.name for f in fields(cls)], "BlendConfig")
            return object.__new__(cls)

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, get_args(Mode))
        _one_of("blend_if", self.blend_if, get_args(BlendIf))
        _one_of("learn", self.learn, get_args(Learn))
        _check_refine(self.refine)
        LearnOptions.of(self.learn_options)  # raises ConfigError
        object.__setattr__(self, "learn_options", MappingProxyType(dict(self.learn_options)))
        self._check_shadow()
        _check_ratio(self.recompute_ratio)
        if (
            isinstance(self.propagation_length, bool)
            or not isinstance(self.propagation_length, int)
            or not 0 <= self.propagation_length < 1 << 31
        ):
            raise ConfigError(
                f"propagation_length is {self.propagation_length!r}; it must be a number of "
                "tokens, 0 for none"
            )
        if isinstance(self.min_chunk_tokens, bool) or not isinstance(self.min_chunk_tokens, int):
            raise ConfigError(
                f"min_chunk_tokens is {self.min_chunk_tokens!r}; it must be a number of tokens"
            )
        if self.min_chunk_tokens < 32:
            raise ConfigError("min_chunk_tokens must be at least 32: anchors need that many")
        if isinstance(self.ingest_prefix, str):
            _one_of("ingest_prefix", self.ingest_prefix, PREFIXES)
        else:
            object.__setattr__(self, "ingest_prefix", _token_ids(self.ingest_prefix))
        if self.gpu_cache is not None:
            try:
                parse_size(self.gpu_cache)
            except StoreError as error:
                raise ConfigError(f"gpu_cache: {error}") from error
        for name in ("system_prompt", "likely_system_prompt", "calibration"):
            _check_text(name, getattr(self, name))
        for name in ("store", "namespace"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a text")
        for name in ("system_prompt", "likely_system_prompt", "namespace"):
            _check_characters(name, getattr(self, name) or "")
        if not isinstance(self.selector_options, Mapping):
            raise ConfigError(
                f"selector_options is {self.selector_options!r}; it must be a dict of options"
            )
        arguments = MappingProxyType(template_arguments(self.chat_template_kwargs))
        object.__setattr__(self, "chat_template_kwargs", arguments)
        object.__setattr__(self, "selector_options", MappingProxyType(dict(self.selector_options)))
        create_selector(self.selector, self.selector_options)  # raises ConfigError

    def _check_shadow(self) -> None:
        ShadowOptions.of(self.shadow_options)  # raises ConfigError
        object.__setattr__(self, "shadow_options", MappingProxyType(dict(self.shadow_options)))
        check_share("shadow", self.shadow)
        check_share("changed_allowed", self.changed_allowed)
        check_template(self.template)

    def __repr__(self) -> str:
        """Without the store's user and password: it ends up in messages and traces."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        shown["store"] = redacted(self.store)
        shown |= {n: dict(v) for n, v in shown.items() if isinstance(v, Mapping)}
        return f"BlendConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @classmethod
    def of(cls, options: Mapping[str, Any], what: str) -> BlendConfig:
        """From plain data, such as JSON; ``what`` has these options, for messages.

        Raises:
            ConfigError: unknown options or refused values.
        """
        refuse_unknown(options, {f.name for f in fields(cls)}, what)
        try:
            return cls(**options)
        except (TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{what}: {error}") from error

    def request_defaults(self) -> dict[str, Any]:
        """As plain data, what requests may change, and what else decides their plans."""
        names = (*PER_REQUEST, "min_chunk_tokens", "shadow", "changed_allowed")
        options = {name: getattr(self, name) for name in names}
        tables = ("selector_options", "shadow_options")
        return {**options, **{name: dict(getattr(self, name)) for name in tables}}

    @property
    def is_controlled(self) -> bool:
        """Whether the ratio is moved by what the shadow finds."""
        return self.recompute_ratio == "auto" and self.shadow > 0 and self.mode == "blend"

    def digest(self) -> str:
        """Tells configurations apart, without saying what they are."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def for_call(self, options: BlendOptions) -> BlendConfig:
        """This configuration with one request's own options."""
        if "selector" in options and "selector_options" not in options:
            options = {**options, "selector_options": {}}
        if "chat_template_kwargs" in options:
            given = (self.chat_template_kwargs, options["chat_template_kwargs"])
            options = {**options, "chat_template_kwargs": template_arguments(*given)}
        return replace(self, **options) if options else self


def _token_ids(prefix: object) -> tuple[int, ...]:
    try:
        return token_ids(prefix)
    except PromptError as error:
        raise ConfigError(f"ingest_prefix: {error}") from error


def template_arguments(*given: object) -> dict[str, Any]:
    """Arguments of the chat template, the last ones given where a name comes twice; None is none.

    Raises:
        ConfigError: no arguments, or what rendering sets itself.
    """
    found: dict[str, Any] = {}
    for arguments in given:
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ConfigError(
                f"chat_template_kwargs is {arguments!r}; it must be a dict of the chat template's "
                "arguments, such as {'enable_thinking': False}"
            )
        found |= arguments or {}
    if refused := _TEMPLATE_OWN & found.keys():
        raise ConfigError(
            f"chat_template_kwargs can't set {', '.join(sorted(refused))}; leave it out. For a "
            "prompt of another form, render it yourself and pass text or token ids"
        )
    return found


def _check_ratio(ratio: object) -> None:
    if ratio == "auto":
        return
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise ConfigError(f"recompute_ratio must be a number or 'auto', got {ratio!r}")
    if not 0 <= ratio <= 1:
        raise ConfigError(f"recompute_ratio is {ratio}, but it is a share: 0 (reuse all) to 1")


def _check_refine(refine: object) -> None:
    if refine in ("off", "idle") and isinstance(refine, str):
        return
    if isinstance(refine, bool) or not isinstance(refine, int) or not 1 <= refine < 1 << 31:
        raise ConfigError(
            f"refine is {refine!r}; it must be 'off', 'idle' or a number of tokens a step, 1 or "
            "more"
        )


def _check_text(name: str, value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}; it must be a text, or None for none")


def _check_characters(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} has a lone surrogate ({text[error.start]!a}), which is half of a character; "
            "replace it: text.encode(errors='replace').decode()"
        ) from error


def _one_of(name: str, value: object, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


def config_of(given: object) -> BlendConfig:
    """What was given as a configuration; the default one for None.

    Raises:
        ConfigError: it is none.
    """
    if given is None:
        return BlendConfig()
    if not isinstance(given, BlendConfig):
        raise ConfigError(f"config is {given!r}; it must be a BlendConfig: BlendConfig(mode='off')")
    return given


def refuse_fields_of_start(names: Iterable[str]) -> None:
    """What holds for all calls is no option of one.

    Raises:
        ConfigError: the first such name.
    """
    at_start = {f.name for f in fields(BlendConfig)} - set(BlendOptions.__annotations__)
    for name in names:
        if name in at_start:
            raise ConfigError(f"{name} is set at start, for all calls: BlendConfig({name}=...)")
