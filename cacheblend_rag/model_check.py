"""The model check: a model blends only after it was shown, on this machine, that it can do so
exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cacheblend_rag.engine.base import EngineInfo, LayerCheck, ModelCheck
from cacheblend_rag.reason import Reason

Distribution = Mapping[int, float]  # token id -> log-probability, the likeliest ones

# relative error of moved keys and values; share of the next token's listed probability that
# differs. Rounding of half precision stays well below, a wrong rotation or fusion is near 1.
_TOLERANCE = {"float32": (2e-3, 1e-3)}
_HALF_TOLERANCE = (0.15, 0.25)
_LONGEST_ON_CPU = 1024  # tokens of a window that the probe exceeds; a real model takes seconds


def tolerance(dtype: str) -> tuple[float, float]:
    """Bounds for (layer errors, next-token distance) in ``dtype``."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def check_layers(info: EngineInfo) -> ModelCheck:
    """Judge what the workers found when they moved keys: one row a layer and shift."""
    bound = tolerance(info.dtype)
    if info.refusal:
        return ModelCheck(passed=False, **info.refusal._asdict(), tolerance=bound)
    checks = [_layer_check(row, bound[0]) for row in info.extra.get("checks", ())]
    assert checks, "the workers checked no layer"
    bad = [c for c in checks if not c.ok]
    reason, detail = _attention_check(info)
    if bad:
        worst = max(bad, key=lambda c: max(c.key_error, c.value_error))
        reason = Reason.MOVED_KEYS_DIFFER
        detail = (
            f"{len({c.layer for c in bad})} layers have keys or values that depend on position in "
            f"another way than RoPE (layer {worst.layer}: error {worst.key_error:.3g} of keys, "
            f"{worst.value_error:.3g} of values, {bound[0]:g} allowed)"
        )
    return ModelCheck(
        passed=reason is None,
        reason=reason,
        detail=detail,
        layers=checks,
        tolerance=bound,
        max_tokens=info.longest_blend,
    )


def _attention_check(info: EngineInfo) -> tuple[Reason | None, str]:
    """Judge what our own attention puts out, which ingestion and the question's scores rest on."""
    for layer, error, is_rounded in info.extra.get("attention", ()):
        bound = (_HALF_TOLERANCE if is_rounded else tolerance(info.dtype))[0]
        if not error <= bound:  # true for NaN
            detail = (
                f"attention outside of the paged cache is not the backend's (layer {layer}: error "
                f"{error:.3g}, {bound:g} allowed)"
            )
            return Reason.ATTENTION_DIFFERS, detail
    return None, ""


def check_prefill(
    report: ModelCheck, plain: Distribution, blended: Distribution, why_not: str = ""
) -> ModelCheck:
    """Judge ratio 1 against a plain prefill of the same prompt.

    ``why_not``: why it was not blended; empty if it was.
    """
    error = total_variation(plain, blended)
    bound = report.tolerance[1]
    reason, detail = None, ""
    if why_not:
        reason = Reason.PROBE_NOT_BLENDED
        detail = f"the probe prompt was not blended by the engine: {why_not}"
    elif not error <= bound:
        reason = Reason.RATIO_ONE_DIFFERS
        detail = (
            f"recomputing every token does not give the plain prefill's distribution (total "
            f"variation distance {error:.3g}, {bound:g} allowed)"
        )
    return replace(report, passed=not reason, reason=reason, detail=detail, prefill_error=error)


def total_variation(p: Distribution, q: Distribution) -> float:
    """Half the summed difference of probabilities, tokens not listed counting as 0: as a share of
    what is listed, which may be little, as random prompts have no likely continuation.
    """
    tokens = set(p) | set(q)
    difference = 0.5 * sum(
        abs(math.exp(p.get(t, -math.inf)) - math.exp(q.get(t, -math.inf))) for t in tokens
    )
    listed = max(sum(map(math.exp, p.values())), sum(map(math.exp, q.values())))
    return difference / listed if listed else math.nan


class Probe(NamedTuple):
    """The probe prompt: a prompt prefix, a chunk as many times as it takes, a question."""

    prompt_prefix: tuple[int, ...]
    chunk: tuple[int, ...]
    times: int
    question: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole prompt."""
        return self.prompt_prefix + self.chunk * self.times + self.question

    @property
    def starts(self) -> list[int]:
        """Where the chunk stands."""
        return [len(self.prompt_prefix) + i * len(self.chunk) for i in range(self.times)]


def probe(info: EngineInfo) -> Probe | None:
    """The same at every start: longer than any sliding window, where the context has room for that
    and the device computes it in seconds. None where a block and a question do not fit.
    """
    words = _words(info, seed=20)
    prompt_prefix, chunk, question = words(5), words(2 * info.block_size + 32), words(24)
    room = (info.max_model_len - 1 - len(prompt_prefix + question)) // len(chunk)
    window = info.window or 0
    long = window if info.device != "cpu" or window <= _LONGEST_ON_CPU else 0
    times = long // len(chunk) + 2 if long else 1
    return Probe(prompt_prefix, chunk, min(times, room), question) if room else None


def within_what_was_proved(report: ModelCheck, info: EngineInfo, tokens: int) -> ModelCheck:
    """``report`` of a probe of so many ``tokens``: what is longer than a sliding window is blended
    only if the probe was.
    """
    window = info.window
    if window is None or tokens > window + 1 or window >= info.max_model_len:
        return report
    bound = window if report.max_tokens is None else min(window, report.max_tokens)
    return replace(report, max_tokens=bound)


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
    prompt_prefix, chunk = words(2 * info.block_size), words(size)
    return [(prompt_prefix, chunk, words(32)) for _ in range(rounds)]


def _words(info: EngineInfo, seed: int) -> Callable[[int], tuple[int, ...]]:
    import random

    draw = random.Random(seed)
    low, high = info.vocab_size // 10, max(info.vocab_size // 10 + 2, info.vocab_size * 9 // 10)
    return lambda n: tuple(draw.randrange(low, high) for _ in range(n))


def table(report: ModelCheck) -> Sequence[Mapping[str, Any]]:
    """The layers' rows as plain data."""
    return [c._asdict() for c in report.layers]


def _layer_check(row: Sequence[Any], bound: float) -> LayerCheck:
    layer, shift, key_error, value_error = row
    ok = key_error <= bound and value_error <= bound  # false for NaN
    return LayerCheck(int(layer), int(shift), float(key_error), float(value_error), ok)
