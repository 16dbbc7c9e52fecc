"""Many requests at once: throughput by mode, and what a decoding stream feels of others' blends.

    python benchmarks/serving.py --shape llama-8b --chunk-tokens 1024

Throughput: clients that each send a request after the other; every request draws six of a pool of
chunks in random order and asks a new question. Modes take turns, each at every number of clients:
``full`` (a plain prefill), ``off`` (vLLM's prefix cache), ``blend``. At equal p95 TTFT, the highest
throughput of each mode that keeps it is compared.

Stall: one stream decodes; its steps are timed alone, and again while others arrive and blend.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, Words, versions, write_model

MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "off": {"mode": "off"},
    "blend": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--pool", type=int, default=24)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=48, help="for each mode and client number")
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--tile", type=int, help="BlendConfig.tile_tokens")
    parser.add_argument("--gpu-cache")
    parser.add_argument("--gpu-memory-utilization", type=float)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, args.shape)
        asyncio.run(run(folder, args))


class Load:
    """Requests over one pool of chunks."""

    def __init__(self, blend: Any, args: argparse.Namespace, words: Words) -> None:
        self.blend, self.args, self.words = blend, args, words
        self.pool = [words(args.chunk_tokens) for _ in range(args.pool)]
        self.head = words(48)

    def prompt(self) -> tuple[int, ...]:
        chosen = self.words.draw.sample(self.pool, self.args.chunks)
        return self.head + tuple(t for c in chosen for t in c) + self.words(32)

    async def request(self, output_tokens: int, **call: Any) -> list[float]:
        """Seconds from the call to each token."""
        start, at = time.perf_counter(), []
        stream = self.blend.astream(
            self.prompt(), max_tokens=output_tokens, temperature=0.0, ignore_eos=True, **call
        )
        async for _ in stream:
            at.append(time.perf_counter() - start)
        return at


async def run(folder: str, args: argparse.Namespace) -> None:
    from cacheblend_rag import BlendConfig, CacheBlend

    words = Words(args.shape)
    options = {}
    if args.gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = args.gpu_memory_utilization
    blend = CacheBlend(
        folder,
        config=BlendConfig(
            ingest_prefix=words(64),
            recompute_ratio=args.ratio,
            store="memory://?capacity=32GiB",
            tile_tokens=args.tile,
            gpu_cache=args.gpu_cache,
        ),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=args.chunks * args.chunk_tokens + 2048,
        **options,
    )
    with blend:
        assert blend.gate.passed, blend.gate.reason
        load = Load(blend, args, words)
        blend.ingest(load.pool, progress=False)
        print(
            f"{versions(blend)}, {args.shape}, {args.chunks} of {args.pool} "
            f"x {args.chunk_tokens} tokens, {args.output_tokens} output tokens, "
            f"ratio {args.ratio}, tile {args.tile}, {time.strftime('%Y-%m-%d')}"
        )
        for call in MODES.values():  # warm up
            await asyncio.gather(*(load.request(4, **call) for _ in range(4)))
        found = {"stall": await stall(load), "throughput": await throughput(load)}
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))


async def throughput(load: Load) -> list[dict[str, Any]]:
    args, rows = load.args, []
    print(f"{'mode':8}{'clients':>8}{'requests/s':>12}{'TTFT p50 ms':>13}{'p95 ms':>9}")
    for clients in args.clients:
        for name, call in MODES.items():
            ttft: list[float] = []
            left = iter(range(args.requests))

            async def client(left: Any = left, call: Any = call, ttft: list[float] = ttft) -> None:
                for _ in left:
                    ttft.append((await load.request(args.output_tokens, **call))[0])

            start = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            speed = args.requests / (time.perf_counter() - start)
            p50, p95 = statistics.median(ttft), statistics.quantiles(ttft, n=20)[-1]
            rows.append({"mode": name, "clients": clients, "rps": speed, "p50": p50, "p95": p95})
            print(f"{name:8}{clients:8}{speed:12.2f}{1e3 * p50:13.1f}{1e3 * p95:9.1f}", flush=True)
    print("at equal p95 TTFT:")
    for target in sorted({r["p95"] for r in rows if r["mode"] == "full"}):
        best = {
            name: max((r["rps"] for r in of_mode if r["p95"] <= target), default=0)
            for name, of_mode in ((n, [r for r in rows if r["mode"] == n]) for n in MODES)
        }
        ratios = [f"{best['blend'] / best[m]:.2f} x {m}" for m in ("full", "off") if best[m]]
        print(f"  p95 <= {1e3 * target:.0f} ms: blend {best['blend']:.2f}/s, {', '.join(ratios)}")
    return rows


async def stall(load: Load) -> dict[str, Any]:
    """Gaps between the tokens of one stream: alone, beside blends, beside plain prefills."""
    found: dict[str, Any] = {}
    for name, call in {"alone": None, "blend": {}, "full": {"mode": "full"}}.items():
        stream = asyncio.create_task(load.request(240, mode="off"))
        if call is not None:
            await asyncio.sleep(0.4)  # it decodes
            for _ in range(6):
                await load.request(1, **call)
        at = await stream
        gaps = [b - a for a, b in itertools.pairwise(at)]
        found[name] = {
            "median": statistics.median(gaps),
            "p95": statistics.quantiles(gaps, n=20)[-1],
            "longest": sorted(gaps)[-5:],
        }
    normal = found["alone"]["median"]
    for name, row in found.items():
        longest = ", ".join(f"{1e3 * g:.1f}" for g in row["longest"])
        print(
            f"a stream's step beside {name:6} median {1e3 * row['median']:.1f} ms, longest "
            f"{longest} ms ({row['longest'][-1] / normal:.1f} times the normal step)",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
