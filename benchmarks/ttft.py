"""Time to first token: full prefill against blended, in turn, in one engine.

    python benchmarks/ttft.py                    # CPU, 0.5B shape, six 512-token chunks
    python benchmarks/ttft.py --shape llama-8b --chunk-tokens 1024 --ratios 0 0.05 0.15 0.3

Weights are random (vLLM's ``load_format="dummy"``): latency depends on shapes only. Each round asks
a new question over newly ordered chunks, so no mode profits from vLLM's prefix cache; modes take
turns within a round. Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, Words, write_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--chunk-tokens", type=int, default=512)
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


def run(folder: str, args: argparse.Namespace) -> None:
    from cacheblend_rag import BlendConfig, CacheBlend

    words = Words(args.shape)
    total = args.chunks * args.chunk_tokens
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
        chunks, head = [words(args.chunk_tokens) for _ in range(args.chunks)], words(48)
        ingested = blend.ingest(chunks)
        modes: dict[str, dict[str, Any]] = {"full": {"mode": "full"}}
        for ratio in args.ratios:
            for selector in args.selectors if ratio else args.selectors[:1]:
                name = f"{selector} {ratio:g}" if ratio else "reuse"
                modes[name] = {"recompute_ratio": ratio, "selector": selector}
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
        for number in range(args.rounds + 1):  # the first warms up
            words.draw.shuffle(chunks)
            for name, call in modes.items():
                body = tuple(t for c in chunks for t in c)
                prompt = head + body + words(args.question_tokens)
                [piece_first, result] = first_token(blend, prompt, call)
                if number:
                    rows[name].append({"ttft_s": piece_first, "report": result.report.to_dict()})
        show(blend, rows, ingested, args)


def first_token(blend: Any, prompt: tuple[int, ...], call: dict[str, Any]) -> list[Any]:
    start = time.perf_counter()
    stream = blend.stream(prompt, max_tokens=1, temperature=0.0, **call)
    next(stream)
    seconds = time.perf_counter() - start
    for _ in stream:
        pass
    return [seconds, stream.result]


def show(blend: Any, rows: dict[str, Any], ingested: Any, args: argparse.Namespace) -> None:
    import torch

    from cacheblend_rag import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    print(
        f"cacheblend-rag {__version__}, vLLM {blend.info.vllm_version}, torch {torch.__version__}, "
        f"{device}, {os.cpu_count()} cores, {args.dtype}, {time.strftime('%Y-%m-%d')}"
    )
    print(
        f"{args.shape}, {args.chunks} x {args.chunk_tokens} tokens of chunks, question "
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
            f"{report['tokens_fresh']}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
