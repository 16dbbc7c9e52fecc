"""What requests leave in Prometheus and OpenTelemetry."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cacheblend_rag import metrics
from cacheblend_rag.reason import Reason
from cacheblend_rag.report import BlendReport

BLENDED: dict[str, Any] = {
    "mode": "blend",
    "blended": True,
    "tokens_total": 1000,
    "tokens_reused": 680,
    "tokens_recomputed": 120,
    "tokens_fresh": 150,
    "tokens_prefix_cached": 50,
    "recompute_ratio": 0.15,
    "ttft_s": 0.04,
    "total_s": 0.5,
    "stages_s": {"load": 0.01},
    "bytes_loaded": 7,
}


def plain(reason: Reason, detail: str) -> BlendReport:
    return BlendReport(
        mode="blend",
        blended=False,
        reason=reason,
        detail=detail,
        tokens_total=9,
        tokens_fresh=9,
        ttft_s=0.4,
    )


def test_prometheus_counts_requests_by_reason_tokens_ratios_and_times() -> None:
    prometheus = pytest.importorskip("prometheus_client")

    def value(name: str, **labels: str) -> float:
        return float(prometheus.REGISTRY.get_sample_value(f"cacheblend_{name}", labels) or 0)

    def values() -> list[float]:
        return [
            value("requests_total", reason="blended"),
            value("requests_total", reason="hybrid"),
            value("tokens_total", served="reused"),
            value("tokens_total", served="fresh"),
            value("recompute_ratio_count"),
            value("recompute_ratio_sum"),
            value("ttft_seconds_bucket", blended="yes", le="0.05"),
            value("ttft_seconds_bucket", blended="no", le="0.05"),
            value("ttft_seconds_count", blended="no"),
        ]

    before = values()
    metrics.observe(BlendReport(**BLENDED))
    metrics.observe(BlendReport(**BLENDED))
    metrics.observe(plain(Reason.HYBRID, "2 layers are not attention"))
    grown = [after - was for after, was in zip(values(), before, strict=True)]
    assert grown == pytest.approx([2, 1, 1360, 309, 2, 0.3, 2, 0, 1])


def test_a_request_is_a_span() -> None:
    pytest.importorskip("opentelemetry.sdk.trace")
    code = f"""
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
from cacheblend_rag import metrics
from cacheblend_rag.report import BlendReport
metrics.observe(BlendReport(**{BLENDED!r}))
(span,) = spans.get_finished_spans()
assert span.name == "cacheblend.request", span.name
assert abs(span.end_time - span.start_time - 0.5e9) < 1e6
assert span.attributes["cacheblend.tokens.reused"] == 680, span.attributes
assert span.attributes["cacheblend.recompute_ratio"] == 0.15
assert span.attributes["cacheblend.seconds.load"] == 0.01
assert [event.name for event in span.events] == ["first token"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_neither_package_is_needed() -> None:
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("prometheus_client", "opentelemetry")))
from cacheblend_rag import metrics
from cacheblend_rag.report import BlendReport
metrics.observe(BlendReport(**{BLENDED!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_front_door_counts_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    pytest.importorskip("vllm")
    from fake_engine import fake_blend

    def value() -> float:
        labels = {"reason": "blended"}
        return float(prometheus.REGISTRY.get_sample_value("cacheblend_requests_total", labels) or 0)

    blend, before = fake_blend(monkeypatch), value()
    document = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 8
    blend.ingest(document, progress=False)
    blend.generate(document + "Who sleeps?")
    assert value() == before + 1
