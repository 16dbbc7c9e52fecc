"""How far is a blend above what stock vLLM takes for as many rows behind a cached prefix?

    python benchmarks/floor.py --shape llama-8b --size 6x1024 --ratios 0 0.05 0.15

``stock + n`` is plain vLLM on a prompt of which its prefix cache holds all but the last n tokens:
n rows over as long a context, which is what a blend computes too. The difference is the question's
pass, what comes from the store and the host's work. Modes take turns in one engine; medians.
``--trace FILE`` writes a Chrome trace of the last blends, for an engine in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import plots
from shapes import Words, opened, parser, size, versions
from ttft import first_token

WARM_UP = 3


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=size, default=(6, 512), metavar="NxT")
    options.add_argument("--ratios", type=float, nargs="+", default=[0.0, 0.05, 0.15])
    options.add_argument("--propagation-length", type=int, nargs="+", default=[])
    options.add_argument("--question-tokens", type=int, default=32)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--in-process", action="store_true", help="vLLM's engine in this process")
    options.add_argument("--trace", metavar="FILE", help="write a Chrome trace (.json.gz)")
    plots.options(options)
    args = options.parse_args()
    number, each = args.size
    started = time.perf_counter()
    with opened(
        args, number * each, in_process=args.in_process or bool(args.trace), blend_if="always"
    ) as (blend, words):
        about = f"{versions(blend)}, start {time.perf_counter() - started:.0f} s"
        chunks = [words(each) for _ in range(number)]
        blend.ingest(chunks, progress=False)
        run(blend, words, chunks, args, about)


def run(
    blend: Any,
    words: Words,
    chunks: list[tuple[int, ...]],
    args: argparse.Namespace,
    about: str,
) -> None:
    where = "in this process" if args.in_process or args.trace else "serving"
    print(
        f"{about}, {args.shape}, {len(chunks)} x {len(chunks[0])} tokens, {where}, gpu cache "
        f"{args.gpu_cache}, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}"
    )
    modes: dict[str, dict[str, Any]] = {"full": {"mode": "full"}}
    for ratio in args.ratios:
        modes[f"blend {ratio:g}"] = {"recompute_ratio": ratio}
        for length in args.propagation_length if ratio else ():
            name = f"blend {ratio:g} ~{length}"
            modes[name] = {"recompute_ratio": ratio, "propagation_length": length}
    head, whole = words(48), sum(map(len, chunks))
    kept = head + tuple(t for c in chunks for t in c)
    blend.generate(kept, max_tokens=1, mode="off")
    seconds: dict[str, list[float]] = {}
    stages: dict[str, list[dict[str, float]]] = {}
    for turn in range(args.rounds + WARM_UP):
        words.draw.shuffle(chunks)
        body = tuple(t for c in chunks for t in c)
        for name, call in modes.items():
            question = words(args.question_tokens)
            last = turn == args.rounds + WARM_UP - 1
            with traced(args.trace if last and name == list(modes)[-1] else None):
                took, result = first_token(blend, words(48) + body + question, call)
            note(seconds, name, took, turn)
            if turn >= WARM_UP:
                stages.setdefault(name, []).append(result.report.stages_s)
            if name != "full":  # as many rows behind a prefix that vLLM has
                rows = len(head) + whole + len(question) - result.report.tokens_reused
                prompt = kept[: len(kept) + len(question) - rows] + words(rows)
                note(
                    seconds, f"stock + {rows}", first_token(blend, prompt, {"mode": "off"})[0], turn
                )
    show(seconds, stages)
    plots.save(args, about, seconds, [])


def note(seconds: dict[str, list[float]], name: str, took: float, turn: int) -> None:
    if turn >= WARM_UP:
        seconds.setdefault(name, []).append(took)


def show(seconds: dict[str, list[float]], stages: dict[str, list[dict[str, float]]]) -> None:
    full = statistics.median(seconds["full"])
    print(f"{'mode':18}{'ms':>8}{'least':>8}{'full/mode':>11}   stages, ms")
    for name, took in seconds.items():
        of_mode = stages.get(name, [])
        parts = {
            stage: 1e3 * statistics.median(s.get(stage, 0.0) for s in of_mode)
            for stage in (of_mode[-1] if of_mode else ())
        }
        middle = statistics.median(took)
        print(
            f"{name:18}{1e3 * middle:8.1f}{1e3 * min(took):8.1f}{full / middle:11.2f}   "
            + ", ".join(f"{stage} {ms:.1f}" for stage, ms in parts.items()),
            flush=True,
        )


@contextlib.contextmanager
def traced(file: str | None) -> Iterator[None]:
    """Write what happens meanwhile, on host and GPU, to ``file``."""
    if file is None:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        yield
    profiler.export_chrome_trace(file)


if __name__ == "__main__":
    main()
