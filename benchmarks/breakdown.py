"""Where the milliseconds of one blended request go.

    python benchmarks/breakdown.py --shape llama-8b --size 6x1024

The engine runs in this process, one request at a time. ``floor`` is a prompt without chunks: what
vLLM takes for the question alone. ``rest`` is what no stage accounts for: vLLM's own step, which
computes the rows, and the host's work. Medians over rounds; stages of a GPU are by its own clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import plots
from shapes import Words, opened, parser, selecting, size, versions

STAGES = ("tokenize", "locate", "plan", "fetch", "load", "select")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=size, default=(6, 512), metavar="NxT")
    options.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15])
    options.add_argument("--selectors", nargs="+", default=["query", "hkvd"])
    options.add_argument("--rounds", type=int, default=7)
    plots.options(options)
    args = options.parse_args()
    start, (number, each) = time.perf_counter(), args.size
    with opened(args, number * each, in_process=True, blend_if="always") as (blend, words):
        measure(blend, words, time.perf_counter() - start, args)


def measure(blend: Any, words: Words, started: float, args: argparse.Namespace) -> None:
    number, each = args.size
    chunks, head = [words(each) for _ in range(number)], words(48)
    ingested = blend.ingest(chunks, progress=False)
    about = (
        f"{versions(blend)}, {args.shape}, {number} x {each} tokens, "
        f"gpu cache {args.gpu_cache}, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}; start "
        f"{started:.0f} s, ingestion {ingested.tokens / ingested.seconds:.0f} tokens/s"
    )
    print(about)
    modes: dict[str, dict[str, Any]] = {
        "floor": {"mode": "off"},
        "full": {"mode": "full"},
        "reuse": {"mode": "reuse"},
    }
    for ratio in args.ratios:
        for selector in args.selectors:
            modes[f"{selector} {ratio:g}"] = {"recompute_ratio": ratio, **selecting(selector)}
    measured: dict[str, list[tuple[float, Any]]] = {name: [] for name in modes}
    for turn in range(args.rounds + 3):  # the first three warm up
        for name, call in modes.items():
            words.draw.shuffle(chunks)
            body = () if name == "floor" else tuple(t for c in chunks for t in c)
            prompt = head + body + words(32)
            begin = time.perf_counter()
            result = blend.generate(prompt, max_tokens=1, temperature=0.0, **call)
            if turn >= 3:
                measured[name].append((time.perf_counter() - begin, result.report.stages_s))
    bars = {name: parts_ms(of_mode) for name, of_mode in measured.items()}
    show(bars)
    plots.save(args, about, measured, [plots.stacked("One request", "ms", bars)])


def parts_ms(of_mode: list[tuple[float, Any]]) -> dict[str, float]:
    """Medians of the stages, and what is left of the whole."""
    parts = {
        stage: 1e3 * statistics.median(s.get(stage, 0.0) for _, s in of_mode) for stage in STAGES
    }
    whole = 1e3 * statistics.median(seconds for seconds, _ in of_mode)
    return {**parts, "rest": whole - sum(parts.values())}


def show(bars: dict[str, dict[str, float]]) -> None:
    full = sum(bars["full"].values())
    print(f"{'mode':12}{'ms':>9}{'full/mode':>11}", *(f"{part:>10}" for part in bars["full"]))
    for name, parts in bars.items():
        whole = sum(parts.values())
        columns = (f"{ms:10.1f}" for ms in parts.values())
        print(f"{name:12}{whole:9.1f}{full / whole:11.2f}", *columns)


if __name__ == "__main__":
    main()
