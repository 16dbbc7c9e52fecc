"""``ingest`` documents and ``ask`` about them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.markup import escape
from rich.table import Table

from cacheblend_rag import demo
from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.cli.base import (
    OK,
    REFUSED,
    Done,
    Screen,
    add_any_store,
    add_model,
    add_namespace,
    add_store,
    at_least_32,
    command,
    index_of,
    megabytes,
    milliseconds,
    positive,
    share,
)
from cacheblend_rag.cli.engine import require_extras, started
from cacheblend_rag.cli.store import register
from cacheblend_rag.cli.workers import add_workers, by_workers, check
from cacheblend_rag.errors import PromptError
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.options import Mode
from cacheblend_rag.report import BlendReport
from cacheblend_rag.retrieval import (
    MANIFEST,
    Document,
    LeftOut,
    Passage,
    Retriever,
    load_documents,
    printable,
    split,
)
from cacheblend_rag.select import selectors
from cacheblend_rag.store.url import redacted


def add(commands: Any) -> None:
    """Add the commands of this file."""
    ingest = command(commands, "ingest", _ingest, "split documents, index them, store their KV")
    ingest.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="files .txt, .md and .pdf, or folders of them",
    )
    ingest.add_argument(
        "--chunk-tokens",
        type=at_least_32,
        default=200,
        metavar="N",
        help="tokens of a passage (200)",
    )
    add_any_store(ingest)
    add_namespace(ingest)
    add_model(ingest)
    add_workers(ingest)

    ask = command(commands, "ask", _ask, "answer a question from what was ingested")
    ask.add_argument("question", help="in words, within quotes")
    ask.add_argument("--k", type=positive, default=6, help="passages in the prompt (6)")
    ask.add_argument(
        "--mode", choices=get_args(Mode), default="blend", help="how to serve the prompt (blend)"
    )
    ask.add_argument(
        "--ratio", type=share, metavar="R", help="share of the reused tokens to recompute (0.15)"
    )
    ask.add_argument(
        "--selector", choices=sorted(selectors()), help="which tokens those are (query)"
    )
    ask.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="longest answer (128)"
    )
    add_store(ask)
    add_namespace(ask)
    add_model(ask)


def _ingest(args: argparse.Namespace, screen: Screen) -> Done:
    require_extras()
    check(args)
    documents, left_out = _read(args.paths, screen)
    if args.ray is None:
        with started(args.model, args.store, screen, namespace=args.namespace) as blend:
            passages = split(documents, args.chunk_tokens, blend.tokenizer)
            report = store_kv(blend, passages, screen)
    else:
        passages, report = by_workers(args, documents, screen)
        say(report, screen)
    data = {
        "documents": len(documents),
        "left_out": [{"path": printable(bad.path), "why": bad.why} for bad in left_out],
        "passages": len(passages),
        **_indexed(args, passages, report, left_out, screen),
        "store": redacted(str(args.store)),
        "report": {**asdict(report), "tokens_per_s": rate(report)},
    }
    return Done(REFUSED if report.reason or report.not_stored or left_out else OK, data)


def _indexed(
    args: argparse.Namespace,
    passages: Sequence[Passage],
    report: IngestReport,
    left_out: Sequence[LeftOut],
    screen: Screen,
) -> dict[str, Any]:
    """Have ``ask`` find the passages of a store in a folder."""
    screen.out.print(f"Store {redacted(str(args.store))}", highlight=False, soft_wrap=True)
    if not isinstance(args.store, Path):
        return {"passages_indexed": 0, "index": None}
    if report.keys:
        sources = [passage.source for passage in passages]
        register(args.store, sources, list(report.keys), args.namespace)
    index = index_of(args.store, args.namespace)
    kept = _other_passages(index, args.paths, [bad.path.resolve() for bad in left_out])
    screen.note.print(f"Indexing {len(kept) + len(passages)} passages ...")
    Retriever([*kept, *passages], folder=index)
    return {"passages_indexed": len(kept) + len(passages), "index": str(index)}


def _read(paths: Sequence[Path], screen: Screen) -> tuple[list[Document], list[LeftOut]]:
    """All documents, each once, ``source`` being the whole path; and the files without text.

    Raises:
        PromptError: a path does not exist, or there is no document at all.
    """
    documents, left_out = {}, list[LeftOut]()
    for path in paths:
        loaded = load_documents([path.expanduser()], left_out)
        for warning in loaded.warnings:
            screen.note.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)
        root = _root(path) if path.expanduser().is_dir() else _root(path).parent
        for document in loaded.documents:
            source = str(root / document.source)
            documents[source] = Document(source, document.text)
    if not documents:
        raise PromptError(left_out[0].why)
    for bad in left_out:
        screen.note.print(f"[red]Left out: {escape(bad.why)}[/red]", soft_wrap=True)
    return list(documents.values()), left_out


def _root(path: Path) -> Path:
    return path.expanduser().resolve()


def store_kv(blend: CacheBlend, passages: Sequence[Passage], screen: Screen) -> IngestReport:
    """Ingest passages and say how it went."""
    report = blend.ingest([passage.text for passage in passages])
    say(report, screen)
    return report


def say(report: IngestReport, screen: Screen) -> None:
    """How an ingestion went."""
    if report.reason:
        line = f"[red]No KV was stored: {escape(report.detail)}.[/red] Answers stay exact."
    elif report.computed == 0:
        line = f"Nothing new to compute: {report.present} of {report.chunks} passages were there."
    else:
        line = (
            f"Computed {report.computed} of {report.chunks} passages ({report.present} were there "
            f"before): {report.tokens} tokens in {report.seconds:.1f} s, {rate(report):.0f} "
            f"tokens/s, {megabytes(report.bytes)} of KV."
        )
    screen.out.print(line, highlight=False, soft_wrap=True)
    if report.not_stored:
        why = escape(next(iter(report.not_stored.values())))
        screen.out.print(f"[red]{len(report.not_stored)} of them were not stored: {why}[/red]")
    if report.too_short:
        screen.out.print(f"{report.too_short} passages are too short to be worth storing.")
    if report.too_long:
        screen.out.print(f"{report.too_long} passages are too long for any prompt: not stored.")


def rate(report: IngestReport) -> float:
    """Tokens per second."""
    return report.tokens / report.seconds if report.seconds else 0.0


def _other_passages(index: Path, paths: Sequence[Path], left_out: Sequence[Path]) -> list[Passage]:
    """Passages of earlier ingestions, but for those of ``paths``, which were read again; what was
    left out this time stays as it was.
    """
    if not (index / MANIFEST).exists():
        return []
    roots = [_root(path) for path in paths]
    old = Retriever.load(index).passages

    def read_again(source: Path) -> bool:
        return source not in left_out and any(source.is_relative_to(root) for root in roots)

    return [p for p in old if not read_again(Path(p.source))]


# --- ask ------------------------------------------------------------------------------------------


def _ask(args: argparse.Namespace, screen: Screen) -> Done:
    require_extras()
    index = index_of(args.store, args.namespace)
    passages = Retriever.load(index).search(args.question, args.k)
    asked = {"mode": args.mode, "recompute_ratio": args.ratio, "selector": args.selector}
    options = {name: value for name, value in asked.items() if value is not None}
    with started(args.model, args.store, screen, namespace=args.namespace) as blend:
        messages = demo.chat(passages, args.question)
        with blend.stream(
            messages, max_tokens=args.max_tokens, temperature=0.0, **options
        ) as stream:
            for piece in stream:
                screen.out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        result = stream.result
    screen.out.print("\n")
    screen.out.print(_segments_table(result.report))
    screen.out.print(_report_table(result.report))
    _hint(result.report, args, screen)
    data = {
        "question": args.question,
        "answer": result.text,
        "finish_reason": result.finish_reason,
        "passages": [asdict(passage) for passage in passages],
        "report": result.report.to_dict(),
    }
    return Done(OK, data)


def _segments_table(report: BlendReport) -> Table:
    table = Table("prompt tokens", "served", "recomputed", "because", title="Prompt")
    for s in report.segments:
        recomputed = str(s.tokens_recomputed) if s.kind == "reused" else ""
        table.add_row(f"{s.start} to {s.end}", s.kind, recomputed, escape(s.detail))
    return table


def _report_table(report: BlendReport) -> Table:
    table = Table("", "", title="Report", show_header=False)
    for kind in ("total", "reused", "recomputed", "fresh", "prefix_cached"):
        table.add_row(f"tokens {kind.replace('_', ' ')}", str(getattr(report, f"tokens_{kind}")))
    if report.blended:
        table.add_row("ratio, selector", f"{report.recompute_ratio:g}, {report.selector}")
        table.add_row("KV loaded", megabytes(report.bytes_loaded))
    else:
        table.add_row("not blended", escape(report.detail))
    table.add_row("first token", milliseconds(report.ttft_s))
    for stage, seconds in report.stages_s.items():
        table.add_row(f"  {stage}", milliseconds(seconds))
    table.add_row("whole answer", milliseconds(report.total_s))
    return table


def _hint(report: BlendReport, args: argparse.Namespace, screen: Screen) -> None:
    if args.mode in demo.REUSING and not report.blended and not report.tokens_prefix_cached:
        model = f" --model {args.model}" if args.model else ""
        screen.note.print(
            "Nothing stored was used. KV belongs to one model: 'cacheblend ingest PATH"
            f"{escape(model)}' stores this model's.",
            highlight=False,
            soft_wrap=True,
        )
