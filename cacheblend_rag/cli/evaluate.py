"""``eval``: how good are the answers of every way of serving a prompt?"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from cacheblend_rag._version import __version__
from cacheblend_rag.cli.base import OK, Done, Screen, command, positive, share
from cacheblend_rag.cli.engine import started
from cacheblend_rag.errors import ConfigError, DataError, MissingExtraError
from cacheblend_rag.evaluate.base import Question
from cacheblend_rag.evaluate.results import ResultFile, Results, read_results
from cacheblend_rag.evaluate.rows import Row, make_rows, parse_row
from cacheblend_rag.evaluate.summary import (
    SetSummary,
    interval_text,
    summarise,
    to_dict,
    to_markdown,
    what_it_tells,
)

_SHOW = "write which tokens each row recomputed, for N questions of each file, as HTML (0)"
STORE = "memory://?capacity=64GiB"  # never full: passages are forgotten before


def add(commands: Any) -> None:
    """Add the command of this file."""
    parser = command(commands, "eval", _eval, "score the answers of every way of serving a prompt")
    add_asking(parser, out="cacheblend-eval", group=1)
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="FILE", help="only join and score these results"
    )
    parser.add_argument(
        "--selectors",
        nargs="*",
        default=["query", "hkvd"],
        metavar="S",
        help="a row of each (query hkvd)",
    )
    parser.add_argument(
        "--ratios",
        nargs="*",
        type=share,
        default=[0.15],
        metavar="R",
        help="each selector at each of these (0.15)",
    )
    text = "ingest prefixes of the row 'reuse'; the first one is that of all rows"
    parser.add_argument("--prefixes", nargs="+", default=["auto", "none"], metavar="P", help=text)
    parser.add_argument(
        "--rows", nargs="*", default=[], metavar="ROW", help="more rows, such as hkvd@0.3"
    )
    parser.add_argument("--only-rows", nargs="+", metavar="ROW", help="these rows and full only")
    parser.add_argument(
        "--cut", type=positive, metavar="WORDS", help="cut passages into chunks of so many words"
    )
    parser.add_argument(
        "--scatter", action="store_true", help="with --cut: half of these chunks, in random order"
    )
    parser.add_argument(
        "--split",
        choices=["tune", "report", "all"],
        default="all",
        help="which half of the questions (all)",
    )
    parser.add_argument(
        "--pool",
        nargs="+",
        type=_pool,
        default=[],
        metavar="NAME=SET,...",
        help="also take these sets of questions together",
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help=_SHOW)


def add_asking(parser: argparse.ArgumentParser, *, out: str, group: int) -> None:
    """What a command needs that asks questions, see ``ask``."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="hub name or folder (embedded)")
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="files of questions, or folders of them",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(out), metavar="DIR", help=f"results ({out})"
    )
    parser.add_argument("--seed", type=int, default=7, help="of the order of questions (7)")
    parser.add_argument("--limit", type=positive, metavar="N", help="most questions of a file")
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="only the I-th of N parts, such as 1/4",
    )
    parser.add_argument(
        "--group",
        type=positive,
        default=group,
        metavar="N",
        help=f"questions asked together; with 1 they are timed ({group})",
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="longest answer")
    parser.add_argument("--dtype", help="of the model (its own; to eval on a CPU float32)")
    parser.add_argument(
        "--engine-arg",
        nargs="*",
        type=_engine_arg,
        default=[],
        metavar="NAME=VALUE",
        help="vLLM's engine arguments, such as max_model_len=8192",
    )


def _eval(args: argparse.Namespace, screen: Screen) -> Done:
    if (args.data is None) == (args.report is None):
        raise ConfigError("give --data to ask questions, or --report to score results")
    if args.report is not None:
        results = read_results(_result_files(args.report))
    else:
        results, _ = ask(args, screen, _rows(args))
    return _publish(results, args, screen)


def _rows(args: argparse.Namespace) -> list[Row]:
    if args.only_rows:
        return [parse_row(name, args.prefixes[0]) for name in args.only_rows]
    return make_rows(args.selectors, args.ratios, args.prefixes, args.rows)


