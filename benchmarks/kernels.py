"""Each kernel against its plain-torch twin, and against what the machine can do at most.

    python benchmarks/kernels.py                            # Llama-8B heads, 6144 tokens
    TRITON_INTERPRET=1 python benchmarks/kernels.py --tiny  # without a GPU: only whether it runs

The ceilings are measured in the same run: a copy within the GPU's memory (read and written), a
product of two bfloat16 matrices of 8192 x 8192, a copy from page-locked memory. Bytes and FLOPs are
what the operation needs at least, each input read once; a kernel is near its limit where either
share is near 1. Medians of GPU times with cold caches; kernels are replayed as CUDA graphs, as in
the engine. What has no kernel is plain torch in the engine too, and listed by its twin alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from cacheblend_kernels.paged import PagedKV
from cacheblend_kernels.reference import (
    key_deviation,
    masked_attention,
    moved,
    placed,
    question_attention,
    window_average,
)

__version__ = "0"  # transformers looks for a package of this name, and finds this file
_BLOCK = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Call = Callable[[], tuple[torch.Tensor, ...]]


class Operation(NamedTuple):
    """Two ways to compute the same tensors, and what each has to move and multiply at least."""

    name: str
    ours: Call | None
    twin: Call
    nbytes: int
    flops: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--run", type=int, default=9, help="neighbouring tokens that come together")
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--propagation-length", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4, help="that are placed at once")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("H", "G", "D"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, float32")
    parser.add_argument("--json", type=Path, help="also write every measurement there")
    args = parser.parse_args()
    if DEVICE == "cpu" and not (args.tiny and os.environ.get("TRITON_INTERPRET") == "1"):
        parser.error("needs a CUDA GPU; without one, TRITON_INTERPRET=1 and --tiny show if it runs")
    if args.tiny:
        args.context, args.heads, args.question_tokens = 132, [4, 2, 16], 4
    args.context -= args.context % args.chunks
    args.dtype = torch.float32 if args.tiny else torch.bfloat16
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "Triton's interpreter"
    print(
        f"torch {torch.__version__}, {name}, {args.dtype}, {args.context} tokens of "
        f"{args.chunks} chunks, H G D {args.heads}, ratio {args.ratio}, {args.question_tokens} "
        f"tokens of question, length {args.propagation_length}, {time.strftime('%Y-%m-%d')}"
    )
    found = {"ceilings": ceilings(256 if args.tiny else 8192), "rows": []}
    copy, product, host = found["ceilings"].values()
    print(
        f"ceilings: copy {copy / 1e9:.0f} GB/s, matrix product {product / 1e12:.0f} TFLOP/s, from "
        f"the host {host / 1e9:.1f} GB/s"
    )
    print(
        f"{'':32}{'ours us':>10}{'twin us':>10}{'twin/ours':>10}{'MB':>8}{'GFLOP':>8}"
        f"{'of copy':>9}{'of product':>11}{'apart':>9}"
    )
    for operation in operations(args):
        row = measure(operation, copy, product)
        found["rows"].append(row)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def measure(operation: Operation, copy: float, product: float) -> dict[str, object]:
    name, ours, twin, nbytes, flops = operation
    apart = 0.0
    if ours is not None:  # before timing: some write where they read
        apart = max(
            float((a.float() - b.float()).abs().max()) for a, b in zip(ours(), twin(), strict=True)
        )
    slow = seconds(twin)
    quick = seconds(graph(ours)) if ours is not None else slow
    of_copy, of_product = nbytes / quick / copy, flops / quick / product
    print(
        f"{name:32}{f'{quick * 1e6:.1f}' if ours else '-':>10}{slow * 1e6:10.1f}"
        f"{slow / quick:10.1f}{nbytes / 1e6:8.1f}{flops / 1e9:8.2f}{of_copy:9.2f}"
        f"{of_product:11.2f}{apart:9.4f}",
        flush=True,
    )
    return {
        "name": name, "ours_s": quick if ours else None, "twin_s": slow, "bytes": nbytes,
        "flops": flops, "of_copy": of_copy, "of_product": of_product, "apart": apart,
    }  # fmt: skip


def seconds(call: Callable[[], object]) -> float:
    """Median of the GPU's time for a call, its caches cold."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") / 1e3


def graph(call: Call) -> Callable[[], object]:
    """The call as a CUDA graph, so that Python's time does not count."""
    if DEVICE == "cpu":
        return call
    call()  # compiles
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


