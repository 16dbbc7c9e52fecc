"""From a request's token ids to its plan, whoever sent it. It runs where requests are scheduled."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from cacheblend_rag.calibration import Calibration, from_plain, resolved
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.costs import Costs
from cacheblend_rag.errors import CacheBlendError, ConfigError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import KnownChunks, News
from cacheblend_rag.learn import LearnOptions, Prompt
from cacheblend_rag.locate import ANCHOR_MARGIN, Match
from cacheblend_rag.options import PER_REQUEST, blend_options, unknown_option
from cacheblend_rag.plan import NoPlan, Plan, PromptPrefix, make_plan
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.salts import tenant_salt
from cacheblend_rag.shadow.sampling import Drawn, Shadowed
from cacheblend_rag.shadow.steering import Steered, Steering

_OWN = ("space", "request_id")  # in addition to the options of a request
_OTHER_ADAPTER = "the request's LoRA adapter is not that of its chunks"
_NOT_YET = Why(Reason.NOT_READY, "the engine's store is not open yet")


@dataclass(frozen=True, kw_only=True)
class Space:
    """Requests that are planned alike.

    Attributes:
        name: by which a request says that it is one of them.
        keys: what the keys of its chunks depend on.
        prompt_prefix: the prompts' usual first tokens, if they are stored.
        options: fields of ``BlendConfig``, which a request may change for itself.
        calibration: what the ratio ``auto`` stands for.
        default: requests that name no space are of this one.
        adapter: what the requests' LoRA adapter is called; empty for the model alone.
    """

    name: str
    keys: KeySpace
    prompt_prefix: PromptPrefix | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    default: bool = False
    adapter: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Lists, numbers and texts, for an RPC."""
        prompt_prefix = (
            None
            if self.prompt_prefix is None
            else [self.prompt_prefix.key, list(self.prompt_prefix.token_ids)]
        )
        keys, options = self.keys.to_plain(), dict(self.options)
        own = {"name": self.name, "keys": keys, "prompt_prefix": prompt_prefix, "options": options}
        calibration = None if self.calibration is None else self.calibration.to_plain()
        return {**own, "adapter": self.adapter, "calibration": calibration}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Space:
        """The space that ``to_plain`` wrote."""
        keys = KeySpace.from_plain(data["keys"])
        prompt_prefix = (
            PromptPrefix(data["prompt_prefix"][0], tuple(data["prompt_prefix"][1]))
            if data["prompt_prefix"]
            else None
        )
        calibration = data["calibration"] and from_plain(data["calibration"])
        own = {"options": data["options"], "adapter": data["adapter"], "calibration": calibration}
        return cls(name=data["name"], keys=keys, prompt_prefix=prompt_prefix, **own)


class Limits(NamedTuple):
    """What all blends of an engine are held to.

    Attributes:
        why_not: nothing is blended.
        longest: tokens that a blend may cover; None: all.
        costs: what was measured; None where nothing was.
        proving: blends were not proved yet: those that begin are to do it.
    """

    why_not: Why | None = None
    longest: int | None = None
    costs: Costs | None = None
    proving: bool = False

    def behind(self, earlier: Limits) -> Limits:
        """These, where ``earlier`` ones held: once weights were changed, nothing is blended."""
        why_not = earlier.why_not
        is_final = why_not is not None and why_not.reason is Reason.WEIGHTS_CHANGED
        return earlier if is_final else self


class Lost(NamedTuple):
    """Chunks that a blend wanted and the stores do not have."""

    keys: Sequence[str]


class Learning(NamedTuple):
    """Requests teach chunks: these go to the store, where they have no salt and ``to_store``."""

    options: LearnOptions
    to_store: bool


class Expected(NamedTuple):
    """Chunks that only this owner's prompts are searched for, once they are stored."""

    owner: str
    keys: Sequence[str]


Message = Space | Limits | News | Lost | Learning | Expected | Shadowed  # to who plans


class Planned(NamedTuple):
    """A plan or why there is none, the request's mode, the seconds that it took by stage, whether
    the blend has to prove something, the chunks that were found (None where none were looked for),
    and that the answer is to be shadowed, if it was drawn.
    """

    plan: Plan | NoPlan
    mode: str
    seconds: Mapping[str, float]
    proves: bool = False
    matches: Sequence[Match] | None = None
    drawn: Drawn | None = None


