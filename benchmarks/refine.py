"""How far is each token of a long answer from a full prefill's, with refinement and without?

    python benchmarks/refine.py FILE.jsonl[.xz] [--model M] [--limit 4] [--tokens 200]

FILE holds one {"question", "passages": [{"title", "text"}]} a line. For each question the full
prefill answers greedily. Then a blend is made to say the same tokens, with each wish of --refine in
turn, and each token's distribution is compared with the full prefill's, over the whole vocabulary:
KL in nats, its mean over each quarter of the answer. Behind the answer a next turn is asked, once
with what the prefix cache holds by then, and once as a full prefill.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from shapes import versions
from tqdm import tqdm

PARTS = 4  # of an answer
TASK = "Explain in detail, with reasons, what the passages say about this."
FURTHER = "\nNow say in one sentence which passage matters most, and why:"


def main() -> None:
    args = arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what is compared stays in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from answer_kl import SYSTEM, read

    from cacheblend_rag import BlendConfig, CacheBlend
    from cacheblend_rag.engine import answers
    from cacheblend_rag.models import resolve_model

    answers.LAST = args.tokens
    with CacheBlend(
        resolve_model(args.model),
        config=BlendConfig(recompute_ratio=args.ratio, system_prompt=SYSTEM),
        engine="batch",
        dtype=args.dtype,
        max_model_len=4096,
        enforce_eager=args.eager,
        logits_processors=[answers.PROCESSOR],
    ) as blend:
        rows: dict[str, list[dict[str, Any]]] = {wish: [] for wish in args.refine}
        for item in tqdm(read(args.file, args.limit, args.seed), desc="questions"):
            ask(blend, item, rows, args)
        report(blend, rows, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", help="hub name or folder; default: the embedded model")
    parser.add_argument("--limit", type=int, default=4, help="questions")
    parser.add_argument("--passages", type=int, default=10, help="of each question, at most")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--refine", nargs="+", default=["off", "idle"], help="off, idle, a number")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="compile nothing: a start is quick")
    return parser.parse_args()


def ask(blend: Any, item: dict[str, Any], rows: dict[str, list[dict[str, Any]]], args: Any) -> None:
    """One question: the full prefill's answer, then each row's distributions over it."""
    from answer_kl import SYSTEM, chunk_texts

    from cacheblend_rag.engine import answers

    texts = chunk_texts(item)[: args.passages]
    blend.ingest(texts, progress=False)
    context = "\n\n".join(texts)
    user = f"Passages:\n\n{context}\n\nQuestion: {item['question']}\n{TASK}"
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    further = tuple(blend.tokenizer.encode(FURTHER, add_special_tokens=False))
    common = {"temperature": 0.0, "max_tokens": args.tokens, "ignore_eos": True}

    def say(wish: str, **options: Any) -> Any:
        return blend.generate(chat, extra_args={answers.KEY: wish}, **common, **options)

    full = say("keep", mode="full")
    ids = tuple(full.prompt_token_ids)
    for wish, done in rows.items():
        blend._engine._llm.llm_engine.reset_prefix_cache()
        refine = int(wish) if wish.isdigit() else wish
        got = say("force", refine=refine)
        [compared] = answers.take_compared([answers.digest(ids)])
        assert tuple(got.token_ids) == tuple(full.token_ids), "the forced answer was not given"
        assert got.report.blended and len(compared) == args.tokens, got.report
        next_turn = {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True}
        turn = ids + tuple(got.token_ids) + further
        second = blend.generate(turn, **next_turn)
        plain = blend.generate(turn, mode="full", **next_turn)
        done.append(
            {
                "kl": [kl for kl, _ in compared],
                "report": got.report,
                "same": second.token_ids == plain.token_ids,
                "cached": second.report.tokens_prefix_cached / len(turn),
                "full_ttft": full.report.ttft_s,
            }
        )
    answers.drop([answers.digest(ids)])


def report(blend: Any, rows: dict[str, list[dict[str, Any]]], args: Any) -> None:
    print(f"{versions(blend)}, {args.dtype}, {time.strftime('%Y-%m-%d')}")
    first = next(iter(rows.values()))
    mean = statistics.mean(row["report"].tokens_total for row in first)
    print(
        f"{Path(blend.info.model).name}: {len(first)} questions of {args.file.name} (seed "
        f"{args.seed}), mean prompt {mean:.0f} tokens, ratio {args.ratio}, {args.tokens} tokens "
        "of an answer"
    )
    heads = "".join(f"{f'KL {n + 1}/{PARTS}':>10}" for n in range(PARTS))
    print(
        f"{'refine':8}{heads}{'last half':>11}{'refined':>9}{'tokens':>8}{'TTFT s':>8}"
        f"{'answer s':>10}{'next turn same':>16}{'cached':>8}"
    )
    for wish, done in rows.items():
        size = args.tokens // PARTS
        parts = [
            statistics.mean(kl for row in done for kl in row["kl"][n * size : (n + 1) * size])
            for n in range(PARTS)
        ]
        half = statistics.mean(kl for row in done for kl in row["kl"][args.tokens // 2 :])
        reports = [row["report"] for row in done]
        shown = "".join(f"{kl:10.5f}" for kl in parts)
        print(
            f"{wish:8}{shown}{half:11.6f}{sum(r.refined for r in reports):9}"
            f"{statistics.mean(r.tokens_refined for r in reports):8.0f}"
            f"{statistics.median(r.ttft_s for r in reports):8.2f}"
            f"{statistics.median(r.total_s for r in reports):10.1f}"
            f"{sum(row['same'] for row in done):16}"
            f"{statistics.mean(row['cached'] for row in done):8.2f}"
        )


if __name__ == "__main__":
    main()
