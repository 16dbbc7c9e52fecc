"""From matched chunks to a plan: what is reused, what is computed, and why. Pure: no torch, no I/O.

A plan covers the prompt's tokens [0, end). Its segments are contiguous half-open intervals:

    0          s1         e1   s2              e2          end     question_start      n
    | fresh    | reuse    |fr. | reuse (cut)   | ...       |  tail |  question         |
    '--- some of these tokens have stored KV ---------------'--- all are computed -------'

``end`` is aligned down to a block: the tail of the last chunk, less than one block, is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from cacheblend_rag.config import BlendConfig
from cacheblend_rag.locate import Match
from cacheblend_rag.options import BlendIf, Refine
from cacheblend_rag.reason import Reason, Why

PARAMS_KEY = "cacheblend"  # in vLLM's kv_transfer_params
BOUNDARY_TOKENS = 8  # a chunk that lacks no more than these at its start was cut by the tokeniser
MIN_QUESTION_TOKENS = 8  # a shorter rest is a template's tail, not a question
MAX_QUESTION_TOKENS = 512  # rows of the question pass


class Kind(IntEnum):
    """How a segment is served."""

    FRESH = 0  # no stored KV: always computed
    REUSE = 1  # stored KV, re-rotated; a share of its tokens is recomputed
    EXACT = 2  # stored KV at its own place behind its own prefix: equal to a full prefill's
    LEFT_TRUNCATED = 3  # a chunk without its beginning, which its KV attended to: twice the ratio


class Segment(NamedTuple):
    """Prompt tokens [start, end); for stored KV, from token ``offset`` of chunk ``key`` on."""

    start: int
    end: int
    key: str = ""
    offset: int = 0
    kind: Kind = Kind.FRESH

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done for a request.

    ``space`` tells apart whose chunks these are: of what ingest prefix, say.
    """

    segments: tuple[Segment, ...]
    question_start: int  # end of the last matched chunk
    ratio: float
    selector: str
    selector_options: Mapping[str, Any]
    propagation_length: int = 0
    blend_if: BlendIf = "always"
    refine: Refine = "off"
    space: str = ""

    @property
    def end(self) -> int:
        """The first position behind all segments."""
        return self.segments[-1].end

    def found_from(self, start: int) -> int:
        """How many prompt tokens from ``start`` on are in stored chunks, computed anew or not."""
        ends = [s.end for s in self.segments]
        # A plan ends with a block; its last chunk may end behind it.
        ends[-1] = max(self.end, self.question_start)
        return sum(
            max(0, end - max(s.start, start))
            for s, end in zip(self.segments, ends, strict=True)
            if s.kind is not Kind.FRESH
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for reports."""
        return {
            "segments": [[s.start, s.end, s.key, s.offset, int(s.kind)] for s in self.segments],
            "question_start": self.question_start,
            "blend_if": self.blend_if,
            "refine": self.refine,
            **self._choosing(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote."""
        segments = tuple(Segment(s, e, key, o, Kind(n)) for s, e, key, o, n in data["segments"])
        return cls(**{**data, "segments": segments})

    def question_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens whose attention may choose what is recomputed.

        Every token after the last chunk. Where that is no more than a template's tail, the prompt
        asked before its chunks: then the fresh tokens before them run in front of the tail. A
        prompt of nothing but chunks asks with its last tokens.
        """
        rest = tuple(token_ids[self.question_start :])
        if len(rest) < MIN_QUESTION_TOKENS:
            fresh = [s for s in self.segments if s.kind is Kind.FRESH]
            before = tuple(t for s in fresh for t in token_ids[s.start : s.end])
            rest = before + rest
        return rest[-MAX_QUESTION_TOKENS:] or tuple(token_ids[-MIN_QUESTION_TOKENS:])

    @property
    def settings(self) -> str:
        """A digest of how tokens are chosen: blended KV answers only requests with the same one."""
        return hashlib.sha256(json.dumps(self._choosing(), sort_keys=True).encode()).hexdigest()

    def _choosing(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "selector": self.selector,
            "selector_options": {
                k: list(v) if isinstance(v, tuple) else v for k, v in self.selector_options.items()
            },
            "propagation_length": self.propagation_length,
            "space": self.space,
        }


class PromptPrefix(NamedTuple):
    """What chat template and system prompt put first, stored as a chunk without a prefix."""

    key: str
    token_ids: tuple[int, ...]


class NoPlan(NamedTuple):
    """The request is served as a plain, exact prefill, for this reason."""

    reason: Reason
    detail: str


class Prediction(Protocol):
    """What predicts how long plans take: ``costs.Costs``."""

    def refusal(self, plan: Plan) -> Why | None:
        """Why a plain prefill is as quick; None if it is not."""


def make_plan(
    token_ids: Sequence[int],
    matches: Sequence[Match],
    config: BlendConfig,
    *,
    prefix_ids: Sequence[int] | None,
    block_size: int,
    prompt_prefix: PromptPrefix | None = None,
    costs: Prediction | None = None,
    longest: int | None = None,
) -> Plan | NoPlan:
    """Decide what of a prompt is reused.

    Args:
        token_ids: the whole prompt.
        matches: disjoint and sorted, from ``ChunkIndex.locate``.
        config: mode, ratio and selector of this request.
        prefix_ids: the ingest prefix the chunks were computed behind; None where each has its own,
            which may be another than the prompt's: then no chunk is exact.
        block_size: tokens a block of the paged cache.
        prompt_prefix: the prompts' usual first tokens, stored at position 0.
        costs: what was measured; None where nothing was: then every plan is worth it.
        longest: tokens that a blend may cover; None for all. vLLM computes what lies behind them.
    """
    if config.mode in ("off", "full"):
        return NoPlan(Reason.MODE, f"mode is {config.mode!r}")
    if not matches:
        return NoPlan(Reason.NO_CHUNK_FOUND, "no stored chunk found in the prompt")
    question_start = matches[-1].end
    end = min(question_start, len(token_ids) - 1) // block_size * block_size
    cut = longest is not None and end > longest
    if longest is not None and cut:
        # what comes behind asks, as if it stood there: a window would hide the tokens from it
        question_start = end = longest // block_size * block_size
    segments = tuple(_segments(token_ids, matches, end, prefix_ids))
    segments = _with_prompt_prefix(segments, token_ids, prompt_prefix)
    if all(s.kind is Kind.FRESH for s in segments):
        return _nothing_reused(longest if cut else None, block_size)
    assert config.recompute_ratio != "auto"  # resolved before
    plan = Plan(
        segments=segments,
        question_start=question_start,
        ratio=0.0 if config.mode == "reuse" else float(config.recompute_ratio),
        selector=config.selector,
        selector_options=dict(config.selector_options),
        propagation_length=config.propagation_length,
        blend_if=config.blend_if if config.mode == "blend" else "always",
        refine=config.refine,
    )
    refusal = costs.refusal(plan) if costs is not None and plan.blend_if == "faster" else None
    return NoPlan(*refusal) if refusal else plan


def _nothing_reused(longest: int | None, block_size: int) -> NoPlan:
    """``longest``: where that has cut the plan."""
    if longest is not None:
        detail = f"a sliding window bounds a blend to {longest} tokens, which hold no stored chunk"
        return NoPlan(Reason.SLIDING_WINDOW, detail)
    detail = f"the matched chunks fill no block of {block_size} tokens"
    return NoPlan(Reason.NO_WHOLE_BLOCK, detail)


def _segments(
    token_ids: Sequence[int], matches: Sequence[Match], end: int, prefix: Sequence[int] | None
) -> list[Segment]:
    segments: list[Segment] = []
    at = 0
    for m in matches:
        if m.start >= end:
            break
        if m.start > at:
            segments.append(Segment(at, m.start))
        at = min(m.end, end)
        segments.append(Segment(m.start, at, m.key, m.offset, _kind(token_ids, m, prefix)))
    if at < end:
        segments.append(Segment(at, end))
    return segments


def _with_prompt_prefix(
    segments: tuple[Segment, ...], token_ids: Sequence[int], prompt_prefix: PromptPrefix | None
) -> tuple[Segment, ...]:
    """Serve the prompt's first tokens from the stored prefix: exact, since nothing precedes it."""
    first = segments[0] if segments else None
    if prompt_prefix is None or first is None or first.kind is not Kind.FRESH:
        return segments
    size = len(prompt_prefix.token_ids)
    if size > len(first) or tuple(token_ids[:size]) != prompt_prefix.token_ids:
        return segments
    rest = (Segment(size, first.end),) if size < first.end else ()
    return (Segment(0, size, prompt_prefix.key, 0, Kind.EXACT), *rest, *segments[1:])


def _kind(token_ids: Sequence[int], match: Match, prefix: Sequence[int] | None) -> Kind:
    if match.offset > BOUNDARY_TOKENS:
        return Kind.LEFT_TRUNCATED
    if prefix is None:
        return Kind.REUSE
    in_place = match.offset == 0 and match.start == len(prefix)
    if in_place and tuple(token_ids[: match.start]) == tuple(prefix):
        return Kind.EXACT
    return Kind.REUSE
