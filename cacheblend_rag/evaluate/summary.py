"""From results to tables. Pure: the same results give the same numbers, wherever they were run.

A question counts where every row of the results has answered it, so that all rows speak of the same
questions and differences are paired.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cacheblend_rag.errors import DataError
from cacheblend_rag.evaluate.results import Answer, Asked, Results
from cacheblend_rag.evaluate.rows import FULL
from cacheblend_rag.evaluate.score import (
    Interval,
    best,
    detectable,
    exact,
    f1,
    normalised,
    paired_interval,
    rouge_l,
)

HKVD = "hkvd"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One answer's.

    Attributes:
        quality: F1 for questions, Rouge-L for summaries, against the gold answers; None
            where there is none.
        exact: whether it equals a gold answer; None where there is none.
        agree: the same measure against the full prefill's answer.
        changed: 1 where that differs after normalisation.
        kl: KL(full prefill || this), mean over the tokens of its answer, nats; None for ``full``.
        top1: share of these tokens where both find the same token most likely.
        ratio: recomputed of all tokens that came from chunks; None where that is not known.
    """

    quality: float | None
    exact: float | None
    agree: float
    changed: float
    kl: float | None
    top1: float | None
    ratio: float | None
    recomputed: int | None
    ttft_s: float | None


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """One row over one set. Means, but for ``ttft_s``, a median.

    ``to_full`` and ``to_hkvd``: paired differences of ``quality``, ``agree``, ``kl`` to the full
    prefill and to HKVD at the same ratio and prefix, with 95 % intervals. ``detectable``: the
    difference of ``quality`` to the full prefill that these questions can tell, see
    ``score.detectable``.
    """

    row: str
    questions: int
    quality: float | None
    exact: float | None
    agree: float
    changed: float
    kl: float | None
    kl_p95: float | None
    top1: float | None
    ratio: float | None
    recomputed: float | None
    not_blended: int
    ttft_s: float | None
    speedup: float | None
    to_full: Mapping[str, Interval]
    to_hkvd: Mapping[str, Interval]
    detectable: float | None = None


@dataclass(frozen=True, kw_only=True)
class SetSummary:
    """All rows of one set, of several that are pooled under a name, or of all sets of questions
    together (``all``).
    """

    set: str
    measure: str  # F1 or Rouge-L
    questions: int
    left_out: int  # unfinished: some row has no answer yet
    skipped: int  # too long
    rows: Sequence[RowSummary]


def summarise(
    results: Results, *, split: str = "all", pools: Mapping[str, Sequence[str]] | None = None
) -> list[SetSummary]:
    """A summary a set; more than one set of questions are also taken together.

    Args:
        split: ``tune``, ``report`` or ``all``.
        pools: further sets of questions to take together, by the name of each pool.

    Raises:
        DataError: no question is finished; a pool has a set that is not there, or has no F1.
    """
    names = _row_names(results)
    tables: dict[str, list[dict[str, Scores]]] = {}
    measures: dict[str, str] = {}
    left_out: dict[str, int] = {}
    for key, asked in results.asked.items():
        if split not in ("all", asked.half):
            continue
        measures[asked.set] = "F1" if asked.kind == "qa" else "Rouge-L"
        table, answers = tables.setdefault(asked.set, []), results.answers.get(key, {})
        if all(name in answers for name in names):
            table.append({n: score(asked, answers[n], answers[FULL]) for n in names})
        else:
            left_out[asked.set] = left_out.get(asked.set, 0) + 1
    if not any(tables.values()):
        raise DataError("no question is finished: every row has to answer it")
    skipped: dict[str, int] = {}
    for name, _ in results.skipped:
        skipped[name] = skipped.get(name, 0) + 1
    summaries = [
        _summary(name, measures[name], names, rows, left_out.get(name, 0), skipped.get(name, 0))
        for name, rows in sorted(tables.items())
    ]
    questions = [s.set for s in summaries if s.measure == "F1" and s.questions]
    everything = {"all": questions} if len(questions) > 1 else {}
    for pool, members in {**(pools or {}), **everything}.items():
        _check_pool(pool, members, measures, skipped)
        pooled = [scored for name in members for scored in tables.get(name, ())]
        counts = [sum(c.get(n, 0) for n in members) for c in (left_out, skipped)]
        summaries.append(_summary(pool, "F1", names, pooled, *counts))
    return summaries


def _check_pool(
    pool: str, members: Sequence[str], measures: Mapping[str, str], skipped: Mapping[str, int]
) -> None:
    if pool in measures:
        raise DataError(f"the pool {pool!r} has the name of a set: give it another")
    known = {name for name, measure in measures.items() if measure == "F1"}
    if absent := sorted(set(members) - known - (set(skipped) - set(measures))):
        raise DataError(
            f"the pool {pool!r} has {', '.join(absent)}; the sets of questions are "
            f"{', '.join(sorted(known))}"
        )


def score(asked: Asked, answer: Answer, full: Answer) -> Scores:
    """One answer, against the gold answers and the full prefill's."""
    measure = f1 if asked.kind == "qa" else rouge_l
    kl = statistics.fmean(answer.kl) if answer.kl else None
    among = sum(tokens for tokens, _ in answer.chunks)
    again = sum(recomputed for _, recomputed in answer.chunks)
    return Scores(
        quality=best(measure, answer.text, asked.answers),
        exact=best(exact, answer.text, asked.answers),
        agree=measure(answer.text, full.text),
        changed=float(normalised(answer.text) != normalised(full.text)),
        kl=kl,
        top1=answer.same / len(answer.kl) if answer.kl else None,
        ratio=again / among if answer.tokens_recomputed is not None and among else None,
        recomputed=answer.tokens_recomputed,
        ttft_s=None if answer.reason else answer.ttft_s,
    )


