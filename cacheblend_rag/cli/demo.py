"""``demo``: the same questions with and without CacheBlend."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from cacheblend_rag import demo
from cacheblend_rag.cli.base import (
    OK,
    REFUSED,
    Done,
    Screen,
    add_model,
    command,
    index_of,
    positive,
)
from cacheblend_rag.cli.documents import rate, store_kv
from cacheblend_rag.cli.engine import require_extras, started
from cacheblend_rag.models import cache_home
from cacheblend_rag.retrieval import Retriever, load_documents, split


def add(commands: Any) -> None:
    """Add the command of this file."""
    show = command(commands, "demo", _demo, "answer questions with and without CacheBlend")
    show.add_argument("--questions", type=positive, metavar="N", help="only the first N questions")
    add_model(show)


def _demo(args: argparse.Namespace, screen: Screen) -> Done:
    require_extras()
    folder = demo.data_folder()
    questions = demo.load_questions(folder)[: args.questions]
    home = cache_home() / "demo"
    with started(args.model, home, screen) as blend:
        documents = load_documents([folder]).documents
        passages = split(documents, demo.CHUNK_TOKENS, blend.tokenizer)
        report = store_kv(blend, passages, screen)
        if report.reason:
            return Done(REFUSED, {"reason": report.reason, "detail": report.detail})
        retriever = Retriever(passages, folder=index_of(home))
        outcomes = demo.run(blend, retriever, questions, screen.out)
        versions, info = demo.versions(blend), blend.info
    summary = demo.summarize(outcomes)
    screen.out.print()
    screen.out.print(demo.summary_table(summary))
    if report.computed:
        screen.out.print(f"Ingestion: {rate(report):.0f} tokens/s.", highlight=False)
    line = ", ".join(f"{name} {value}" for name, value in versions.items())
    screen.out.print(line, highlight=False, soft_wrap=True)
    if args.model is None:
        screen.out.print(
            "The embedded model is tiny. The questions are those of 66 that it answers right after "
            "a full prefill, and is surest of; a larger one, '--model "
            f"{demo.LARGER_MODEL}' say, answers better.",
            highlight=False,
        )
    data = {
        "model": info.model,
        "versions": versions,
        "block_size": info.block_size,
        "ingest": {**asdict(report), "tokens_per_s": rate(report)},
        "questions": [outcome.to_dict() for outcome in outcomes],
        "summary": summary,
    }
    return Done(OK, data)
