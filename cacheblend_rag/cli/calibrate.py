"""``calibrate``: what ``recompute_ratio="auto"`` is to stand for on a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cacheblend_rag._version import __version__
from cacheblend_rag.calibration import Calibration, in_folder, usual_path
from cacheblend_rag.cli.base import OK, Done, Screen, command, share
from cacheblend_rag.cli.evaluate import add_asking, ask
from cacheblend_rag.evaluate.calibrate import CANDIDATES, choose, pooled
from cacheblend_rag.evaluate.rows import parse_row
from cacheblend_rag.evaluate.summary import summarise


def add(commands: Any) -> None:
    """Add the command of this file."""
    text = "choose what is recomputed, by how many answers change"
    parser = command(commands, "calibrate", _calibrate, text)
    add_asking(parser, out="cacheblend-calibrate", group=8)
    parser.set_defaults(dtype="auto")  # as it is served: weights in another dtype are others
    parser.add_argument(
        "--changed",
        type=share,
        default=0.2,
        metavar="S",
        help="share of answers that may change (0.2)",
    )
    text = "where to keep it: a file, or a folder of them (where 'auto' looks for it)"
    parser.add_argument("--file", type=Path, metavar="PATH", help=text)
    text = "choose among these rows, such as query@0.3~64, instead of among twenty"
    parser.add_argument("--only-rows", nargs="+", metavar="ROW", help=text)


def _calibrate(args: argparse.Namespace, screen: Screen) -> Done:
    candidates = args.only_rows or CANDIDATES
    results, fingerprint = ask(args, screen, [parse_row(name) for name in candidates])
    name = choose(pooled(summarise(results, split="tune")), args.changed, candidates)
    measured = pooled(summarise(results, split="report"))
    row = next(row for row in measured.rows if row.row == name)
    options = parse_row(name).options
    assert row.ratio is not None
    found = Calibration(
        fingerprint=fingerprint,
        model=Path(str(results.settings["model"])).name,
        version=__version__,
        ratio=float(options["recompute_ratio"]),
        selector=options["selector"],
        selector_options=options["selector_options"],
        propagation_length=options["propagation_length"],
        changed_allowed=args.changed,
        changed=row.changed,
        mean_ratio=row.ratio,
        questions=measured.questions,
        data=tuple(sorted({key[0] for key in results.asked})),
    )
    path = args.file or usual_path(fingerprint)
    if path.is_dir():
        path = in_folder(path, fingerprint)
    found.save(path)
    screen.out.print(
        f"{name}: changes {row.changed:.0%} of {measured.questions} answers it was not chosen by "
        f"({args.changed:.0%} allowed) and recomputes {row.ratio:.1%}. Kept in {path}",
        soft_wrap=True,
        highlight=False,
    )
    return Done(OK, {"row": name, "file": str(path), "changed": row.changed, "ratio": row.ratio})