def _row_names(results: Results) -> list[str]:
    seen = dict.fromkeys(row for rows in results.answers.values() for row in rows)
    return [FULL, *(name for name in seen if name != FULL)]


def _summary(
    name: str,
    measure: str,
    names: Sequence[str],
    table: Sequence[Mapping[str, Scores]],
    left_out: int,
    skipped: int,
) -> SetSummary:
    return SetSummary(
        set=name,
        measure=measure,
        questions=len(table),
        left_out=left_out,
        skipped=skipped,
        rows=[_row(row, table, names) for row in names] if table else [],
    )


def _row(row: str, table: Sequence[Mapping[str, Scores]], names: Sequence[str]) -> RowSummary:
    mine = [scored[row] for scored in table]
    hkvd = _same_ratio(row)
    pairs = [(s[row].ttft_s, s[FULL].ttft_s) for s in table]
    kls = [s.kl for s in mine if s.kl is not None]
    to_full = _pairs(table, row, FULL, "quality")
    return RowSummary(
        row=row,
        questions=len(mine),
        quality=_mean(s.quality for s in mine),
        exact=_mean(s.exact for s in mine),
        agree=statistics.fmean(s.agree for s in mine),
        changed=statistics.fmean(s.changed for s in mine),
        kl=_mean(kls),
        kl_p95=sorted(kls)[math.ceil(0.95 * len(kls)) - 1] if kls else None,
        top1=_mean(s.top1 for s in mine),
        ratio=_mean(s.ratio for s in mine),
        recomputed=_mean(s.recomputed for s in mine),
        not_blended=sum(s.recomputed is None for s in mine),
        ttft_s=_median(s.ttft_s for s in mine),
        speedup=_median(full / own if own and full else None for own, full in pairs),
        to_full=_differences(table, row, FULL) if row != FULL else {},
        to_hkvd=_differences(table, row, hkvd) if hkvd in names and row != hkvd else {},
        detectable=detectable(to_full) if row != FULL else None,
    )


def _same_ratio(row: str) -> str:
    """HKVD's row at the ratio and prefix of ``row``; a name that doesn't exist if it has none."""
    _, at, rest = row.partition("@")
    return f"{HKVD}{at}{rest}" if at else ""


def _differences(
    table: Sequence[Mapping[str, Scores]], row: str, other: str
) -> dict[str, Interval]:
    found = {}
    for name in ("quality", "agree", "kl"):
        if values := _pairs(table, row, other, name):
            found[name] = paired_interval(values)
    return found


def _pairs(table: Sequence[Mapping[str, Scores]], row: str, other: str, name: str) -> list[float]:
    """What is more in ``row`` than in ``other``, question by question."""
    pairs = [(getattr(s[row], name), getattr(s[other], name)) for s in table]
    return [a - b for a, b in pairs if a is not None and b is not None]


def what_it_tells(summary: SetSummary) -> str:
    """What difference to the full prefill these questions can tell, in a sentence."""
    found = [(r.detectable, r.row) for r in summary.rows if r.detectable is not None]
    if not found:
        return (
            f"What difference in {summary.measure} {summary.questions} questions can tell is not "
            "known: it takes answers of known quality, some of which differ."
        )
    (least, easiest), (most, hardest) = min(found), max(found)
    span = f"{least:.3f} ({easiest})"
    span += f" to {most:.3f} ({hardest})" if hardest != easiest else ""
    return (
        f"{summary.questions} questions tell a true difference in {summary.measure} to the full "
        f"prefill of {span} from none, in four of five samples (paired, two-sided, 5 %)."
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def to_dict(results: Results, summaries: Sequence[SetSummary]) -> dict[str, Any]:
    """Plain data, for JSON."""
    sets = [asdict(s) for s in summaries]
    for one in sets:
        for row in one["rows"]:
            for name in ("to_full", "to_hkvd"):
                row[name] = {k: list(v) for k, v in row[name].items()}
    return {"settings": results.settings, "sets": sets}


def to_markdown(results: Results, summaries: Sequence[SetSummary]) -> str:
    """Tables for people."""
    settings = ", ".join(f"{k} {v}" for k, v in results.settings.items() if k != "format")
    parts = [f"Settings: {settings}.", ""]
    for s in summaries:
        notes = [f"{s.questions} questions"]
        notes += [f"{s.left_out} unfinished left out"] if s.left_out else []
        notes += [f"{s.skipped} too long"] if s.skipped else []
        parts += [f"### {s.set} ({', '.join(notes)})", "", *_table(s), "", what_it_tells(s), ""]
    return "\n".join(parts)


def _table(s: SetSummary) -> list[str]:
    head = [
        "row", s.measure, "exact", f"{s.measure} - full", f"{s.measure} - hkvd", "agree",
        "changed", "KL", "KL - hkvd", "recomputed", "TTFT",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in s.rows:
        cells = [
            r.row,
            _number(r.quality),
            _number(r.exact),
            interval_text(r.to_full.get("quality")),
            interval_text(r.to_hkvd.get("quality")),
            _number(r.agree),
            _number(r.changed),
            _number(r.kl, 4),
            interval_text(r.to_hkvd.get("kl")),
            "" if r.ratio is None else f"{r.recomputed:.0f} ({r.ratio:.1%})",
            "" if r.ttft_s is None else f"{r.ttft_s * 1000:.0f} ms ({r.speedup:.2f}x)",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def interval_text(value: Interval | None) -> str:
    """A mean and its interval, for a table; nothing for None."""
    return "" if value is None else f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
