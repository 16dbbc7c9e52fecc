"""The gate: a model blends only after it was shown, on this machine, that it can do so exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cacheblend_rag.engine.base import EngineInfo, GateReport, LayerCheck
from cacheblend_rag.reason import Reason

Distribution = Mapping[int, float]  # token id -> log-probability, the likeliest ones

# relative error of moved keys and values; total variation distance of the next token. Rounding
# of half precision stays well below, a wrong rotation or a wrong fusion is near 1.
_TOLERANCE = {"float32": (2e-3, 1e-3)}
_HALF_TOLERANCE = (0.15, 0.1)


def tolerance(dtype: str) -> tuple[float, float]:
    """Bounds for (layer errors, next-token distance) in ``dtype``."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def check_layers(info: EngineInfo) -> GateReport:
    """Judge what the workers found when they moved keys: one row a layer and shift."""
    bound = tolerance(info.dtype)
    if info.refusal:
        return GateReport(passed=False, **info.refusal._asdict(), tolerance=bound)
    checks = [_layer_check(row, bound[0]) for row in info.extra.get("checks", ())]
    bad = [c for c in checks if not c.ok]
    reason, detail = None, ""
    if bad:
        worst = max(bad, key=lambda c: max(c.key_error, c.value_error))
        reason = Reason.MOVED_KEYS_DIFFER
        detail = (
            f"{len({c.layer for c in bad})} layers have keys or values that depend on position in "
            f"another way than RoPE (layer {worst.layer}: error {worst.key_error:.3g} of keys, "
            f"{worst.value_error:.3g} of values, {bound[0]:g} allowed)"
        )
    return GateReport(passed=not bad, reason=reason, detail=detail, layers=checks, tolerance=bound)


def check_prefill(
    report: GateReport, plain: Distribution, blended: Distribution, blended_at_all: bool
) -> GateReport:
    """Judge ratio 1 against a plain prefill of the same prompt."""
    error = total_variation(plain, blended)
    bound = report.tolerance[1]
    reason, detail = None, ""
    if not blended_at_all:
        reason = Reason.PROBE_NOT_BLENDED
        detail = "the probe prompt was not blended by the engine"
    elif not error <= bound:
        reason = Reason.RATIO_ONE_DIFFERS
        detail = (
            f"recomputing every token does not give the plain prefill's distribution (total "
            f"variation distance {error:.3g}, {bound:g} allowed)"
        )
    return GateReport(
        passed=not reason,
        reason=reason,
        detail=detail,
        layers=report.layers,
        prefill_error=error,
        tolerance=report.tolerance,
    )


def total_variation(p: Distribution, q: Distribution) -> float:
    """Half the summed difference of probabilities, tokens not listed counting as 0."""
    tokens = set(p) | set(q)
    return 0.5 * sum(
        abs(math.exp(p.get(t, -math.inf)) - math.exp(q.get(t, -math.inf))) for t in tokens
    )


def probe_ids(info: EngineInfo) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Token ids of the probe prompt's head, chunk and question; the same at every start."""
    words = _words(info, seed=20)
    return words(5), words(2 * info.block_size + 32), words(24)


def timing_ids(
    info: EngineInfo, rounds: int
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Token ids of as many prompts' heads, one chunk, and other questions each; none where the
    context has no room for a chunk that tells anything.
    """
    size = min(1024, info.max_model_len - 3 * info.block_size - 64, info.max_num_batched_tokens)
    if size < 256:
        return []
    words = _words(info, seed=21)
    head, chunk = words(2 * info.block_size), words(size)
    return [(head, chunk, words(32)) for _ in range(rounds)]


def _words(info: EngineInfo, seed: int) -> Callable[[int], tuple[int, ...]]:
    import random

    draw = random.Random(seed)
    low, high = info.vocab_size // 10, max(info.vocab_size // 10 + 2, info.vocab_size * 9 // 10)
    return lambda n: tuple(draw.randrange(low, high) for _ in range(n))


def table(report: GateReport) -> Sequence[Mapping[str, Any]]:
    """The layers' rows as plain data."""
    return [c._asdict() for c in report.layers]


def _layer_check(row: Sequence[Any], bound: float) -> LayerCheck:
    layer, shift, key_error, value_error = row
    ok = key_error <= bound and value_error <= bound  # false for NaN
    return LayerCheck(int(layer), int(shift), float(key_error), float(value_error), ok)