def ceilings(side: int) -> dict[str, float]:
    """Bytes a second of a copy, FLOPs a second of a product, bytes a second from the host."""
    count = 8 * side * side  # bytes; 0.5 GB
    source = torch.zeros(count, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    host = torch.zeros(count, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    a, b = torch.randn(2, side, side, device=DEVICE).bfloat16()
    return {
        "copy": 2 * count / seconds(lambda: target.copy_(source)),
        "product": 2 * side**3 / seconds(lambda: a @ b),
        "host": count / seconds(lambda: target.copy_(host, non_blocking=True)),
    }


def paged(context: int, groups: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> PagedKV:
    """A cache as vLLM's backends lay it out, its blocks in random order."""
    blocks = -(-context // _BLOCK)
    cache = torch.randn(blocks, _BLOCK, groups, 2 * dim, device=DEVICE).to(dtype)
    k, v = cache.split(dim, -1)
    table = torch.randperm(blocks, dtype=torch.int32).to(DEVICE)
    return PagedKV(k, v, table, torch.tensor([context], dtype=torch.int32, device=DEVICE), context)


def copied(cache: PagedKV) -> PagedKV:
    k, v = torch.cat([cache.k_BSGD, cache.v_BSGD], -1).chunk(2, -1)
    return cache._replace(k_BSGD=k, v_BSGD=v)


def scattered(context: int, ratio: float, run: int) -> torch.Tensor:
    """int64 positions: runs of ``run`` tokens, spread at random over the context."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randperm(context // run, generator=generator)[: int(ratio * context / run)]
    return (starts[:, None] * run + torch.arange(run)).flatten().sort().values


def operations(args: argparse.Namespace) -> Iterator[Operation]:
    torch.manual_seed(0)
    yield place_operation(args)
    yield selective_operation(args)
    yield question_operation(args)
    yield move_operation(args)
    _, groups, dim = args.heads
    n, kv = args.context, args.context * groups * dim
    fresh, cached = torch.randn(2, n, groups, dim, device=DEVICE).to(args.dtype)
    size = fresh.element_size()
    yield Operation(
        "deviation", None, lambda: (key_deviation(fresh, cached),), 2 * kv * size + 4 * n, 3 * kv
    )
    score, rows = torch.rand(n, device=DEVICE), int(args.ratio * n)
    yield Operation("window average", None, lambda: (window_average(score, 9),), 8 * n, 9 * n)
    yield Operation(
        "top-k", None, lambda: (score.topk(rows).indices.sort().values,), 4 * n + 8 * rows, 0
    )


def place_operation(args: argparse.Namespace) -> Operation:
    from cacheblend_kernels.rotate_and_scatter import Sources, rotate_and_scatter

    _, groups, dim = args.heads
    n, layers, each = args.context, args.layers, args.context // args.chunks
    stored = torch.randn(layers, args.chunks, 2, each, groups, dim, device=DEVICE).to(args.dtype)
    number = torch.arange(n, device=DEVICE)
    sources = Sources(
        torch.tensor([[chunk.data_ptr() for chunk in layer] for layer in stored], device=DEVICE),
        torch.tensor([each] * args.chunks, device=DEVICE),
        (number // each).int(),
        (number % each).int(),
    )
    angle = torch.rand(n, dim // 2, device=DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()
    caches = [paged(n, groups, dim, args.dtype) for _ in range(layers)]
    caches = [c._replace(table=caches[0].table) for c in caches]
    twins = [copied(c) for c in caches]
    addresses = torch.tensor(
        [[c.k_BSGD.data_ptr(), c.v_BSGD.data_ptr()] for c in caches], device=DEVICE
    )

    def ours() -> tuple[torch.Tensor, ...]:
        rotate_and_scatter(sources, cos, sin, number, caches[0], addresses, is_neox=True)
        return tuple(t for c in caches for t in (c.k_BSGD, c.v_BSGD))

    def twin() -> tuple[torch.Tensor, ...]:
        for layer, cache in zip(stored, twins, strict=True):
            k, v = layer.transpose(0, 1).flatten(1, 2)
            placed(k, v, cos, sin, number, cache, is_neox=True)
        return tuple(t for c in twins for t in (c.k_BSGD, c.v_BSGD))

    return Operation(
        f"re-rotate and place, {layers} layers", ours, twin,
        2 * stored.numel() * stored.element_size() + 8 * cos.numel(), 3 * stored.numel() // 2,
    )  # fmt: skip


def selective_operation(args: argparse.Namespace) -> Operation:
    from cacheblend_kernels.attention import scattered_attention

    heads, groups, dim = args.heads
    cache = paged(args.context, groups, dim, args.dtype)
    positions = scattered(args.context, args.ratio, args.run).to(DEVICE)
    q = torch.randn(len(positions), heads, dim, device=DEVICE).to(args.dtype)
    out, everywhere = torch.empty_like(q), torch.arange(args.context, device=DEVICE)
    visible = everywhere[None] <= positions[:, None]

    def ours() -> tuple[torch.Tensor, ...]:
        scattered_attention(q, positions, cache, out, scale=dim**-0.5)
        return (out,)

    def twin() -> tuple[torch.Tensor, ...]:
        return (masked_attention(q, *cache.gather(everywhere), visible, scale=dim**-0.5),)

    return Operation(
        f"selective attention, {len(positions)} rows", ours, twin,
        2 * (q.numel() + args.context * groups * dim) * q.element_size(),
        4 * heads * dim * int(visible.sum()),
    )  # fmt: skip


def question_operation(args: argparse.Namespace) -> Operation:
    from cacheblend_kernels.attention import Extra, question_scores, scattered_attention

    heads, groups, dim = args.heads
    n, asked = args.context, args.question_tokens
    cache = paged(n, groups, dim, args.dtype)
    everywhere = torch.arange(n + asked, device=DEVICE)
    positions = everywhere[n:]
    q = torch.randn(asked, heads, dim, device=DEVICE).to(args.dtype)
    extra = Extra(*torch.randn(2, asked, groups, dim, device=DEVICE).to(args.dtype), positions)
    out, score = torch.empty_like(q), torch.zeros(groups, n, device=DEVICE)
    visible = everywhere[None] <= positions[:, None]

    def ours() -> tuple[torch.Tensor, ...]:
        lse = scattered_attention(
            q, positions, cache, out, scale=dim**-0.5, extra=extra, want_lse=True
        )
        score.zero_()
        question_scores(q, positions, lse, cache, score, scale=dim**-0.5)
        return out, score.sum(0)

    def twin() -> tuple[torch.Tensor, ...]:
        k, v = cache.gather(everywhere[:n])
        k, v = torch.cat([k, extra.k_XGD]), torch.cat([v, extra.v_XGD])
        attended, weights = question_attention(q, k, v, visible, scale=dim**-0.5)
        return attended, weights[:n]

    return Operation(
        "question's attention and scores", ours, twin,
        (2 * q.numel() + 3 * n * groups * dim) * q.element_size(),
        heads * dim * (4 * int(visible.sum()) + 2 * asked * n),
    )  # fmt: skip


def move_operation(args: argparse.Namespace) -> Operation:
    from cacheblend_kernels.propagate import Propagation, propagate

    _, groups, dim = args.heads
    n = args.context
    cache = paged(n, groups, dim, args.dtype)
    other = copied(cache)
    position_R = scattered(n, args.ratio, args.run).to(DEVICE)
    everywhere = torch.arange(n, device=DEVICE)
    chunk_N = (everywhere // (n // args.chunks)).int()
    chosen = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    chosen[position_R] = True
    before = torch.nn.functional.pad(chosen.cumsum(0), (1, 0)).int()
    pass_2 = torch.tensor([0, len(position_R)], dtype=torch.int32, device=DEVICE)
    propagation = Propagation(
        chunk_N.masked_fill(chosen, -1), position_R, chunk_N[position_R], before, pass_2,
        torch.tensor([float(args.propagation_length)], device=DEVICE),
    )  # fmt: skip
    k, v = torch.randn(2, len(position_R), groups, dim, device=DEVICE).to(args.dtype)
    angle = everywhere[:, None] * torch.rand(dim // 2, device=DEVICE)
    cos, sin = angle.cos(), angle.sin()

    def ours() -> tuple[torch.Tensor, ...]:
        propagate(propagation, k, v, cache, cos, sin, is_neox=True)
        return cache.k_BSGD, cache.v_BSGD

    def twin() -> tuple[torch.Tensor, ...]:
        moved(propagation, k, v, other, cos, sin, is_neox=True)
        return other.k_BSGD, other.v_BSGD

    near = (everywhere[:, None] - position_R[None]).abs() <= 8 * args.propagation_length
    weighed = int((near & (propagation.chunk_N[:, None] == propagation.chunk_R[None])).sum())
    return Operation(
        f"propagate, {len(position_R)} rows, length {args.propagation_length}", ours, twin,
        4 * (n + len(position_R)) * groups * dim * k.element_size() + 8 * cos.numel(),
        4 * weighed * groups * dim,
    )  # fmt: skip


if __name__ == "__main__":
    main()
