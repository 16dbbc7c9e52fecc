"""What happened to a request, and why: returned with every result, never only logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from cacheblend_rag.plan import Kind, Plan, Segment
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.shadow.report import ShadowReport

_ENDED_FIRST = (
    "the answer ended before all was computed again; that goes on only while no other request runs"
)
_COMPUTED = ("fresh", "missing", "timed_out")
_DETAILS = {
    Kind.FRESH: "no stored chunk covers these tokens",
    Kind.REUSE: "stored KV, keys re-rotated",
    Kind.EXACT: "stored KV at its own position, after its own prefix: exact",
    Kind.LEFT_TRUNCATED: "stored KV of a chunk whose head is not in the prompt: twice the ratio",
}


class SegmentReport(NamedTuple):
    """Prompt tokens [start, end) and how they were served."""

    start: int
    end: int
    kind: str  # reused | fresh | missing | timed_out | prefix_cached
    tokens_recomputed: int  # of a reused segment
    detail: str  # why, as a sentence
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class BlendReport:
    """How one request was served.

    The four token counts add up to ``tokens_total`` (the prompt's length).

    Attributes:
        mode: the request's mode.
        blended: whether stored KV was used for this request.
        reason: why not, where it was not; None where it was.
        detail: the same as a sentence, with the particulars.
        tokens_reused: served from stored KV without being recomputed.
        tokens_recomputed: of chunks found in the prompt, recomputed against the fused KV.
        tokens_fresh: computed because nothing stored covers them (glue, question, missing chunks).
        tokens_prefix_cached: taken from vLLM's own prefix cache.
        tokens_refined: computed again while the answer was generated (``refine``); in no other
            count.
        refined: whether all were in the end: the request's KV is a full prefill's, and in vLLM's
            prefix cache as such.
        refine_detail: why not, where a blend was to be refined.
        recompute_ratio: asked for; None where nothing was blended.
        selector: name of the selector; None where nothing was blended.
        ttft_s: seconds from submitting the request to its first token.
        total_s: seconds to the last token.
        stages_s: seconds a stage: ``tokenize`` in the caller; in the engine ``locate``, ``plan``,
            ``fetch`` (waiting for the store), ``load`` (to the device, what nothing else hides),
            ``select`` and ``recompute``, on a GPU by its own clock.
        bytes_loaded: bytes of KV taken from the store, on one rank.
        segments: the prompt from left to right.
        shadow: of a request that was drawn to be computed again, what is known so far; None of the
            others. ``CacheBlend.shadow`` asks anew.
    """

    mode: str
    blended: bool
    tokens_total: int
    reason: Reason | None = None
    detail: str = ""
    tokens_reused: int = 0
    tokens_recomputed: int = 0
    tokens_fresh: int = 0
    tokens_prefix_cached: int = 0
    tokens_refined: int = 0
    refined: bool = False
    refine_detail: str = ""
    recompute_ratio: float | None = None
    selector: str | None = None
    ttft_s: float = 0.0
    total_s: float = 0.0
    stages_s: Mapping[str, float] = field(default_factory=dict)
    bytes_loaded: int = 0
    segments: Sequence[SegmentReport] = ()
    shadow: ShadowReport | None = None

    @property
    def missing_keys(self) -> tuple[str, ...]:
        """Chunks the plan named and the store no longer had."""
        return tuple(s.key for s in self.segments if s.kind == "missing")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = asdict(self)
        data["segments"] = [s._asdict() for s in self.segments]
        return data


def make_report(
    why_not: Why | None,
    engine: Mapping[str, Any],
    *,
    mode: str,
    tokens_total: int,
    ttft_s: float,
    total_s: float,
    tokenize_s: float,
) -> BlendReport:
    """From what the engine says it did.

    Args:
        why_not: why it was not asked to blend; None if it was.
        engine: ``prefix_cached``, and, where it did not blend, ``reason`` and ``detail``; of a
            blend the ``plan``, ``recomputed`` per segment, ``missing``, ``timed_out`` and
            ``unavailable`` segment numbers, ``seconds``, ``bytes``, and what was ``refined`` or
            why it was ``not_refined``; ``shadow`` where it was drawn.
    """
    cached = min(int(engine.get("prefix_cached", 0)), tokens_total)
    common: dict[str, Any] = {
        "mode": mode,
        "tokens_total": tokens_total,
        "ttft_s": ttft_s,
        "total_s": total_s,
        "tokens_prefix_cached": cached,
        "stages_s": {"tokenize": tokenize_s, **engine.get("seconds", {})},
    }
    if why_not or "recomputed" not in engine:
        why = why_not or _why(engine)
        rest = SegmentReport(cached, tokens_total, "fresh", 0, why.detail)
        return _not_blended(why, [*_cached_segment(cached), rest], common)
    plan = Plan.from_dict(engine["plan"])
    segments = [*_cached_segment(cached), *_segments(plan, engine, cached, tokens_total)]
    if not any(s.kind == "reused" for s in segments):
        return _not_blended(_why_nothing_was_reused(segments), segments, common)
    return BlendReport(
        blended=True,
        tokens_reused=sum(
            s.end - s.start - s.tokens_recomputed for s in segments if s.kind == "reused"
        ),
        tokens_recomputed=sum(s.tokens_recomputed for s in segments),
        tokens_fresh=_tokens_fresh(segments),
        recompute_ratio=plan.ratio,
        selector=plan.selector,
        bytes_loaded=int(engine["bytes"]),
        segments=segments,
        shadow=ShadowReport.of(engine.get("shadow")),
        **_refined(plan, engine),
        **common,
    )


def _refined(plan: Plan, engine: Mapping[str, Any]) -> dict[str, Any]:
    """What was computed again of a blend."""
    done = engine.get("refined") or {}
    is_exact = bool(done.get("exact"))
    why_not = engine.get("not_refined") or done.get("detail") or _ENDED_FIRST
    detail = "" if is_exact or plan.refine == "off" else why_not
    return {
        "tokens_refined": int(done.get("tokens", 0)),
        "refined": is_exact,
        "refine_detail": detail,
    }


def _not_blended(
    why: Why, segments: Sequence[SegmentReport], common: Mapping[str, Any]
) -> BlendReport:
    fresh = _tokens_fresh(segments)
    return BlendReport(
        blended=False, **why._asdict(), tokens_fresh=fresh, segments=segments, **common
    )


def _tokens_fresh(segments: Sequence[SegmentReport]) -> int:
    return sum(s.end - s.start for s in segments if s.kind in _COMPUTED)


def _why_nothing_was_reused(segments: Sequence[SegmentReport]) -> Why:
    absent = [s for s in segments if s.kind in ("missing", "timed_out")]
    if absent:
        detail = f"none of the {len(absent)} stored chunks could be had; see the segments"
        return Why(Reason.CHUNKS_MISSING, detail)
    return Why(Reason.PREFIX_CACHED, "what was reused is in vLLM's prefix cache already")


def _segments(
    plan: Plan, engine: Mapping[str, Any], cached: int, tokens_total: int
) -> list[SegmentReport]:
    """Of a blend, behind what vLLM had cached."""
    planned = [
        report
        for i, s in enumerate(plan.segments)
        if (report := _segment(s, engine["recomputed"][i], _absence(engine, i), cached))
    ]
    detail = "the question, and less than a block before it"
    return [*planned, SegmentReport(plan.end, tokens_total, "fresh", 0, detail)]


def _cached_segment(cached: int) -> list[SegmentReport]:
    if not cached:
        return []
    detail = "the same beginning was computed before: vLLM's prefix cache"
    return [SegmentReport(0, cached, "prefix_cached", 0, detail)]


def _why(engine: Mapping[str, Any]) -> Why:
    """Why the engine did not blend."""
    if engine.get("reason"):
        return Why(Reason(engine["reason"]), engine["detail"])
    return Why(Reason.NOT_REPORTED, "the engine did not say what it did")


def _absence(engine: Mapping[str, Any], number: int) -> tuple[str, str] | None:
    """Kind and detail of a segment whose chunk was not used."""
    if number in engine.get("timed_out", ()):
        return "timed_out", "the store would have taken longer with this chunk than computing it"
    if number in engine.get("unavailable", ()):
        return "timed_out", "the store could not be asked for this chunk: computed afresh"
    if number in engine["missing"]:
        return "missing", "the store no longer has this chunk, or it was damaged: computed afresh"
    return None


def _segment(
    s: Segment, recomputed: int, absence: tuple[str, str] | None, cached: int
) -> SegmentReport | None:
    start = max(s.start, cached)
    if start >= s.end:
        return None
    if absence is not None:
        kind, detail = absence
        return SegmentReport(start, s.end, kind, 0, detail, s.key)
    if s.kind is Kind.FRESH:
        return SegmentReport(start, s.end, "fresh", 0, _DETAILS[s.kind])
    return SegmentReport(start, s.end, "reused", recomputed, _DETAILS[s.kind], s.key)
