"""How far is each token of a long answer from a full prefill's, with refinement and without?

    python benchmarks/refine.py FILE.jsonl[.xz] [--model M] [--limit 4] [--tokens 200]

FILE holds one {"question", "passages": [{"title", "text"}]} a line. For each question the full
prefill answers greedily. Then a blend is made to say the same tokens, with each wish of --refine in
turn, and each token's distribution is compared with the full prefill's, over the whole vocabulary:
KL in nats, its mean over each quarter of the answer. Behind the answer a next turn is asked, once
with what the prefix cache holds by then, and once as a full prefill.

The wish ``plain`` is no blend: vLLM alone, with its prefix cache. Its KL and its next turns are
what other batch shapes do to a full prefill's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from shapes import versions
from tqdm import tqdm

PARTS = 4  # of an answer
TURN = 32  # tokens of the next turn
TASK = "Explain in detail, with reasons, what the passages say about this."
FURTHER = "\nNow say in one sentence which passage matters most, and why:"
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def main() -> None:
    args = arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # what is compared stays in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from answer_kl import SYSTEM, read
    from held import HeldAnswers

    from cacheblend_rag import BlendConfig, CacheBlend
    from cacheblend_rag.models import resolve_model

    config = BlendConfig(recompute_ratio=args.ratio, system_prompt=SYSTEM, blend_if="always")
    with CacheBlend(
        resolve_model(args.model),
        config=config,
        engine="batch",
        dtype=args.dtype,
        max_model_len=4096,
        max_num_batched_tokens=4096,  # a prompt is one step
        enforce_eager=args.eager,
    ) as blend:
        held = HeldAnswers(args.tokens)
        rows: dict[str, list[dict[str, Any]]] = {wish: [] for wish in args.refine}
        for item in tqdm(read(args.file, args.limit, args.seed), desc="questions"):
            ask(blend, held, item, rows, args)
        report(blend, rows, args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def parser(about: str | None, *, limit: int, dtype: str) -> argparse.ArgumentParser:
    """Options of the benchmarks of refinement, with defaults of their own."""
    found = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("file", type=Path)
    found.add_argument("--model", help="hub name or folder; default: the embedded model")
    found.add_argument("--limit", type=int, default=limit, help="questions")
    found.add_argument("--passages", type=int, default=10, help="of each question, at most")
    found.add_argument("--tokens", type=int, default=200, help="of an answer")
    found.add_argument("--ratio", type=float, default=0.15)
    found.add_argument("--dtype", default=dtype)
    found.add_argument("--seed", type=int, default=7)
    found.add_argument("--eager", action="store_true", help="compile nothing: a start is quick")
    found.add_argument("--json", type=Path, help="also write what was measured there")
    return found


def arguments() -> argparse.Namespace:
    options = parser(__doc__, limit=4, dtype="float32")
    options.add_argument(
        "--refine", nargs="+", default=["off", "idle"], help="off, idle, a number, or plain"
    )
    return options.parse_args()


def ask(
    blend: Any, held: Any, item: dict[str, Any], rows: dict[str, list[dict[str, Any]]], args: Any
) -> None:
    """One question: the full prefill's answer, then each row's distributions over it."""
    from answer_kl import SYSTEM, chunk_texts

    texts = chunk_texts(item)[: args.passages]
    blend.ingest(texts, progress=False)
    context = "\n\n".join(texts)
    user = f"Passages:\n\n{context}\n\nQuestion: {item['question']}\n{TASK}"
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    further = tuple(blend.tokenizer.encode(FURTHER, add_special_tokens=False))
    common = {**GREEDY, "max_tokens": args.tokens}
    with held.keep():
        full = blend.generate(chat, mode="full", **common)
    turn = (*full.prompt_token_ids, *full.token_ids, *further)
    exact = blend.generate(turn, mode="full", max_tokens=TURN, **GREEDY)
    for wish, done in rows.items():
        forget_prompts(blend)
        options = wished(wish)
        with held.force() as kl:
            got = blend.generate(chat, **common, **options)
        assert got.token_ids == full.token_ids, "the forced answer was not given"
        assert got.report.blended is (wish != "plain"), got.report
        mode = {"mode": options["mode"]} if "mode" in options else {}
        second = blend.generate(turn, max_tokens=TURN, **GREEDY, **mode)
        done.append(
            {
                "kl": kl,
                "prompt": got.report.tokens_total,
                "refined": got.report.refined,
                "tokens": got.report.tokens_refined,
                "detail": got.report.refine_detail,
                "ttft": got.report.ttft_s,
                "seconds": got.report.total_s,
                "same": second.token_ids == exact.token_ids,
                "cached": second.report.tokens_prefix_cached / len(turn),
            }
        )


def wished(wish: str) -> dict[str, Any]:
    """The options of a call that a row stands for."""
    if wish == "plain":
        return {"mode": "off"}
    return {"refine": int(wish) if wish.isdigit() else wish}


def forget_prompts(blend: Any) -> None:
    """Empty vLLM's prefix cache."""
    engine = blend._engine._llm.llm_engine
    for _ in range(8):  # steps that were scheduled ahead hold blocks
        if engine.reset_prefix_cache():
            return
        engine.step()
    raise RuntimeError("the prefix cache could not be emptied")


def report(blend: Any, rows: dict[str, list[dict[str, Any]]], args: Any) -> None:
    first = next(iter(rows.values()))
    mean = statistics.mean(row["prompt"] for row in first)
    print(f"{versions(blend)}, {args.dtype}, {time.strftime('%Y-%m-%d')}")
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
        shown = "".join(f"{kl:10.5f}" for kl in parts)
        print(
            f"{wish:8}{shown}{half:11.6f}{sum(row['refined'] for row in done):9}"
            f"{statistics.mean(row['tokens'] for row in done):8.0f}"
            f"{statistics.median(row['ttft'] for row in done):8.3f}"
            f"{statistics.median(row['seconds'] for row in done):10.2f}"
            f"{sum(row['same'] for row in done):16}"
            f"{statistics.mean(row['cached'] for row in done):8.2f}"
        )
        for detail in {row["detail"] for row in done if row["detail"]}:
            print(f"{wish:8}{detail}")


if __name__ == "__main__":
    main()
