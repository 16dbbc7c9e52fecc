"""How far from a full prefill are blended answers? KL divergence per token, through the engine.

    python benchmarks/answer_kl.py FILE.jsonl[.xz] [--model M] [--limit 30] [--ratio 0.15]

Modes: ratio_1 (blended at 1: what batch shapes alone do), reuse (ratio 0), and the selectors.
FILE holds one {"question", "passages": [{"title", "text"}]} a line. For each question the full
prefill answers greedily; every mode is then made to say the same tokens, and its next-token
distributions are compared with the full prefill's, over the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from forced import FORCED_KEY
from shapes import selecting, versions
from tqdm import tqdm

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.models import resolve_model

SYSTEM = (
    "You are a precise assistant. Answer the question using the passages. Reply with the shortest "
    "possible answer: a name, a date, a number or a few words, no sentence."
)


def read(path: Path, limit: int, seed: int) -> list[dict[str, Any]]:
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        items = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(items)
    return items[:limit]


def messages(item: dict[str, Any]) -> list[dict[str, str]]:
    passages = "\n\n".join(chunk_texts(item))
    user = (
        f"Passages:\n\n{passages}\n\nQuestion: {item['question']}\n"
        "Answer in as few words as possible."
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def chunk_texts(item: dict[str, Any]) -> list[str]:
    return [f"{p['title']}\n{p['text']}".strip() for p in item["passages"]]


def distributions(result: Any, vocab: int) -> torch.Tensor:
    out = torch.full((len(result.logprobs), vocab), -torch.inf, dtype=torch.float64)
    for row, at in zip(out, result.logprobs, strict=True):
        row[torch.tensor(list(at))] = torch.tensor(list(at.values()), dtype=torch.float64)
    return out


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """Mean over tokens of KL(full || other), in nats."""
    terms = full.exp() * (full - other)
    return float(terms.nan_to_num(0.0).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="hub name or folder; default: the embedded model")
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--tokens", type=int, default=6, help="answer tokens compared")
    parser.add_argument(
        "--prefix", default="auto", choices=["auto", "prompt_prefix", "bos", "none"]
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--store", default="memory://", help="such as /tmp/kv?dtype=fp8")
    parser.add_argument("--modes", nargs="+", help="a part of: ratio_1 reuse first_k hkvd query")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    modes: dict[str, dict[str, Any]] = {
        "ratio_1": {"recompute_ratio": 1.0},
        "reuse": {"mode": "reuse"},
        "first_k": selecting("first_k"),
        "hkvd": selecting("hkvd"),
        "query": selecting("query"),
    }
    if args.modes:
        modes = {name: modes[name] for name in args.modes}
    config = BlendConfig(
        recompute_ratio=args.ratio,
        system_prompt=SYSTEM,
        ingest_prefix=args.prefix,
        store=args.store,
    )
    blend = CacheBlend(
        resolve_model(args.model),
        config=config,
        engine="batch",
        dtype=args.dtype,
        max_model_len=4096,
        max_logprobs=-1,
        logits_processors=["forced:ForcedTokens"],
    )
    with blend:
        rows = measure(blend, read(args.file, args.limit, args.seed), modes, args.tokens)
        report(blend, rows, modes, args)


def measure(
    blend: CacheBlend, items: list[dict[str, Any]], modes: dict[str, Any], tokens: int
) -> list[dict[str, Any]]:
    vocab, rows = blend.info.vocab_size, []
    common = {"temperature": 0.0, "logprobs": -1, "detokenize": False}
    for item in tqdm(items, desc="questions"):
        prompt = messages(item)
        if len(blend.tokenizer.encode(str(prompt))) > blend.info.max_model_len - 64:
            continue
        blend.ingest(chunk_texts(item), progress=False)
        full = blend.generate(prompt, mode="full", max_tokens=tokens, **common)
        answer_ids, expected = list(full.token_ids), distributions(full, vocab)
        row: dict[str, Any] = {"tokens": full.report.tokens_total, "full_ttft": full.report.ttft_s}
        for name, options in modes.items():
            forced = {FORCED_KEY: answer_ids}
            got = blend.generate(
                prompt, max_tokens=len(answer_ids), extra_args=forced, **common, **options
            )
            assert list(got.token_ids) == answer_ids, "the forced answer was not given"
            # questions over the same passages share the plans that don't depend on the question
            assert got.report.blended or got.report.tokens_prefix_cached, got.report.detail
            row[name] = divergence(expected, distributions(got, vocab))
            row[f"{name} ttft"] = got.report.ttft_s
        rows.append(row)
    return rows


def report(
    blend: CacheBlend, rows: list[dict[str, Any]], modes: dict[str, Any], args: argparse.Namespace
) -> None:
    print(f"{versions(blend)}, {args.dtype}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{Path(blend.info.model).name}: {len(rows)} questions of {args.file.name} "
        f"(seed {args.seed}), "
        f"mean prompt {statistics.mean(r['tokens'] for r in rows):.0f} tokens, ratio {args.ratio}, "
        f"ingest prefix {args.prefix}, {args.tokens} answer tokens"
    )
    print(f"{'mode':24}{'KL':>8}{'+-':>8}{'of reuse':>10}{'TTFT full/mode':>16}")
    reuse = statistics.mean(r["reuse"] for r in rows)
    for name in modes:
        values = [r[name] for r in rows]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        speed = statistics.median(r["full_ttft"] / r[f"{name} ttft"] for r in rows)
        mean = statistics.mean(values)
        print(f"{name:24}{mean:8.4f}{error:8.4f}{mean / reuse:10.2f}{speed:16.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
