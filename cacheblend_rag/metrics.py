"""Requests for Prometheus and OpenTelemetry, from their reports. Without these packages nothing
happens. The store counts for itself, in the engine's process: ``cacheblend_rag.store.metrics``.

================================= ======= ========================================================
``cacheblend_requests_total``     reason  requests: ``blended``, or the ``Reason`` why not
``cacheblend_tokens_total``       served  prompt tokens: reused, recomputed, fresh, prefix_cached
``cacheblend_recompute_ratio``            histogram: share of the chunks' tokens that was recomputed
``cacheblend_ttft_seconds``       blended histogram of the time to the first token
``cacheblend_shadow_kl``          (below) histogram: KL(exact || blended) in nats, an answer's mean
``cacheblend_shadow_agreement``   (below) histogram: share of an answer's tokens that are exact's
``cacheblend_shadow_answers_total``       the same answers by ``changed``: no, first (token), later
``cacheblend_shadow_dropped_total`` reason drawn answers that were never computed again
================================= ======= ========================================================

Those of the shadow are counted by ``namespace`` (empty for the server's own, else a digest),
``template`` and ``ratio``; ``other`` stands for all behind the first 64 pairs of the first two. A
server has them in the process that runs its ingestions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cacheblend_rag.once import once
from cacheblend_rag.report import BlendReport
from cacheblend_rag.shadow import Figures
from cacheblend_rag.shadow.sampling import Names, ratio_name
from cacheblend_rag.store.metrics import tracer

_RATIOS = (0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
_KL = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
_AGREEMENT = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.999)
_OF_SHADOW = ("namespace", "template", "ratio")
_names = Names()
_SERVED = ("reused", "recomputed", "fresh", "prefix_cached")


class _ShadowInstruments(NamedTuple):
    kl: Any
    agreement: Any
    answers: Any
    dropped: Any


class _Instruments(NamedTuple):
    requests: Any
    tokens: Any
    ratio: Any
    ttft: Any


@once
def _instruments() -> _Instruments | None:
    try:
        from prometheus_client import Counter, Histogram
    except ImportError:
        return None
    return _Instruments(
        Counter("cacheblend_requests", "Requests, blended or why not", ["reason"]),
        Counter("cacheblend_tokens", "Prompt tokens by how they were served", ["served"]),
        Histogram("cacheblend_recompute_ratio", "Share recomputed of chunks", buckets=_RATIOS),
        Histogram("cacheblend_ttft_seconds", "To the first token", ["blended"], buckets=_SECONDS),
    )


@once
def _shadow_instruments() -> _ShadowInstruments | None:
    try:
        from prometheus_client import Counter, Histogram
    except ImportError:
        return None
    return _ShadowInstruments(
        Histogram("cacheblend_shadow_kl", "KL from exact, in nats", _OF_SHADOW, buckets=_KL),
        Histogram("cacheblend_shadow_agreement", "Tokens as exact", _OF_SHADOW, buckets=_AGREEMENT),
        Counter("cacheblend_shadow_answers", "Compared answers", [*_OF_SHADOW, "changed"]),
        Counter("cacheblend_shadow_dropped", "Answers that were not compared", ["reason"]),
    )


def observe_shadows(done: Sequence[Any] | None, dropped: Mapping[str, int]) -> None:
    """Count answers that were computed again, or dropped.

    Args:
        done: namespace, template, ratio and ``Figures`` of an answer; None: there is none.
        dropped: how many were, by reason.
    """
    if (instruments := _shadow_instruments()) is None:
        return
    for reason, count in dropped.items():
        instruments.dropped.labels(reason).inc(count)
    if done is not None:
        namespace, template, ratio, plain = done
        figures = Figures(*plain)
        of = (*_names.of(namespace, template), ratio_name(ratio))
        instruments.kl.labels(*of).observe(figures.kl)
        instruments.agreement.labels(*of).observe(figures.agreement)
        later = "later" if figures.changed else "no"
        instruments.answers.labels(*of, "first" if figures.first_changed else later).inc()


def observe(report: BlendReport) -> None:
    """Count a request that was just answered, and make it a span."""
    in_chunks = report.tokens_reused + report.tokens_recomputed
    ratio = report.tokens_recomputed / in_chunks if in_chunks else None
    if (instruments := _instruments()) is not None:
        instruments.requests.labels(report.reason or "blended").inc()
        for served in _SERVED:
            instruments.tokens.labels(served).inc(getattr(report, f"tokens_{served}"))
        if ratio is not None:
            instruments.ratio.observe(ratio)
        instruments.ttft.labels("yes" if report.blended else "no").observe(report.ttft_s)
    if (of_requests := tracer()) is not None:
        now = time.time_ns()
        started = now - int(report.total_s * 1e9)
        span = of_requests.start_span("cacheblend.request", start_time=started)
        span.set_attributes(_attributes(report, ratio))
        span.add_event("first token", timestamp=started + int(report.ttft_s * 1e9))
        span.end(now)


def _attributes(report: BlendReport, ratio: float | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "mode": report.mode,
        "blended": report.blended,
        "reason": report.reason or "",
        "detail": report.detail,
        "ttft_s": report.ttft_s,
        "bytes_loaded": report.bytes_loaded,
    }
    facts |= {f"tokens.{name}": getattr(report, f"tokens_{name}") for name in ("total", *_SERVED)}
    facts |= {f"seconds.{stage}": seconds for stage, seconds in report.stages_s.items()}
    if ratio is not None:
        facts["recompute_ratio"] = ratio
    return {f"cacheblend.{name}": value for name, value in facts.items()}
