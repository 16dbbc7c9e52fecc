"""Chooses the demo's questions among those of examples/data/candidates.json, by what the embedded
model answers after a full prefill, and writes examples/data/questions.json:

    python scripts/demo_questions.py

Nothing is blended. A question may be chosen if that answer contains the gold one. Of these come
first those that the model is surest of: by the least lead, over the answer's tokens, of the
likeliest token's log-probability over the next one's. Of each document, or pair of them, at most
two are taken.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from cacheblend_rag import demo

DATA = Path(__file__).parents[1] / "examples" / "data"
CHOSEN, OF_A_DOCUMENT = 12, 2


class Asked(NamedTuple):
    """A candidate, and what the full prefill said to it."""

    candidate: dict[str, Any]
    text: str
    correct: bool
    lead: float


def choose(asked: list[Asked], count: int = CHOSEN) -> list[dict[str, Any]]:
    """The questions that the model is surest of, in the order of the candidates."""
    taken, of_a_document = list[Asked](), Counter[str]()
    for one in sorted(asked, key=lambda each: -each.lead):
        where = "+".join(one.candidate["documents"])
        if one.correct and len(taken) < count and of_a_document[where] < OF_A_DOCUMENT:
            of_a_document[where] += 1
            taken.append(one)
    return [one.candidate for one in asked if one in taken]


def ask(blend: Any, retriever: Any, candidate: dict[str, Any]) -> Asked:
    """A candidate's answer after a full prefill."""
    found = retriever.search(candidate["question"], demo.PASSAGES)
    result = blend.generate(
        demo.chat(found, candidate["question"]),
        mode="full",
        max_tokens=demo.MAX_TOKENS,
        temperature=0.0,
        logprobs=2,
    )
    pairs = [sorted(at.values(), reverse=True)[:2] for at in result.logprobs]
    answer = demo.Answer(result.text, result.token_ids, result.report.ttft_s, result.report)
    question = demo.Question(candidate["question"], candidate["answer"])
    outcome = demo.Outcome(question=question, answers={"full": answer})
    lead = min(first - second for first, second in pairs)
    return Asked(candidate, result.text.strip(), outcome.correct("full"), lead)


def main() -> None:
    """Ask all candidates, show what was said, and write what was chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from cacheblend_rag import BlendConfig, CacheBlend
    from cacheblend_rag.models import embedded_model
    from cacheblend_rag.retrieval import Retriever, load_documents, split

    candidates = json.loads((DATA / "candidates.json").read_text(encoding="utf-8"))
    config = BlendConfig(system_prompt=demo.SYSTEM_PROMPT)
    with CacheBlend(embedded_model(), config=config, engine="batch", enforce_eager=True) as blend:
        passages = split(load_documents([DATA]).documents, demo.CHUNK_TOKENS, blend.tokenizer)
        retriever, asked = Retriever(passages), list[Asked]()
        for candidate in candidates:
            asked.append(ask(blend, retriever, candidate))
            one = asked[-1]
            print(f"{'right' if one.correct else 'wrong'} {one.lead:6.2f}  ", end="")
            print(f"{candidate['question']} {one.text!r}", flush=True)
    chosen = choose(asked)
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in chosen)
    (DATA / "questions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    right = sum(one.correct for one in asked)
    print(f"{len(chosen)} of {right} right answers to {len(asked)} candidates were chosen")


if __name__ == "__main__":
    main()
