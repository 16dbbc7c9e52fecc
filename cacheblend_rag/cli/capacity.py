"""``plan``: how large a fleet has to be."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from cacheblend_rag.capacity import CapacityInputs, CapacityPlan, kv_token_bytes, plan_capacity
from cacheblend_rag.cli.base import OK, Done, Screen, command, size
from cacheblend_rag.errors import ConfigError, ModelError

_SIZES = ("memory_bytes", "store_bytes")
_WHOLE = "token_bytes"


def add(commands: Any) -> None:
    """Add the command of this file."""
    parser = command(commands, "plan", _plan, "how large store, network and fleet have to be")
    text = "a model's folder, whose config.json says how large its KV is"
    parser.add_argument("--model", type=Path, metavar="DIR", help=text)
    parser.add_argument("--fp8", action="store_true", help="KV is stored with dtype=fp8")
    for about in fields(CapacityInputs):
        needed = about.default is MISSING and about.name != _WHOLE
        default = "" if about.default is MISSING else f" ({about.default:g}, {_kind(about)})"
        parser.add_argument(
            f"--{about.name.replace('_', '-')}",
            type=size if about.name in _SIZES else number,
            required=needed,
            metavar="SIZE" if about.name in _SIZES else "N",
            help=f"{about.metadata['text']}{default}".replace("%", "%%"),
        )


def _kind(about: Any) -> str:
    return str(about.metadata["source"]).partition(":")[0]


def number(text: str) -> float:
    """A number, also such as 5e9 or 10_000."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def _plan(args: argparse.Namespace, screen: Screen) -> Done:
    given = {f.name: v for f in fields(CapacityInputs) if (v := getattr(args, f.name)) is not None}
    sources = dict.fromkeys(given, "given")
    if _WHOLE not in given:
        given[_WHOLE] = kv_token_bytes(_config(args.model), eight_bits=args.fp8)
        sources[_WHOLE] = "by config.json" + (", in eight bits" if args.fp8 else "")
    elif args.model or args.fp8:
        raise ConfigError("--token-bytes says what --model and --fp8 would; give one of them")
    inputs = CapacityInputs(**given)
    found = plan_capacity(inputs)
    rows = [
        (f.metadata["text"], getattr(inputs, f.name), sources.get(f.name, f.metadata["source"]))
        for f in fields(CapacityInputs)
    ]
    table = Table("from", "", "where it is from")
    for text, value, source in rows:
        is_size = text.startswith("bytes") and value >= 1e6
        table.add_row(text, quantity(value, "B") if is_size else f"{value:,.10g}", source)
    screen.out.print(table)
    result = Table("what", "")
    for name, value in shown(inputs, found):
        result.add_row(name, value)
    screen.out.print(result)
    data = {
        "inputs": {f.name: getattr(inputs, f.name) for f in fields(CapacityInputs)},
        "sources": {f.name: row[2] for f, row in zip(fields(CapacityInputs), rows, strict=True)},
        "plan": found._asdict(),
    }
    return Done(OK, data)


def _config(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        raise ConfigError("give --model DIR, a model's folder, or --token-bytes N")
    try:
        found = json.loads((folder.expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{folder} has no config.json that can be read ({error}); give a model's folder or "
            "--token-bytes N"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{folder}/config.json is no object; give --token-bytes N")
    return found


def shown(given: CapacityInputs, found: CapacityPlan) -> Iterator[tuple[str, str]]:
    """What a plan says, for people."""
    saved = found.full_s / found.blend_s
    missing = "fetched from the store" if found.fetches else "computed, which is quicker"
    yield "chunks", f"{found.chunks:,}"
    yield "KV of all", quantity(found.kv_bytes, "B")
    yield "asked for and in the store", f"{found.store_share:.1%}"
    yield "asked for and in a replica's memory", f"{found.memory_share:.1%}"
    yield "the same at most, routed by warmth", f"{found.routed_share:.1%}"
    yield (
        "a chunk that is not in memory",
        f"{missing}: {1e3 * found.fetch_s:.0f} ms to fetch, {1e3 * found.compute_s:.0f} to compute",
    )
    yield "store to replicas", f"{quantity(found.network_bytes_s, 'B/s')}"
    yield "the same at least, routed", f"{quantity(found.routed_network_bytes_s, 'B/s')}"
    full = "; requests wait for it" if found.link_share > given.busy else ""
    yield "a replica's link to the store is busy", f"{found.link_share:.0%}{full}"
    yield (
        "work until the first token",
        f"{1e3 * found.blend_s:.0f} ms, full prefill {1e3 * found.full_s:.0f} ms ({saved:.1f}x)",
    )
    yield "replicas", f"{found.replicas:,}, without blending {found.replicas_full:,}"
    yield "ingestion on one replica", f"{found.ingest_s / 3600:,.1f} h"


def quantity(value: float, unit: str) -> str:
    """With a prefix of thousands."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(len(prefixes) - 1, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {prefixes[power]}{unit}"
