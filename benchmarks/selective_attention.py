"""Selective attention against FlashAttention on a dense causal problem of the same FLOPs.

    python benchmarks/selective_attention.py       # Llama-8B heads, 15 % of 6 x 1024 tokens

Ours: scattered rows over a paged cache, causal by position. The rival: vLLM's FlashAttention over
one dense causal sequence, long enough for as many multiplications. Medians of GPU times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import vllm
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from cacheblend_kernels.attention import scattered_attention
from cacheblend_rag import __version__
from kernels import paged, scattered


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--context", type=int, nargs="+", default=[3072, 6144, 16384, 32768])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.15, 0.3])
    parser.add_argument("--run", type=int, default=9, help="neighbouring tokens that come together")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("H", "G", "D"))
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print(
        f"cacheblend-rag {__version__}, vLLM {vllm.__version__}, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name()}, bfloat16, H G D {args.heads}, runs of {args.run}, "
        f"{args.rounds} rounds, {time.strftime('%Y-%m-%d')}"
    )
    print(
        f"{'context':>8}{'rows':>7}{'ours us':>10}{'TFLOP/s':>9}"
        f"{'dense':>8}{'FA us':>9}{'TFLOP/s':>9}{'ours/FA':>9}"
    )
    for context in args.context:
        for ratio in args.ratios:
            row(context, ratio, args)


def row(context: int, ratio: float, args: argparse.Namespace) -> None:
    heads, groups, dim = args.heads
    positions = scattered(context, ratio, args.run)
    per_pair = 4 * heads * dim
    flops = per_pair * int((positions + 1).sum())
    dense = int((2 * flops / per_pair) ** 0.5)
    view = paged(context, groups, dim)
    q = torch.randn(len(positions), heads, dim, dtype=torch.bfloat16, device="cuda")
    out, at = torch.empty_like(q), positions.cuda()
    dense_q = torch.randn(dense, heads, dim, dtype=torch.bfloat16, device="cuda")
    dense_k = torch.randn(dense, groups, dim, dtype=torch.bfloat16, device="cuda")
    bounds = torch.tensor([0, dense], dtype=torch.int32, device="cuda")

    version = get_flash_attn_version()

    def ours() -> None:
        scattered_attention(q, at, view, out, scale=dim**-0.5)

    def rival() -> None:
        flash_attn_varlen_func(
            dense_q, dense_k, dense_k, max_seqlen_q=dense, cu_seqlens_q=bounds,
            max_seqlen_k=dense, cu_seqlens_k=bounds, softmax_scale=dim**-0.5, causal=True,
            fa_version=version,
        )  # fmt: skip

    a, b = in_turn(ours, rival, args.rounds)
    dense_flops = per_pair * dense * (dense + 1) // 2
    speed, best = flops / a / 1e12, dense_flops / b / 1e12
    print(
        f"{context:8}{len(positions):7}{a * 1e6:10.1f}{speed:9.0f}"
        f"{dense:8}{b * 1e6:9.1f}{best:9.0f}{speed / best:9.2f}",
        flush=True,
    )


def in_turn(
    ours: Callable[[], None], rival: Callable[[], None], rounds: int
) -> tuple[float, float]:
    """Medians of seconds; each figure is of ten calls in a row."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 3):
        for call, of_call in zip((ours, rival), times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                call()
            end.record()
            end.synchronize()
            if number >= 3:
                of_call.append(start.elapsed_time(end) / 1e4)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
