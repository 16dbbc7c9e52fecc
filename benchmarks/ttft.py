"""Time to first token: full prefill against blended, in turn, in one engine.

    python benchmarks/ttft.py                    # CPU, 0.5B shape, six 512-token chunks
    python benchmarks/ttft.py --shape llama-8b --sizes 6x512 6x1024 --ratios 0 0.05 0.15 0.3

Weights are random (vLLM's ``load_format="dummy"``): latency depends on shapes only. Each round asks
a new question over newly ordered chunks, so vLLM's prefix cache serves no mode but the rivals named
for it: ``shuffled`` finds what earlier rounds left, ``repeated`` the chunks of the request before
in the same order. Modes take turns within a round. Figures are medians over rounds; ``~16`` is a
propagation length of 16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import plots
from shapes import Words, opened, parser, selecting, size, versions


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--sizes", type=size, nargs="+", default=[(6, 512)], metavar="NxT",
        help="chunks and tokens a chunk, such as 6x512 6x1024",
    )  # fmt: skip
    options.add_argument("--question-tokens", type=int, default=32)
    options.add_argument("--ratios", type=float, nargs="+", default=[0.15])
    options.add_argument("--selectors", nargs="+", default=["query", "hkvd"])
    options.add_argument(
        "--propagation-length", type=int, nargs="+", default=[], help="also with each of these"
    )
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--blend-if", default="always", choices=["faster", "always"])
    plots.options(options)
    args = options.parse_args()
    total = max(chunks * tokens for chunks, tokens in args.sizes)
    with opened(args, total, blend_if=args.blend_if) as (blend, words):
        run(blend, words, args)


def run(blend: Any, words: Words, args: argparse.Namespace) -> None:
    about = f"{versions(blend)}, {os.cpu_count()} cores, {args.dtype}, {time.strftime('%Y-%m-%d')}"
    modes, measured = modes_of(args), {}
    lines: dict[str, list[list[float]]] = {name: [] for name in modes}
    for number, each in args.sizes:
        chunks = [words(each) for _ in range(number)]
        ingested = blend.ingest(chunks, progress=False)
        rows = measure(blend, words, chunks, modes, args.rounds, args.question_tokens)
        print(about)
        print(
            f"{args.shape}{f' of {args.layers} layers' if args.layers else ''}, "
            f"{number} x {each} tokens of chunks, question {args.question_tokens}, "
            f"block {blend.info.block_size}, {args.rounds} rounds; ingestion "
            f"{ingested.tokens / ingested.seconds:.0f} tokens/s"
        )
        show(rows)
        measured[f"{number}x{each}"] = rows
        for name, of_mode in rows.items():
            lines[name].append([number * each, 1e3 * median(of_mode)])
    panel = plots.panel(args.shape, "tokens of chunks", "TTFT, ms", lines)
    plots.save(args, about, measured, [panel])


def modes_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each row passes to a call."""
    modes: dict[str, dict[str, Any]] = {
        "full": {"mode": "full"},
        "prefix cache, shuffled": {"mode": "off"},
        "prefix cache, repeated": {"mode": "off"},
    }
    for ratio in args.ratios:
        for selector in args.selectors if ratio else args.selectors[:1]:
            name = f"{selector} {ratio:g}" if ratio else "reuse"
            modes[name] = {"recompute_ratio": ratio, **selecting(selector)}
            for propagation_length in args.propagation_length if ratio else ():
                modes[f"{name} ~{propagation_length}"] = {
                    **modes[name],
                    "propagation_length": propagation_length,
                }
    return modes


def measure(
    blend: Any,
    words: Words,
    chunks: list[tuple[int, ...]],
    modes: dict[str, dict[str, Any]],
    rounds: int,
    question_tokens: int = 32,
) -> dict[str, list[dict[str, Any]]]:
    """Every mode's TTFT in each round."""
    heads = {True: words(48), False: words(48)}  # the prefix cache's own, so that it helps no other
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    for turn in range(rounds + 1):  # the first warms up
        words.draw.shuffle(chunks)
        for name, call in modes.items():
            head = heads[call.get("mode") == "off"]
            prompt = head + tuple(t for c in chunks for t in c) + words(question_tokens)
            seconds, result = first_token(blend, prompt, call)
            if turn:
                rows[name].append({"ttft_s": seconds, "report": result.report.to_dict()})
    return rows


def first_token(blend: Any, prompt: tuple[int, ...], call: dict[str, Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    stream = blend.stream(prompt, max_tokens=1, temperature=0.0, **call)
    next(stream)
    seconds = time.perf_counter() - start
    for _ in stream:
        pass
    return seconds, stream.result


def median(of_mode: list[dict[str, Any]]) -> float:
    return statistics.median(r["ttft_s"] for r in of_mode)


def show(rows: dict[str, list[dict[str, Any]]]) -> None:
    full = median(rows["full"])
    print(f"{'mode':24}{'TTFT ms':>10}{'full/mode':>11}   engine ms: load, select; tokens")
    for name, of_mode in rows.items():
        report = of_mode[-1]["report"]
        stages = [
            1e3 * statistics.median(r["report"]["stages_s"].get(stage, 0) for r in of_mode)
            for stage in ("load", "select")
        ]
        took, parts = median(of_mode), ", ".join(f"{v:.1f}" for v in stages)
        print(
            f"{name:24}{took * 1e3:10.1f}{full / took:11.2f}   {parts}; reused "
            f"{report['tokens_reused']}, recomputed {report['tokens_recomputed']}, cached "
            f"{report['tokens_prefix_cached']}, fresh {report['tokens_fresh']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
