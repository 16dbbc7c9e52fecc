"""How many requests a second at what time to first token? Poisson arrivals, a Zipf-shared corpus.

    python benchmarks/throughput.py --shape llama-8b --chunk-tokens 1024 --rates 2 4 8 16

Requests arrive whether or not earlier ones are done. Each asks a new question about six chunks in
random order, popular ones more often (Zipf's law). Modes take turns in one engine at each rate,
over the same arrivals and draws, behind a head of their own, so that none finds what another
cached: ``full`` (a plain prefill), ``off`` (vLLM's prefix cache, which has seen every chunk in the
first place), ``blend``. A rate is sustained while requests are served as fast as they arrive; a
mode that could not is not asked for more. At equal p95 TTFT, the highest sustained rate of each is
compared. TTFT counts from the arrival; steps are the gaps between the tokens of all streams.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import plots
from serving import MODES, Load, about, at_equal_p95, loaded, options, percentile95, steps


class Arrival(NamedTuple):
    """A request to come."""

    at: float  # seconds from the start
    chosen: list[int]  # chunks of the pool


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(pool=64)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent; 0: all alike")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--seconds", type=float, default=15, help="of arrivals, at each rate")
    parser.add_argument(
        "--keep-up", type=float, default=0.95,
        help="a rate is sustained where served/s is at least this share of arrivals/s",
    )  # fmt: skip
    plots.options(parser)
    args = parser.parse_args()
    with loaded(args) as load:
        line = (
            f"{about(load, args)}, Zipf {args.zipf:g}, arrivals of {args.seconds:g} s, sustained: "
            f"{args.keep_up:.0%} served"
        )
        print(line)
        rows = asyncio.run(run(load, args))
    lines = {
        name: [[r["arrived"], 1e3 * r["p95"]] for r in rows if r["mode"] == name] for name in MODES
    }
    panel = plots.panel("Poisson arrivals", "requests/s", "TTFT p95, ms", lines)
    plots.save(args, line, rows, [panel])


async def run(load: Load, args: argparse.Namespace) -> list[dict[str, Any]]:
    heads = {name: load.words(len(load.head)) for name in MODES}
    for name, call in MODES.items():
        load.head = heads[name]
        for number in range(args.pool if name == "off" else 3):
            await load.request(load.prompt([number]), 1, **call)
        warm = (load.request(load.some(args.chunks), 4, **call) for _ in range(4))
        await asyncio.gather(*warm)
    print(
        f"{'mode':7}{'arrive/s':>9}{'served/s':>9}{'requests':>9}{'TTFT p50 ms':>12}{'p95':>9}"
        f"{'step p50 ms':>12}{'p95':>8}{'blended':>9}"
    )
    rows: list[dict[str, Any]] = []
    keeping_up = set(MODES)
    for number, rate in enumerate(sorted(args.rates)):
        coming = arrivals(rate, args, np.random.default_rng(number))
        for name, call in MODES.items():
            if name not in keeping_up:
                continue
            load.head = heads[name]
            row = {"mode": name, **await serve(load, coming, args.output_tokens, call)}
            row["sustained"] = row["rps"] >= args.keep_up * row["arrived"]
            if not row["sustained"]:
                keeping_up.remove(name)
            rows.append(row)
            show(row)
    at_equal_p95([r for r in rows if r["sustained"]])
    return rows


def arrivals(rate: float, args: argparse.Namespace, rng: np.random.Generator) -> list[Arrival]:
    """Requests of ``args.seconds``, at least twenty."""
    popularity = 1 / np.arange(1, args.pool + 1) ** args.zipf
    popularity /= popularity.sum()
    count = max(20, round(rate * args.seconds))
    times = rng.exponential(1 / rate, count).cumsum()
    draws = (rng.choice(args.pool, args.chunks, False, popularity) for _ in times)
    return [
        Arrival(float(t), rng.permutation(d).tolist()) for t, d in zip(times, draws, strict=True)
    ]


async def serve(
    load: Load, coming: list[Arrival], output_tokens: int, call: dict[str, Any]
) -> dict[str, Any]:
    prompts = [load.prompt(arrival.chosen) for arrival in coming]
    start, blended = time.perf_counter() + 0.05, load.blended

    async def one(arrival: Arrival, prompt: tuple[int, ...]) -> list[float]:
        """Seconds from the arrival to each token."""
        await asyncio.sleep(start + arrival.at - time.perf_counter())
        delay = time.perf_counter() - start - arrival.at
        return [delay + at for at in await load.request(prompt, output_tokens, **call)]

    tokens = await asyncio.gather(*map(one, coming, prompts))
    ended = max(arrival.at + at[-1] for arrival, at in zip(coming, tokens, strict=True))
    ttft = [at[0] for at in tokens]
    gaps = [gap for at in tokens for gap in steps(at)]
    return {
        "requests": len(coming),
        "arrived": len(coming) / coming[-1].at,
        "rps": len(coming) / ended,
        "p50": statistics.median(ttft),
        "p95": percentile95(ttft),
        "step_p50": statistics.median(gaps),
        "step_p95": percentile95(gaps),
        "blended": (load.blended - blended) / len(coming),
    }


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['mode']:7}{row['arrived']:9.2f}{row['rps']:9.2f}{row['requests']:9}"
        f"{1e3 * row['p50']:12.1f}{1e3 * row['p95']:9.1f}"
        f"{1e3 * row['step_p50']:12.1f}{1e3 * row['step_p95']:8.1f}{row['blended']:9.0%}"
        f"{'' if row['sustained'] else '   not sustained'}",
        flush=True,
    )


if __name__ == "__main__":
    main()