def ask(args: argparse.Namespace, screen: Screen, rows: Sequence[Row]) -> tuple[Results, str]:
    """Ask the questions of ``add_asking``'s arguments in every way; the model's fingerprint too.

    Raises:
        ConfigError: no data was named.
    """
    from cacheblend_rag.config import BlendConfig
    from cacheblend_rag.evaluate.prompts import system_prompt
    from cacheblend_rag.evaluate.readers import other_passages
    from cacheblend_rag.evaluate.run import Evaluation

    if args.data is None:
        raise ConfigError("name files of questions: --data FILE")
    questions, cut, scatter = _questions(args)
    config = BlendConfig(
        system_prompt=system_prompt(questions[0].kind),
        ingest_prefix="none",  # rows bring their own
        store=STORE,
    )
    screen.note.print(f"{len(questions)} questions, {len(rows)} rows.", highlight=False)
    options = _engine_options(args)
    with started(args.model, None, screen, config=config, **options) as blend:
        settings = {
            "model": Path(blend.info.model).name,
            "fingerprint": blend.info.fingerprint[:16],
            "dtype": blend.info.dtype,
            "device": blend.info.device,
            "prefix": rows[0].prefix,
            "max_tokens": args.max_tokens,
            "cut": cut,
            "scatter": scatter or None,  # as in results from before there was such a thing
            "vllm": blend.info.vllm_version,
            "version": __version__,
        }
        part, parts = args.shard
        path = args.out / f"answers-{part}of{parts}.jsonl"
        needs_other_passages = any(row.prefix.startswith("other_passages:") for row in rows)
        passages = other_passages(args.data, args.seed) if needs_other_passages else {}
        show = getattr(args, "show", 0)
        evaluation = Evaluation(blend, rows, args.group, show, args.max_tokens, passages)
        with (
            ResultFile(path, settings) as file,
            tqdm(total=len(questions), desc="questions", unit="") as bar,
        ):
            evaluation.run(questions, file, bar.update)
            return file.results, blend.info.fingerprint


def _questions(args: argparse.Namespace) -> tuple[list[Question], int | None, bool]:
    """The questions asked, and how their passages were cut and scattered."""
    from cacheblend_rag.evaluate.readers import load

    questions = load(
        args.data,
        seed=args.seed,
        limit=args.limit,
        split=getattr(args, "split", "all"),
        shard=args.shard,
    )
    cut, scatter = getattr(args, "cut", None), getattr(args, "scatter", False)
    if cut is not None:
        questions = [question.cut(cut, scatter=scatter) for question in questions]
    elif scatter:
        raise ConfigError("--scatter is about the pieces of passages: say with --cut how long")
    return questions, cut, scatter


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from cacheblend_rag.engine.answers import PROCESSOR

    options: dict[str, Any] = {"logits_processors": [PROCESSOR]}
    if args.dtype or not torch.cuda.is_available():
        options["dtype"] = args.dtype or "float32"
    return {**options, **dict(args.engine_arg)}


def _publish(results: Results, args: argparse.Namespace, screen: Screen) -> Done:
    pools = dict(args.pool)
    if len(pools) < len(args.pool):
        raise ConfigError("two pools have the same name: give each its own (--pool NAME=SET,SET)")
    summaries = summarise(results, split=args.split, pools=pools)
    data = to_dict(results, summaries)
    args.out.mkdir(parents=True, exist_ok=True)
    written = [args.out / "summary.json", args.out / "summary.md"]
    written[0].write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
    written[1].write_text(to_markdown(results, summaries), encoding="utf-8")
    if results.tokens:
        from cacheblend_rag.evaluate.coloured import page

        written.append(args.out / "recomputed.html")
        written[-1].write_text(page(results), encoding="utf-8")
    written += _plots(summaries, args.out, screen)
    for summary in summaries:
        screen.out.print(_table(summary))
        screen.out.print(what_it_tells(summary), soft_wrap=True, highlight=False, markup=False)
    screen.note.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)
    return Done(OK, data)


def _plots(summaries: Sequence[SetSummary], folder: Path, screen: Screen) -> list[Path]:
    from cacheblend_rag.evaluate.plots import plot

    try:
        return [path for s in summaries if s.rows for path in plot(s, folder)]
    except MissingExtraError as error:
        screen.note.print(f"No plots: {escape(str(error))}", soft_wrap=True, highlight=False)
        return []


def _table(summary: SetSummary) -> Table:
    title = f"{summary.set}: {summary.questions} questions"
    if summary.left_out or summary.skipped:
        title += f" ({summary.left_out} unfinished, {summary.skipped} too long)"
    table = Table(
        "row", summary.measure, "to full [95 %]", "agree", "changed", "KL", "share", title=title
    )
    for r in summary.rows:
        quality = r.to_full.get("quality")
        table.add_row(
            escape(r.row),
            "" if r.quality is None else f"{r.quality:.3f}",
            "" if quality is None else escape(interval_text(quality)),
            f"{r.agree:.3f}",
            f"{r.changed:.3f}",
            "" if r.kl is None else f"{r.kl:.4f}",
            "" if r.ratio is None else f"{r.ratio:.1%}",
        )
    return table


def _result_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("answers-*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"no answers-*.jsonl in {', '.join(map(str, paths))}")
    return files


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 1/4, with I from 1 to N")
    return int(match[1]), int(match[2])


def _pool(text: str) -> tuple[str, list[str]]:
    name, _, sets = text.partition("=")
    members = list(dict.fromkeys(s for s in sets.split(",") if s))
    # the name is part of files' names
    if not re.fullmatch(r"[\w.+-]+", name) or name == "all" or not members:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=SET,SET with a NAME of letters, digits and .+-_ other than 'all'"
        )
    return name, members


def _engine_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
