"""Time to first token: full prefill against blended, in turn, in one engine.

    python benchmarks/ttft.py                    # CPU, 0.5B shape, six 512-token chunks
    python benchmarks/ttft.py --shape llama-8b --sizes 6x512 6x1024 --ratios 0 0.05 0.15 0.3

Weights are random (vLLM's ``load_format="dummy"``): latency depends on shapes only. Each round asks
a new question over newly ordered chunks, so no mode profits from vLLM's prefix cache; modes take
turns within a round. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, Words, versions, write_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument(
        "--sizes", type=size, nargs="+", default=[(6, 512)], metavar="NxT",
        help="chunks and tokens a chunk, such as 6x512 6x1024",
    )  # fmt: skip
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.15])
    parser.add_argument("--selectors", nargs="+", default=["query", "hkvd"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--store", default="memory://?capacity=16GiB")
    parser.add_argument("--gpu-cache", help="GPU memory for chunks, such as 2GiB")
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--when", default="always", choices=["pays", "always"])
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, args.shape)
        run(folder, args)


def size(text: str) -> tuple[int, int]:
    chunks, _, tokens = text.partition("x")
    return int(chunks), int(tokens)


def run(folder: str, args: argparse.Namespace) -> None:
    from cacheblend_rag import BlendConfig, CacheBlend

    words = Words(args.shape)
    total = max(chunks * tokens for chunks, tokens in args.sizes)
    options: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("block_size", "gpu_memory_utilization")
        if getattr(args, name) is not None
    }
    with CacheBlend(
        folder,
        config=BlendConfig(
            ingest_prefix=words(64),
            store=args.store,
            gpu_cache=args.gpu_cache,
            when=args.when,
        ),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=total + 2048,
        **options,
    ) as blend:
        assert blend.gate.passed, blend.gate.reason
        measured = {}
        for number, each in args.sizes:
            rows, ingested = measure(blend, words, number, each, args)
            show(blend, rows, ingested, (number, each), args)
            measured[f"{number}x{each}"] = rows
        if args.json:
            args.json.write_text(json.dumps(measured, indent=1))


def measure(
    blend: Any, words: Words, number: int, each: int, args: argparse.Namespace
) -> tuple[dict[str, list[dict[str, Any]]], Any]:
    """Every mode's TTFT in each round, and the ingestion's report."""
    chunks, head = [words(each) for _ in range(number)], words(48)
    ingested = blend.ingest(chunks, progress=False)
    modes: dict[str, dict[str, Any]] = {"full": {"mode": "full"}}
    for ratio in args.ratios:
        for selector in args.selectors if ratio else args.selectors[:1]:
            name = f"{selector} {ratio:g}" if ratio else "reuse"
            modes[name] = {"recompute_ratio": ratio, "selector": selector}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    for turn in range(args.rounds + 1):  # the first warms up
        words.draw.shuffle(chunks)
        for name, call in modes.items():
            prompt = head + tuple(t for c in chunks for t in c) + words(args.question_tokens)
            seconds, result = first_token(blend, prompt, call)
            if turn:
                rows[name].append({"ttft_s": seconds, "report": result.report.to_dict()})
    return rows, ingested


def first_token(blend: Any, prompt: tuple[int, ...], call: dict[str, Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    stream = blend.stream(prompt, max_tokens=1, temperature=0.0, **call)
    next(stream)
    seconds = time.perf_counter() - start
    for _ in stream:
        pass
    return seconds, stream.result


def show(
    blend: Any,
    rows: dict[str, Any],
    ingested: Any,
    size: tuple[int, int],
    args: argparse.Namespace,
) -> None:
    print(f"{versions(blend)}, {os.cpu_count()} cores, {args.dtype}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{args.shape}, {size[0]} x {size[1]} tokens of chunks, question "
        f"{args.question_tokens}, block {blend.info.block_size}, {args.rounds} rounds; ingestion "
        f"{ingested.tokens / ingested.seconds:.0f} tokens/s"
    )
    full = statistics.median(r["ttft_s"] for r in rows["full"])
    print(
        f"{'mode':14}{'TTFT ms':>10}{'full/mode':>11}   engine ms: load, select, recompute; tokens"
    )
    for name, of_mode in rows.items():
        median = statistics.median(r["ttft_s"] for r in of_mode)
        report = of_mode[-1]["report"]
        stages = {
            stage: 1e3 * statistics.median(r["report"]["stages_s"].get(stage, 0) for r in of_mode)
            for stage in ("load", "select", "recompute")
        }
        parts = ", ".join(f"{v:.1f}" for v in stages.values())
        print(
            f"{name:14}{median * 1e3:10.1f}{full / median:11.2f}   {parts}; reused "
            f"{report['tokens_reused']}, recomputed {report['tokens_recomputed']}, fresh "
            f"{report['tokens_fresh']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
