"""How does the time to a first token grow? With context, chunks, requests at once, and the corpus.

    python benchmarks/scaling.py --shape llama-8b --size 6x1024

One engine, full prefills and blends in turn, medians over rounds. One thing grows at a time, the
rest is as ``--size`` says: the tokens of a chunk; the number of chunks, of as many tokens together;
requests sent together; other, small chunks in the store.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterable
from typing import Any

import plots
from serving import Load
from shapes import opened, parser, size, versions

MODES: dict[str, dict[str, Any]] = {"full": {"mode": "full"}, "blend": {}}
Point = list[float]  # what grew, and the TTFT of each mode


class Scaling:
    """Measures over one engine."""

    def __init__(self, load: Load, args: argparse.Namespace) -> None:
        self.load, self.rounds = load, args.rounds
        self.number, self.each = args.size
        self.small_tokens, self.stored = args.small_tokens, 0

    async def of(self, number: int, each: int, together: int = 1) -> list[float]:
        """Median TTFT of each mode, over so many new chunks of so many tokens."""
        load = self.load
        load.pool = [load.words(each) for _ in range(number)]
        load.blend.ingest(load.pool, progress=False)
        ttft: dict[str, list[float]] = {name: [] for name in MODES}
        for turn in range(self.rounds + 1):  # the first warms up
            for name, call in MODES.items():
                sent = (load.request(load.some(number), 1, **call) for _ in range(together))
                found = [at[0] for at in await asyncio.gather(*sent)]
                if turn:
                    ttft[name] += found
        load.blend.forget(load.pool)
        return [statistics.median(seconds) for seconds in ttft.values()]

    async def context(self, tokens: int) -> list[float]:
        return await self.of(self.number, tokens)

    async def chunks(self, number: int) -> list[float]:
        return await self.of(number, self.number * self.each // number)

    async def requests(self, together: int) -> list[float]:
        return await self.of(self.number, self.each, together)

    async def corpus(self, chunks: int) -> list[float]:
        some = [self.load.words(self.small_tokens) for _ in range(self.stored, chunks)]
        self.load.blend.ingest(some, progress=False)
        self.stored = max(self.stored, chunks)
        return await self.of(self.number, self.each)


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(store="memory://?capacity=64GiB")
    options.add_argument("--size", type=size, default=(6, 512), metavar="NxT")
    options.add_argument("--context", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    options.add_argument("--chunks", type=int, nargs="*", default=[1, 3, 6, 12, 24, 48])
    options.add_argument("--requests", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    options.add_argument("--corpus", type=int, nargs="*", default=[100, 1000, 10000])
    options.add_argument("--small-tokens", type=int, default=32, help="of the corpus's chunks")
    options.add_argument("--ratio", type=float, default=0.15)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--blend-if", default="always", choices=["faster", "always"])
    plots.options(options)
    args = options.parse_args()
    number, each = args.size
    longest = number * max([each, *args.context])
    with opened(args, longest, recompute_ratio=args.ratio, blend_if=args.blend_if) as (
        blend,
        words,
    ):
        about = (
            f"{versions(blend)}, {args.shape}, {number} x {each} tokens of chunks, ratio "
            f"{args.ratio}, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}"
        )
        print(about)
        scaling = Scaling(Load(blend, words, []), args)
        points = asyncio.run(run(scaling, args))
    panels = [
        plots.panel("", what, "TTFT, ms", lines(of_what))
        for what, of_what in points.items()
        if of_what
    ]
    plots.save(args, about, points, panels)


async def run(scaling: Scaling, args: argparse.Namespace) -> dict[str, list[Point]]:
    return {
        what: await table(what, measure, values)
        for what, measure, values in (
            ("tokens of a chunk", scaling.context, args.context),
            ("chunks, the same tokens together", scaling.chunks, args.chunks),
            ("requests together", scaling.requests, args.requests),
            ("other chunks in the store", scaling.corpus, sorted(args.corpus)),
        )
    }


async def table(what: str, measure: Any, values: Iterable[int]) -> list[Point]:
    print(f"{what:34}{'full ms':>10}{'blend ms':>10}{'full/blend':>12}")
    points = []
    for value in values:
        full, blend = await measure(value)
        points.append([value, full, blend])
        print(f"{value:34}{1e3 * full:10.1f}{1e3 * blend:10.1f}{full / blend:12.2f}", flush=True)
    return points


def lines(points: list[Point]) -> dict[str, list[list[float]]]:
    return {
        name: [[point[0], 1e3 * point[column]] for point in points]
        for column, name in enumerate(MODES, 1)
    }


if __name__ == "__main__":
    main()
