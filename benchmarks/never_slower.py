"""Is a request ever slower than a full prefill? From memory, and from a disk made slow.

    python benchmarks/never_slower.py --shape llama-8b --disk-gbps 0.5

The engine runs in this process, so that reads of the disk tier can be slowed here; nothing else is
changed. Requests of each size run with the default ``blend_if="faster"`` and as a full prefill, in
turn; compared are medians of the time to a first token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from typing import Any

from shapes import Words, opened, parser, size, versions

SIZES = ["1x64", "1x256", "1x1024", "2x512", "6x512", "6x1024"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", type=size, nargs="+", default=[size(s) for s in SIZES])
    options.add_argument("--disk-gbps", type=float, default=0.5)
    options.add_argument("--rounds", type=int, default=7)
    args = options.parse_args()
    run(args, args.store)
    slow_disk(args.disk_gbps * 1e9)
    with tempfile.TemporaryDirectory() as folder:
        run(args, f"file://{folder}")


def slow_disk(bytes_per_s: float) -> None:
    """Reads of chunk files share so much bandwidth from here on."""
    from cacheblend_rag.store.source import FileSource

    read, one = FileSource.read_into, threading.Lock()

    def slow(self: Any, target: memoryview) -> None:
        with one:
            start = time.perf_counter()
            read(self, target)
            time.sleep(max(0.0, len(target) / bytes_per_s - (time.perf_counter() - start)))

    FileSource.read_into = slow  # type: ignore[method-assign]


def run(args: argparse.Namespace, store: str) -> None:
    longest = max(n * t for n, t in args.sizes)
    with opened(args, longest, in_process=True, store=store) as (blend, words):
        print(
            f"{versions(blend)}, {args.shape}, {store.partition(':')[0]} "
            f"{'' if store.startswith('memory') else f'at {args.disk_gbps} GB/s'}, "
            f"{args.rounds} rounds, {time.strftime('%Y-%m-%d')}"
        )
        for number, each in args.sizes:
            row(blend, words, number, each, args.rounds)


def row(blend: Any, words: Words, number: int, each: int, rounds: int) -> None:
    chunks, head = [words(each) for _ in range(number)], words(48)
    blend.ingest(chunks, progress=False)
    times: dict[str, list[float]] = {"full": [], "blend": []}
    report: Any = None
    for turn in range(rounds + 2):
        words.draw.shuffle(chunks)
        for name in times:
            prompt = head + tuple(t for c in chunks for t in c) + words(32)
            start = time.perf_counter()
            result = blend.generate(prompt, mode=name, max_tokens=1, temperature=0.0)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
            if name == "blend":
                report = result.report
    full, ours = (statistics.median(times[name]) for name in ("full", "blend"))
    print(
        f"{number} x {each:5}: full {1e3 * full:7.1f} ms, ours {1e3 * ours:7.1f} ms, ours/full "
        f"{ours / full:.3f}; {'blended' if report.blended else report.detail}",
        flush=True,
    )


if __name__ == "__main__":
    main()
