"""Requests for Prometheus and OpenTelemetry, from their reports. Without these packages nothing
happens. The store counts for itself, in the engine's process: ``cacheblend_rag.store.metrics``.

================================= ======= ========================================================
``cacheblend_requests_total``     reason  requests: ``blended``, or the ``Reason`` why not
``cacheblend_tokens_total``       served  prompt tokens: reused, recomputed, fresh, prefix_cached
``cacheblend_recompute_ratio``            histogram: share of the chunks' tokens that was recomputed
``cacheblend_ttft_seconds``       blended histogram of the time to the first token
================================= ======= ========================================================
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from cacheblend_rag.once import once
from cacheblend_rag.report import BlendReport
from cacheblend_rag.store.metrics import tracer

_RATIOS = (0.01, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30)
_SERVED = ("reused", "recomputed", "fresh", "prefix_cached")


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
