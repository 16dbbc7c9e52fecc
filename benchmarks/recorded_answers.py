"""Which answers change at which ratio, question by question: what the controller is simulated on.

    python benchmarks/recorded_answers.py shorten --out DIR --passages 5 --words 480 FILE [FILE ...]
    cacheblend eval MODEL --data DIR --only-rows query@0.05~64 query@0.1~64 ... --out RESULTS
    python benchmarks/recorded_answers.py collect --multi-hop NAME ... --out FILE RESULTS [...]

``shorten`` keeps the passages that a question needs (those that contain an answer, or those that
``--gold`` names) and some others, where a machine is too slow for whole prompts. ``collect`` writes
no text: of each question a digit a ratio, 1 where at some token of the full prefill's answer the
likeliest token differs.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheblend_rag.evaluate.results import Answer, read_results

LEAST_WORDS = 150


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("shorten")
    one.add_argument("files", nargs="+", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--gold", type=Path, help="{file: {id: [numbers of passages]}}")
    one.add_argument("--passages", type=int, default=5)
    one.add_argument("--words", type=int, default=480, help="of a question's passages, at most")
    one.set_defaults(run=shorten)
    two = commands.add_parser("collect")
    two.add_argument("results", nargs="+", type=Path)
    two.add_argument("--multi-hop", nargs="+", default=[], metavar="SET")
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(run=collect)
    args = parser.parse_args()
    args.run(args)


def shorten(args: argparse.Namespace) -> None:
    """Questions with fewer passages, in the plain format."""
    gold = json.loads(_text(args.gold)) if args.gold else {}
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.files:
        name, kept = path.name.split(".")[0], list[str]()
        known = next((ids for file, ids in gold.items() if file.split(".")[0] == name), {})
        for line in _text(path).splitlines():
            question = _shortened(json.loads(line), known, args.passages)
            words = sum(len(p["text"].split()) for p in question["passages"])
            if LEAST_WORDS < words <= args.words:
                kept.append(json.dumps(question))
        (args.out / f"{name}.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
        print(f"{name}: {len(kept)} questions")


def _shortened(
    question: Mapping[str, Any], gold: Mapping[str, Sequence[int]], most: int
) -> dict[str, Any]:
    passages = question["passages"]
    found = (
        gold.get(question["id"])
        or [
            n
            for n, passage in enumerate(passages)
            if any(answer.lower() in passage["text"].lower() for answer in question["answers"])
        ][:1]
    )
    others = [n for n in range(len(passages)) if n not in found]
    random.Random(question["id"]).shuffle(others)
    chosen = sorted([*found, *others[: max(0, most - len(found))]])
    return {**question, "passages": [passages[n] for n in chosen]}


def _text(path: Path) -> str:
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()


def collect(args: argparse.Namespace) -> None:
    """Of each question that all ratios answered, what changed."""
    files = [f for p in args.results for f in (sorted(p.glob("*.jsonl")) if p.is_dir() else [p])]
    results = read_results(files)
    rows = {row: _ratio(row) for answers in results.answers.values() for row in answers}
    ratios = {row: ratio for row, ratio in rows.items() if ratio is not None}
    ordered = sorted(ratios, key=lambda row: ratios[row])
    found: dict[str, list[str]] = {"single_passage": [], "multi_hop": []}
    for (name, _), answers in sorted(results.answers.items()):
        if all(row in answers and answers[row].blended for row in ordered):
            kind = "multi_hop" if name in args.multi_hop else "single_passage"
            found[kind].append("".join("01"[_changed(answers[row])] for row in ordered))
    about = {n: results.settings.get(n) for n in ("model", "dtype", "device", "vllm", "max_tokens")}
    data = {**about, "ratios": [ratios[row] for row in ordered], **found}
    args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for kind, lines in found.items():
        shares = [sum(line[n] == "1" for line in lines) for n in range(len(ordered))]
        print(kind, len(lines), [f"{s / max(1, len(lines)):.3f}" for s in shares])


def _ratio(row: str) -> float | None:
    _, at, share = row.partition("@")
    return float(share.partition("~")[0]) if at else None


def _changed(answer: Answer) -> bool:
    return answer.same < len(answer.kl)


if __name__ == "__main__":
    main()
