"""Counters for Prometheus and spans for OpenTelemetry. Without these packages nothing happens.

========================================= =========== ==========================================
``cacheblend_store_events_total``         tier, event hits, misses, evictions, corrupt, timed_out
``cacheblend_store_read_bytes_total``     tier        KV handed out
``cacheblend_store_written_bytes_total``  tier        KV put
``cacheblend_store_load_seconds``         tier        histogram of look-ups that found something
========================================= =========== ==========================================

They are in prometheus_client's default registry of the process that opened the store. An engine's
store is in its worker's process: set PROMETHEUS_MULTIPROC_DIR to collect them from there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from cacheblend_rag.once import once

_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)


class _Instruments(NamedTuple):
    events: Any
    read: Any
    written: Any
    seconds: Any


@once
def _instruments() -> _Instruments | None:
    try:
        from prometheus_client import Counter, Histogram
    except ImportError:
        return None
    return _Instruments(
        Counter("cacheblend_store_events", "Events in the chunk store", ["tier", "event"]),
        Counter("cacheblend_store_read_bytes", "Bytes of KV handed out", ["tier"]),
        Counter("cacheblend_store_written_bytes", "Bytes of KV put", ["tier"]),
        Histogram("cacheblend_store_load_seconds", "Seconds of a hit", ["tier"], buckets=_BUCKETS),
    )


# One of a family is found by its labels in twenty microseconds. A blend counts a dozen times before
# its KV starts to come.
@functools.cache
def _event(tier: str, event: str) -> Any:
    instruments = _instruments()
    return None if instruments is None else instruments.events.labels(tier, event)


@functools.cache
def _loads(tier: str) -> tuple[Any, Any] | None:
    instruments = _instruments()
    if instruments is None:
        return None
    return instruments.read.labels(tier), instruments.seconds.labels(tier)


@once
def tracer() -> Any:
    """OpenTelemetry's tracer of ours; None where it is not installed."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace.get_tracer("cacheblend_rag")


def count(tier: str, event: str, times: int) -> None:
    """Count an event."""
    if (counter := _event(tier, event)) is not None:
        counter.inc(times)


def wrote(tier: str, nbytes: int) -> None:
    """Count bytes put."""
    if (instruments := _instruments()) is not None:
        instruments.written.labels(tier).inc(nbytes)


def loaded(tier: str, nbytes: int, seconds: float) -> None:
    """Count a hit's bytes and time."""
    if (counters := _loads(tier)) is not None:
        read, histogram = counters
        read.inc(nbytes)
        histogram.observe(seconds)


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[dict[str, Any]]:
    """A span around the block, with attributes that the block may add to."""
    ours = tracer()
    if ours is None:
        yield attributes
        return
    with ours.start_as_current_span(name) as current:
        yield attributes
        current.set_attributes({f"cacheblend.{key}": value for key, value in attributes.items()})
