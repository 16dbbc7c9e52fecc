"""``check`` whether a model blends exactly."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from cacheblend_rag import model_check
from cacheblend_rag.cli.base import OK, REFUSED, Done, Screen, command
from cacheblend_rag.cli.engine import started
from cacheblend_rag.engine.base import ModelCheck


def add(commands: Any) -> None:
    """Add the command of this file."""
    check = command(commands, "check", _check, "can this model blend exactly? Exit code 3: no")
    check.add_argument("model", metavar="MODEL", help="a hub name or a folder")


def _check(args: argparse.Namespace, screen: Screen) -> Done:
    with started(args.model, None, screen) as blend:
        report, info, calibration = blend.model_check, blend.info, blend.calibration
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
        else f"[red]refused[/red]: {escape(report.detail)}. It is served without blending."
    )
    screen.out.print(verdict, highlight=False, soft_wrap=True)
    if report.max_tokens is not None:
        screen.out.print(
            f"For its sliding window a blend covers a prompt's first {report.max_tokens} tokens.",
            soft_wrap=True,
        )
    if calibration is not None:
        screen.out.print(
            f"'auto' is {calibration.selector} at {calibration.ratio:g}, propagation length "
            f"{calibration.propagation_length}, "
            f"{dict(calibration.selector_options)}: changed {calibration.changed:.0%} of "
            f"{calibration.questions} answers, recomputed {calibration.mean_ratio:.1%}.",
            soft_wrap=True,
            highlight=False,
        )
    data = {
        **asdict(report),
        "calibration": None if calibration is None else asdict(calibration),
        "layers": model_check.table(report),
        "model": info.model,
        "dtype": info.dtype,
        "device": info.device,
        "vllm": info.vllm_version,
    }
    return Done(OK if report.passed else REFUSED, data)


def _layers_table(report: ModelCheck) -> Table:
    bound = f"{report.tolerance[0]:g} allowed"
    table = Table("layer", "key error", "value error", "", title=f"Moved keys and values ({bound})")
    for layer in sorted({check.layer for check in report.layers}):
        rows = [check for check in report.layers if check.layer == layer]
        errors = (max(c.key_error for c in rows), max(c.value_error for c in rows))
        verdict = "[green]ok[/green]" if all(c.ok for c in rows) else "[red]no[/red]"
        table.add_row(str(layer), *(f"{error:.2e}" for error in errors), verdict)
    return table
