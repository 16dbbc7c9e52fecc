"""Ratio 1 against plain vLLM, beside the noise that batch shapes alone make.

    python benchmarks/ratio_one.py --model MODEL --dtype bfloat16

Random-token chunks and questions. The same prompt runs alone as a plain prefill (the reference),
as a plain prefill in a batch with others and behind a cached prefix (noise), and blended at ratio
1. All say the reference's tokens; compared are the log-probabilities of its ten likeliest tokens at
each place.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from typing import Any

from forced import FORCED_KEY
from shapes import versions

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.models import resolve_model

_TOKENS, _TOP = 6, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="hub name or folder; default: the embedded model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    config = BlendConfig(ingest_prefix="prompt_prefix", blend_if="always")
    blend = CacheBlend(
        resolve_model(args.model), config=config, engine="batch", dtype=args.dtype,
        max_model_len=2048, logits_processors=["forced:ForcedTokens"],
    )  # fmt: skip
    with blend:
        assert blend.model_check.passed, blend.model_check.detail
        print(
            f"{versions(blend)}, {blend.info.model}, {args.dtype}, {args.prompts} prompts of "
            f"4 x {args.chunk_tokens} tokens, {time.strftime('%Y-%m-%d')}"
        )
        compare(blend, args)


def compare(blend: CacheBlend, args: argparse.Namespace) -> None:
    draw = random.Random(0)
    low, high = 100, blend.info.vocab_size - 1000

    def words(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(low, high) for _ in range(count))

    chunks = [words(args.chunk_tokens) for _ in range(8)]
    blend.ingest(chunks, progress=False)
    prompts = [
        words(20) + tuple(t for c in draw.sample(chunks, 4) for t in c) + words(30)
        for _ in range(args.prompts)
    ]
    common: dict[str, Any] = {"temperature": 0.0, "logprobs": 20, "detokenize": False}
    alone = [blend.generate(p, mode="full", max_tokens=_TOKENS, **common) for p in prompts]
    answers = [list(r.token_ids) for r in alone]

    def say(number: int, **call: Any) -> Any:
        forced = {FORCED_KEY: answers[number]}
        return blend.generate(
            prompts[number], max_tokens=_TOKENS, extra_args=forced, **common, **call
        )

    rows = {
        "plain again": [say(i, mode="full") for i in range(len(prompts))],
        "plain, prefix cached": [
            (say(i, mode="off"), say(i, mode="off"))[1] for i in range(len(prompts))
        ],
        "plain, in a batch": batch(blend, prompts, answers, common),
        "ratio 1": [say(i, recompute_ratio=1.0) for i in range(len(prompts))],
    }
    assert all(r.report.blended for r in rows["ratio 1"]), rows["ratio 1"][0].report.detail
    print(f"{'':22}{'mean |d log p|':>16}{'worst':>10}")
    for name, results in rows.items():
        apart = [d for r, other in zip(alone, results, strict=True) for d in distances(r, other)]
        print(f"{name:22}{statistics.mean(apart):16.6f}{max(apart):10.6f}")


def batch(
    blend: CacheBlend, prompts: list[Any], answers: list[Any], common: dict[str, Any]
) -> list[Any]:
    """All at once; the forced tokens are one request's, so each batch counts for one prompt."""
    results = []
    for i in range(len(prompts)):
        turned = prompts[i:] + prompts[:i]
        forced = {FORCED_KEY: answers[i]}
        got = blend.generate(turned, mode="full", max_tokens=_TOKENS, extra_args=forced, **common)
        results.append(got[0])
    return results


def distances(reference: Any, other: Any) -> list[float]:
    assert list(reference.token_ids) == list(other.token_ids)
    found = []
    for ours, theirs in zip(reference.logprobs, other.logprobs, strict=True):
        likeliest = sorted(ours, key=ours.get, reverse=True)[:_TOP]
        found += [abs(ours[t] - theirs[t]) for t in likeliest if t in theirs]
    return found


if __name__ == "__main__":
    main()
