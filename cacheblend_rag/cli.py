"""The command ``cacheblend``: ingest documents, ask, check a model, look into a store, a demo.

People read tables on stdout and progress on stderr. With ``--json``, stdout carries one JSON object
and nothing else; what people read then goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cacheblend_rag import demo, gate
from cacheblend_rag._version import __version__
from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.config import BlendConfig, Mode
from cacheblend_rag.engine.base import GateReport
from cacheblend_rag.errors import CacheBlendError, EngineError, MissingExtraError, StoreError
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.models import cache_home, resolve_model
from cacheblend_rag.report import BlendReport
from cacheblend_rag.retrieval import MANIFEST, Document, Passage, Retriever, load_documents, split
from cacheblend_rag.select import SELECTORS
from cacheblend_rag.store.disk import MARKER, DiskStore

OK, OUR_ERROR, REFUSED, INTERRUPTED = 0, 1, 3, 130  # argparse ends with 2

# Defaults of this command; what the user's environment sets wins.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler in this process: a quicker start
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_EXTRAS = {
    "faiss": "faiss-cpu",
    "langchain_text_splitters": "langchain-text-splitters",
    "sentence_transformers": "sentence-transformers",
}


class Screen(NamedTuple):
    """Where text for people goes."""

    out: Console  # results
    note: Console  # progress


class Done(NamedTuple):
    """How a command ended, and what ``--json`` prints."""

    code: int
    data: Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(arguments)
    _quieten()
    try:
        with _nothing_else_on_stdout(args.json):
            note = Console(stderr=True)
            done: Done = args.run(args, Screen(note if args.json else Console(), note))
    except CacheBlendError as error:
        print(f"cacheblend: {error}", file=sys.stderr)
        return OUR_ERROR
    except KeyboardInterrupt:
        print("cacheblend: interrupted", file=sys.stderr)
        return INTERRUPTED
    if args.json:
        print(json.dumps(done.data, indent=2, ensure_ascii=False))
    return done.code


# --- arguments ------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cacheblend",
        description="RAG answers with a sooner first token: documents' KV is computed once, then "
        "blended into every prompt that contains them.",
    )
    parser.add_argument("--version", action="version", version=f"cacheblend-rag {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    ingest = _command(commands, "ingest", _ingest, "split documents, index them, store their KV")
    ingest.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=".txt, .md, .pdf")
    ingest.add_argument("--chunk-tokens", type=_at_least_32, default=200, metavar="N")
    _add_store(ingest)
    _add_model(ingest)

    ask = _command(commands, "ask", _ask, "answer a question from what was ingested")
    ask.add_argument("question")
    ask.add_argument("--k", type=_positive, default=6, help="passages in the prompt (6)")
    ask.add_argument("--mode", choices=get_args(Mode), default="blend")
    ask.add_argument("--ratio", type=_share, metavar="R", help="share to recompute (0.15)")
    ask.add_argument("--selector", choices=sorted(SELECTORS), help="which tokens those are (query)")
    ask.add_argument("--max-tokens", type=_positive, default=128, metavar="N")
    _add_store(ask)
    _add_model(ask)

    check = _command(commands, "check", _check, "can this model blend exactly? Exit code 3: no")
    check.add_argument("model", metavar="MODEL", help="a hub name or a folder")

    stats = _command(commands, "stats", _stats, "what the store holds")
    _add_store(stats)

    show = _command(commands, "demo", _demo, "answer questions with and without CacheBlend")
    show.add_argument("--questions", type=_positive, metavar="N", help="only the first N")
    _add_model(show)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)
    return parser


def _add_store(parser: argparse.ArgumentParser) -> None:
    default = cache_home() / "store"
    parser.add_argument(
        "--store", type=_folder, default=default, metavar="DIR", help=f"({default})"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    text = "a hub name or a folder (the embedded SmolLM2-135M-Instruct)"
    parser.add_argument("--model", metavar="M", help=text)


def _number(text: str, low: int) -> int:
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= low:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {low} or more")


def _positive(text: str) -> int:
    return _number(text, 1)


def _at_least_32(text: str) -> int:
    return _number(text, 32)  # shorter chunks are never reused


def _share(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (share := float(text)) <= 1:
            return share
    raise argparse.ArgumentTypeError(f"{text!r} is not a share, 0 to 1")


def _folder(text: str) -> Path:
    if not text or "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a folder; a store of this command is one"
        )
    return Path(text).expanduser().absolute()


# --- ingest ---------------------------------------------------------------------------------------


def _ingest(args: argparse.Namespace, screen: Screen) -> Done:
    _require_extras()
    documents = _read(args.paths, screen)
    with _started(args.model, args.store, screen) as blend:
        passages = split(documents, args.chunk_tokens, blend.tokenizer)
        report = _store_kv(blend, passages, screen)
    index = _index(args.store)
    kept = _other_passages(index, args.paths)
    screen.note.print(f"Indexing {len(kept) + len(passages)} passages ...")
    Retriever([*kept, *passages], folder=index)
    screen.out.print(f"Store {args.store}", highlight=False, soft_wrap=True)
    data = {
        "documents": len(documents),
        "passages": len(passages),
        "passages_indexed": len(kept) + len(passages),
        "store": str(args.store),
        "index": str(index),
        "report": {**asdict(report), "tokens_per_s": _rate(report)},
    }
    return Done(REFUSED if report.reason else OK, data)


def _read(paths: Sequence[Path], screen: Screen) -> list[Document]:
    """All documents, each once, ``source`` being the whole path."""
    documents = {}
    for path in paths:
        loaded = load_documents([path.expanduser()])
        for warning in loaded.warnings:
            screen.note.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)
        root = _root(path) if path.expanduser().is_dir() else _root(path).parent
        for document in loaded.documents:
            source = str(root / document.source)
            documents[source] = Document(source, document.text)
    return list(documents.values())


def _root(path: Path) -> Path:
    return path.expanduser().resolve()


def _store_kv(blend: CacheBlend, passages: Sequence[Passage], screen: Screen) -> IngestReport:
    report = blend.ingest([passage.text for passage in passages])
    if report.reason:
        line = f"[red]No KV was stored: {escape(report.reason)}.[/red] Answers stay exact."
    elif report.computed == 0:
        line = f"Nothing new to compute: {report.present} of {report.chunks} passages were stored."
    else:
        line = (
            f"Computed {report.computed} of {report.chunks} passages ({report.present} were "
            f"stored): {report.tokens} tokens in {report.seconds:.1f} s, {_rate(report):.0f} "
            f"tokens/s, {_size(report.bytes)} of KV."
        )
    screen.out.print(line, highlight=False, soft_wrap=True)
    if report.too_short:
        screen.out.print(f"{report.too_short} passages are too short to be worth storing.")
    return report


def _rate(report: IngestReport) -> float:
    return report.tokens / report.seconds if report.seconds else 0.0


def _other_passages(index: Path, paths: Sequence[Path]) -> list[Passage]:
    """Passages of earlier ingestions, but for those of ``paths``, which are read again."""
    if not (index / MANIFEST).exists():
        return []
    roots = [_root(path) for path in paths]
    old = Retriever.load(index).passages
    return [p for p in old if not any(Path(p.source).is_relative_to(root) for root in roots)]


# --- ask ------------------------------------------------------------------------------------------


def _ask(args: argparse.Namespace, screen: Screen) -> Done:
    _require_extras()
    passages = Retriever.load(_index(args.store)).search(args.question, args.k)
    asked = {"mode": args.mode, "recompute_ratio": args.ratio, "selector": args.selector}
    options = {name: value for name, value in asked.items() if value is not None}
    with _started(args.model, args.store, screen) as blend:
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
        table.add_row(f"{s.start} to {s.end}", s.kind, recomputed, escape(s.reason))
    return table


def _report_table(report: BlendReport) -> Table:
    table = Table("", "", title="Report", show_header=False)
    for kind in ("total", "reused", "recomputed", "fresh", "prefix_cached"):
        table.add_row(f"tokens {kind.replace('_', ' ')}", str(getattr(report, f"tokens_{kind}")))
    if report.blended:
        table.add_row("ratio, selector", f"{report.recompute_ratio:g}, {report.selector}")
        table.add_row("KV loaded", _size(report.bytes_loaded))
    else:
        table.add_row("not blended", escape(report.reason))
    table.add_row("first token", _milliseconds(report.ttft_s))
    for stage, seconds in report.stages_s.items():
        table.add_row(f"  {stage}", _milliseconds(seconds))
    table.add_row("whole answer", _milliseconds(report.total_s))
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


# --- check, stats, demo ---------------------------------------------------------------------------


def _check(args: argparse.Namespace, screen: Screen) -> Done:
    with _started(args.model, None, screen) as blend:
        report, info = blend.gate, blend.info
    if report.layers:
        screen.out.print(_layers_table(report))
    if report.prefill_error is not None:
        screen.out.print(
            f"Ratio 1 against a plain prefill: total variation distance {report.prefill_error:.2g} "
            f"of the next token ({report.tolerance[1]:g} allowed).",
            soft_wrap=True,
        )
    verdict = (
        f"[green]passed[/green]: {escape(info.model)} blends exactly in {info.dtype}."
        if report.passed
        else f"[red]refused[/red]: {escape(report.reason)}. It is served without blending."
    )
    screen.out.print(verdict, highlight=False, soft_wrap=True)
    data = {
        **asdict(report),
        "layers": gate.table(report),
        "model": info.model,
        "dtype": info.dtype,
        "device": info.device,
        "vllm": info.vllm_version,
    }
    return Done(OK if report.passed else REFUSED, data)


def _layers_table(report: GateReport) -> Table:
    bound = f"{report.tolerance[0]:g} allowed"
    table = Table("layer", "key error", "value error", "", title=f"Moved keys and values ({bound})")
    for layer in sorted({check.layer for check in report.layers}):
        rows = [check for check in report.layers if check.layer == layer]
        errors = (max(c.key_error for c in rows), max(c.value_error for c in rows))
        verdict = "[green]ok[/green]" if all(c.ok for c in rows) else "[red]no[/red]"
        table.add_row(str(layer), *(f"{error:.2e}" for error in errors), verdict)
    return table


def _stats(args: argparse.Namespace, screen: Screen) -> Done:
    if not (args.store / MARKER).is_file():
        raise StoreError(
            f"There is no chunk store in {args.store}. Make one with 'cacheblend ingest PATH "
            f"--store {args.store}', or name another folder."
        )
    rows = [_namespace(folder) for folder in sorted((args.store / "v1").iterdir())]
    index = _index(args.store)
    indexed = len(Retriever.load(index).passages) if (index / MANIFEST).exists() else 0
    table = Table("namespace", "chunks", "tokens", "KV", title=str(args.store))
    for row in rows:
        table.add_row(row["namespace"], str(row["chunks"]), str(row["tokens"]), _size(row["bytes"]))
    screen.out.print(table)
    screen.out.print(f"{indexed} passages indexed. A namespace is one model on one rank.")
    total = {name: sum(row[name] for row in rows) for name in ("chunks", "tokens", "bytes")}
    data = {"store": str(args.store), "namespaces": rows, "total": total, "passages": indexed}
    return Done(OK, data)


def _namespace(folder: Path) -> dict[str, Any]:
    with DiskStore(folder.parents[1], namespace=folder.name) as store:
        chunks = list(store.scan())
    return {
        "namespace": folder.name,
        "chunks": len(chunks),
        "tokens": sum(len(chunk.token_ids) for chunk in chunks),
        "bytes": sum(chunk.nbytes for chunk in chunks),
    }


def _demo(args: argparse.Namespace, screen: Screen) -> Done:
    _require_extras()
    folder = demo.data_folder()
    questions = demo.load_questions(folder)[: args.questions]
    home = cache_home() / "demo"
    with _started(args.model, home, screen) as blend:
        documents = load_documents([folder]).documents
        passages = split(documents, demo.CHUNK_TOKENS, blend.tokenizer)
        report = _store_kv(blend, passages, screen)
        if report.reason:
            return Done(REFUSED, {"reason": report.reason})
        retriever = Retriever(passages, folder=_index(home))
        outcomes = demo.run(blend, retriever, questions, screen.out)
        versions, info = demo.versions(blend), blend.info
    summary = demo.summarize(outcomes)
    screen.out.print()
    screen.out.print(demo.summary_table(summary))
    if report.computed:
        screen.out.print(f"Ingestion: {_rate(report):.0f} tokens/s.", highlight=False)
    line = ", ".join(f"{name} {value}" for name, value in versions.items())
    screen.out.print(line, highlight=False, soft_wrap=True)
    if args.model is None:
        screen.out.print(
            "The embedded model is tiny. The questions are some that it answers right after a full "
            "prefill, and little misleads it; a larger one, '--model "
            f"{demo.LARGER_MODEL}' say, answers better.",
            highlight=False,
        )
    data = {
        "model": info.model,
        "versions": versions,
        "block_size": info.block_size,
        "ingest": {**asdict(report), "tokens_per_s": _rate(report)},
        "questions": [outcome.to_dict() for outcome in outcomes],
        "summary": summary,
    }
    return Done(OK, data)


# --- engine ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(name: str | None, store: Path | None, screen: Screen) -> Iterator[CacheBlend]:
    """The engine over a store in this folder, or in memory; closed at the end."""
    model = resolve_model(name)
    screen.note.print(f"Starting vLLM with {model} ...", highlight=False, soft_wrap=True)
    start = time.perf_counter()
    url = store.as_uri() if store else "memory://"
    config = BlendConfig(system_prompt=demo.SYSTEM_PROMPT, store=url)
    with tempfile.TemporaryFile() as log:
        try:
            with _errors_to(log, Path(model).is_dir()):
                blend = CacheBlend(
                    model, config=config, engine="batch", **_engine_args(name is None)
                )
            with blend as opened:
                took = time.perf_counter() - start
                screen.note.print(f"Ready after {took:.0f} s.", highlight=False)
                yield opened
        except EngineError:
            log.seek(0)
            screen.note.print(log.read().decode(errors="replace"), markup=False, highlight=False)
            raise


@contextlib.contextmanager
def _errors_to(log: IO[bytes], wanted: bool) -> Iterator[None]:
    """Send to ``log`` what is written to stderr meanwhile, and what processes started meanwhile
    ever write there. Not for a model from the hub: its download is worth watching.
    """
    if not wanted or os.environ["VLLM_LOGGING_LEVEL"] != _ENVIRONMENT["VLLM_LOGGING_LEVEL"]:
        yield
        return
    with _descriptor(2, log.fileno()):
        yield


def _engine_args(embedded: bool) -> dict[str, Any]:
    import torch

    args: dict[str, Any] = {"use_tqdm_on_load": not embedded}  # loaded before a bar can be read
    if not torch.cuda.is_available():
        # Small blocks leave less of a prompt's last chunk to compute; on a GPU they are small. A
        # worker of its own gets the OpenMP library that vLLM wants preloaded.
        args |= {"block_size": 32, "distributed_executor_backend": "mp"}
        if embedded:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return args


def _index(store: Path) -> Path:
    """The folder of the FAISS index, beside the store."""
    return store.with_name(f"{store.name}-index")


def _require_extras() -> None:
    """Say what is missing before the engine is started in vain."""
    for module, package in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, "cli")


def _quieten() -> None:
    """Keep vLLM's own chatter out of the way; whoever sets its variables gets to see it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # until vLLM sets up its logging, Python would print its warnings
    level = logging.getLevelNamesMapping().get(os.environ["VLLM_LOGGING_LEVEL"].upper())
    logging.getLogger("vllm").setLevel(level or logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


@contextlib.contextmanager
def _nothing_else_on_stdout(wanted: bool) -> Iterator[None]:
    """Send to stderr what anyone writes to stdout, C libraries and child processes included."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    with _descriptor(1, 2), contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _descriptor(number: int, target: int) -> Iterator[None]:
    """Let a file descriptor lead to ``target`` for a while."""
    kept = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
