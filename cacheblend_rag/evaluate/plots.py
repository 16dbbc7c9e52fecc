"""Plots of a summary, where matplotlib is installed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cacheblend_rag.errors import MissingExtraError
from cacheblend_rag.evaluate.rows import FULL
from cacheblend_rag.evaluate.summary import RowSummary, SetSummary

_RATIO = re.compile(r"@[0-9.]+")  # rows that differ in nothing else make a line


def plot(summary: SetSummary, folder: Path) -> list[Path]:
    """Write PNG files of one set: quality, agreement and KL over the share recomputed, and quality
    over the time to the first token where times were taken.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval") from error

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    for axis, (name, label) in zip(
        axes,
        [
            ("quality", summary.measure),
            ("agree", "agreement with full prefill"),
            ("kl", "KL, nats"),
        ],
        strict=True,
    ):
        _over_ratio(axis, summary.rows, name, label)
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{summary.set}: {summary.questions} questions")
    written = [folder / f"{summary.set}-ratio.png"]
    figure.savefig(written[0], dpi=120)

    timed = [r for r in summary.rows if r.ttft_s is not None and r.quality is not None]
    if timed:
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for r in timed:
            assert r.ttft_s is not None and r.quality is not None
            axis.scatter(r.ttft_s * 1000, r.quality, s=16)
            axis.annotate(r.row, (r.ttft_s * 1000, r.quality), fontsize=7)
        axis.set(xlabel="time to first token, ms (median)", ylabel=summary.measure)
        written.append(folder / f"{summary.set}-ttft.png")
        figure.savefig(written[-1], dpi=120)
    return written


def _over_ratio(axis: Any, rows: Sequence[RowSummary], name: str, label: str) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        value = getattr(r, name)
        if value is None:
            continue
        if r.row == FULL:
            axis.axhline(value, color="black", linewidth=0.8, label="full prefill")
        elif r.ratio is not None and r.row != "ratio_1":
            lines.setdefault(_RATIO.sub("", r.row), []).append((r.ratio, value))
    for line, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=line)
    axis.set(xlabel="share recomputed", ylabel=label)
