"""Is a request ever slower than a full prefill? From memory, and from a disk made slow.

    python benchmarks/never_slower.py --shape llama-8b --disk-gbps 0.5

The engine runs in this process, so that reads of the disk tier can be slowed here; nothing else is
changed. Requests of each size run with the default ``when="pays"`` and as a full prefill, in turn;
compared are medians of the time to a first token.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from typing import Any

from shapes import SHAPES, Words, versions, write_model
from ttft import size

SIZES = ["1x64", "1x256", "1x1024", "2x512", "6x512", "6x1024"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--sizes", type=size, nargs="+", default=[size(s) for s in SIZES])
    parser.add_argument("--disk-gbps", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gpu-memory-utilization", type=float)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, args.shape)
        run(folder, args)


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


def run(folder: str, args: argparse.Namespace) -> None:
    from cacheblend_rag import BlendConfig, CacheBlend

    words = Words(args.shape)
    options = {}
    if args.gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = args.gpu_memory_utilization
    for store in ("memory://?capacity=16GiB", f"file://{folder}/kv"):
        if store.startswith("file"):
            slow_disk(args.disk_gbps * 1e9)
        with CacheBlend(
            folder,
            config=BlendConfig(ingest_prefix=words(64), store=store),
            engine="batch",
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=max(n * t for n, t in args.sizes) + 2048,
            **options,
        ) as blend:
            assert blend.gate.passed, blend.gate.reason
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
        f"{ours / full:.3f}; {'blended' if report.blended else report.reason}",
        flush=True,
    )


if __name__ == "__main__":
    main()
