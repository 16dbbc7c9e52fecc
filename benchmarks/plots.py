"""Results of a benchmark to a file, and to a plot; also the plot later, where matplotlib is.

python benchmarks/plots.py throughput.json throughput.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    parser.add_argument("--plot", type=png, help="also draw a plot there; needs matplotlib")


def png(text: str) -> Path:
    """An option's type, which asks for matplotlib before hours of measuring, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise argparse.ArgumentTypeError(
            "needs matplotlib: pip install matplotlib; or write --json, and draw it elsewhere with "
            "benchmarks/plots.py"
        ) from error
    return Path(text)


def panel(title: str, x: str, y: str, lines: Mapping[str, Sequence[Sequence[float]]]) -> Any:
    """One diagram: points [x, y] of each line."""
    return {"title": title, "x": x, "y": y, "lines": lines}


def stacked(title: str, x: str, bars: Mapping[str, Mapping[str, float]]) -> Any:
    """One diagram: the parts that each bar is made of, the same ones of each."""
    return {"title": title, "x": x, "bars": bars}


def save(args: argparse.Namespace, about: str, rows: Any, panels: Sequence[Any]) -> None:
    """What ``options`` asked for."""
    found = {"about": about, "rows": rows, "panels": panels}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if args.plot:
        draw(found, args.plot)


def draw(found: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    panels = found["panels"]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 4.5 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[len(panels) :]:
        spare.remove()
    for axis, one in zip(axes, panels, strict=False):
        (_draw_bars if "bars" in one else _draw_lines)(axis, one)
        axis.legend(fontsize="small")
    figure.suptitle(found["about"], fontsize="small", wrap=True)
    figure.savefig(path, dpi=110)


def _draw_lines(axis: Any, one: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    for name, points in one["lines"].items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axis.set(xlabel=one["x"], ylabel=one["y"], title=one["title"], xscale="log", yscale="log")
    measured = sorted({x for points in one["lines"].values() for x, _ in points})
    axis.set_xticks(measured, [f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in measured])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")


def _draw_bars(axis: Any, one: Mapping[str, Any]) -> None:
    names, bars = list(one["bars"]), list(one["bars"].values())
    left = [0.0] * len(bars)
    for part in bars[0]:
        widths = [bar[part] for bar in bars]
        axis.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()  # the first one on top
    axis.set(xlabel=one["x"], title=one["title"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("json", type=Path)
    parser.add_argument("png", type=png)
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.png)


if __name__ == "__main__":
    main()