class Planner:
    """What of each prompt is reused. ``learn`` is called by one thread at a time.

    Args:
        block_size: tokens a block of the paged cache.
        longest: tokens of which vLLM keeps all blocks; None: all.
    """

    def __init__(self, block_size: int, longest: int | None = None) -> None:
        self._block_size, self._longest = block_size, longest
        self.known = KnownChunks()
        self._limits = Limits(_NOT_YET)
        self._spaces: dict[str, Space] = {}
        self._configs: dict[str, BlendConfig] = {}
        self._read: dict[tuple[str, str], tuple[BlendConfig, BlendConfig]] = {}  # by options
        self.steering = Steering()
        self._default: str | None = None
        self.learning: Learning | None = None

    @property
    def why_not(self) -> Why | None:
        """Why nothing is blended; None where something is."""
        return self._limits.why_not

    @property
    def plans_all(self) -> bool:
        """Whether requests are planned that carry no options of ours."""
        return self._default is not None

    def learn(self, rank: int, message: Message) -> None:
        """Take a message of a rank's worker."""
        if isinstance(message, News):
            self.known.learn(rank, message)
        elif isinstance(message, Limits):
            self._limits = message.behind(self._limits)
        elif isinstance(message, Lost):
            self._lose(message.keys)
        elif isinstance(message, Learning):
            self.learning = message
        elif isinstance(message, Expected):
            self.known.expect(*message)
        elif isinstance(message, Shadowed):
            self.steering.learn(message)
        else:
            self._open(message)

    def space_id(self, options: object) -> str:
        """Tells whose request this is, by its options, without naming them; "" where that is not
        known.
        """
        name = options.get("space") if isinstance(options, Mapping) else None
        space = self._spaces.get(str(name or self._default))
        return "" if space is None else space.keys.key(())

    def plan(
        self,
        token_ids: Sequence[int],
        options: Mapping[str, Any],
        adapter: str = "",
        salt: str | None = None,
    ) -> Planned:
        """Find the known chunks of a prompt, and decide what is reused.

        Args:
            token_ids: the whole prompt.
            options: of the request, by the names of ``options.PER_REQUEST``; and its ``space``.
            adapter: what its LoRA adapter is called; empty for the model alone.
            salt: that of vLLM's prefix cache, which also keeps apart what was learnt.
        """
        start = time.perf_counter()
        try:
            space, asked, config = self._settings(options)
        except CacheBlendError as error:
            return Planned(NoPlan(Reason.MALFORMED_OPTIONS, str(error)), "blend", {})
        if config.mode in ("off", "full"):
            return Planned(NoPlan(Reason.MODE, f"mode is {config.mode!r}"), config.mode, {})
        if self._limits.why_not is not None:
            return Planned(NoPlan(*self._limits.why_not), config.mode, {})
        # Keys differ by adapter, but matches are found by token ids: without this, a request would
        # get the KV of other weights.
        if adapter != space.adapter:
            return Planned(NoPlan(Reason.LORA, _OTHER_ADAPTER), config.mode, {})
        if (why_not := self._too_short(token_ids, config)) is not None:
            return Planned(NoPlan(*why_not), config.mode, {})
        least = config.min_chunk_tokens
        matches = self.known.index(space.name).locate(token_ids, min_tokens=least)
        own = self.known.salted(_owner(space.name, salt)) if self.learning is not None else None
        if own is not None:
            matches = _between(matches, own.locate(token_ids, min_tokens=least), least)
        located = time.perf_counter()
        steered = Steered(config)
        if matches:
            head = _head(token_ids[: matches[0].start], space.prompt_prefix)
            steered = self.steering.steer(asked, config, space.name, space.keys, head)
        plan: Plan | NoPlan
        if steered.why_not is not None:
            plan = NoPlan(*steered.why_not)
        else:
            plan = self._make(token_ids, matches, space, steered.config)
        drawn = None
        if isinstance(plan, Plan):
            plan = replace(plan, space=space.keys.key(()))
            # What proves a blend is exact, and shadows are computed by the model alone.
            if not (self._limits.proving or adapter):
                drawn = self.steering.drawn(space.name, steered)
        seconds = {"locate": located - start, "plan": time.perf_counter() - located}
        return Planned(plan, config.mode, seconds, self._limits.proving, matches, drawn)

    def _too_short(self, token_ids: Sequence[int], config: BlendConfig) -> Why | None:
        """Why a prompt is not searched for chunks: a short one takes as long to search as a GPU
        takes for a part of its prefill.
        """
        is_free = config.mode == "blend" and config.blend_if == "faster"
        # What is learnt from a request depends on what is found in it.
        if not is_free or self.learning is not None or self._limits.costs is None:
            return None
        return self._limits.costs.too_short(len(token_ids))

    def prompt(
        self,
        token_ids: Sequence[int],
        options: Mapping[str, Any],
        salt: str | None,
        matches: Sequence[Match],
    ) -> Prompt:
        """What there is to learn from a request that was planned.

        A chunk whose head is not in the prompt does not count as found: the rest of it is then
        learnt as a chunk of its own.
        """
        assert self.learning is not None
        space, _, config = self._settings(options)
        whole = [match for match in matches if match.offset <= ANCHOR_MARGIN]
        is_salted = _is_salted(space.name, salt)

        def is_worth_it(found: Sequence[tuple[int, int]]) -> bool:
            new = [Match(a, b, f"new-{a}", 0, b - a) for a, b in found]
            trial = sorted([*whole, *new])
            return isinstance(self._make(token_ids, trial, space, config), Plan)

        return Prompt(
            owner=_owner(space.name, salt),
            ids=np.asarray(token_ids, np.int32),
            covered=[(match.start, match.end) for match in whole],
            keys=_salted(space.keys, salt) if is_salted else space.keys,
            is_salted=is_salted,
            to_store=self.learning.to_store and not is_salted,
            is_worth_it=is_worth_it,
        )

    def _make(
        self,
        token_ids: Sequence[int],
        matches: Sequence[Match],
        space: Space,
        config: BlendConfig,
    ) -> Plan | NoPlan:
        longest = self._longest, self._limits.longest
        return make_plan(
            token_ids,
            matches,
            config,
            prefix_ids=space.keys.shared_prefix,
            block_size=self._block_size,
            prompt_prefix=space.prompt_prefix,
            costs=self._limits.costs,
            longest=min((n for n in longest if n is not None), default=None),
        )

    def _open(self, space: Space) -> None:
        self._spaces[space.name] = space
        self._configs[space.name] = BlendConfig(**space.options)
        # Another one: a thread that is reading options by the old configuration keeps them in the
        # old one.
        self._read = {}
        self.steering.open(space.name, self._configs[space.name])
        self.known.open(space.name, space.keys)
        if space.default:
            self._default = space.name

    def _lose(self, keys: Sequence[str]) -> None:
        # A prompt prefix is no known chunk. Its own plan would go on asking for what is gone.
        self.known.lose(keys)
        for name, space in self._spaces.items():
            if space.prompt_prefix is not None and space.prompt_prefix.key in keys:
                self._spaces[name] = replace(space, prompt_prefix=None)

    def _settings(self, options: Mapping[str, Any]) -> tuple[Space, BlendConfig, BlendConfig]:
        """The space of a request, its configuration, and the same with a number for a ratio.

        Raises:
            ConfigError: unknown options or refused values.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(f"the options are a {type(options).__name__}; pass names and values")
        for option in options:
            if option not in PER_REQUEST and option not in _OWN:
                raise unknown_option(str(option), PER_REQUEST, "a request")
        known, name = self._read, options.get("space", self._default)
        if not isinstance(name, str) or name not in self._spaces:
            if not self._spaces:
                asked = BlendConfig()
                return _NOWHERE, asked, resolved(asked, None)
            raise ConfigError("the request's space is not one of this engine's")
        space, own = self._spaces[name], blend_options(options)
        # To check options takes a tenth of a millisecond or more, and most requests have the same.
        key = (name, repr(sorted(own.items()))) if _is_plain(own) else None
        read = known.get(key) if key is not None else None
        if read is None:
            try:
                config = self._configs[name].for_call(own)
            except (TypeError, ValueError, AttributeError) as error:  # of another type than it says
                raise ConfigError(f"refused option: {error}") from error
            read = config, resolved(config, space.calibration, own)
            if key is not None:
                if len(known) >= _MOST_READ:
                    known.clear()
                known[key] = read
        return space, *read


def _is_plain(options: Mapping[str, Any]) -> bool:
    """Whether these are told apart by how they are written, and never change."""
    tables = [value for value in options.values() if type(value) is dict]
    values = [value for value in options.values() if type(value) is not dict]
    inside = [part for table in tables for item in table.items() for part in item]
    return all(type(value) in (str, int, float, bool) for value in (*values, *inside))


def _head(before: Sequence[int], prompt_prefix: PromptPrefix | None) -> Sequence[int]:
    """What tells a prompt's template: its usual first tokens where it has these, since the question
    may stand behind them; else all ``before`` its first chunk.
    """
    usual = () if prompt_prefix is None else prompt_prefix.token_ids
    return usual if usual and tuple(before[: len(usual)]) == usual else before


def _is_salted(space: str, salt: str | None) -> bool:
    """Whether a request has a salt of its own, beside that which its tenant has."""
    return bool(salt) and salt != tenant_salt(space, None)


def _owner(space: str, salt: str | None) -> str:
    """Whose a prompt is: what others teach is never found in it."""
    own = salt if _is_salted(space, salt) else None
    return hashlib.sha256(json.dumps([space, own]).encode()).hexdigest()


def _salted(keys: KeySpace, salt: str | None) -> KeySpace:
    """The key space of what is learnt from requests with a salt of their own."""
    return keys._replace(namespace=f"{keys.namespace}\0salt/{salt}")


def _between(matches: Sequence[Match], others: Sequence[Match], least: int) -> list[Match]:
    """``matches``, and what the ``others`` cover beside them, in stretches of ``least`` tokens at
    the least. Both are disjoint and in order.
    """
    ends = [0, *(match.end for match in matches)]
    starts = [*(match.start for match in matches), sys.maxsize]
    found = list(matches)
    for other in others:
        for low, high in zip(ends, starts, strict=True):
            start, end = max(low, other.start), min(high, other.end)
            if end - start >= least:
                moved = other.offset + start - other.start
                found.append(other._replace(start=start, end=end, offset=moved))
    return sorted(found)


_MOST_READ = 256  # kinds of options that are kept
_NOWHERE = Space(name="", keys=KeySpace("", ()))
