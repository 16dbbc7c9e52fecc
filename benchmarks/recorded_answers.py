"""Which answers change at which ratio, question by question: what the controller is simulated on.

    python benchmarks/recorded_answers.py shorten --out DIR --passages 5 --words 480 FILE [FILE ...]
    cacheblend eval MODEL --data DIR --only-rows query@0.05~64 query@0.1~64 ... --out RESULTS
    python benchmarks/recorded_answers.py collect --multi-hop NAME ... --out FILE RESULTS [...]
    python benchmarks/recorded_answers.py simulate FILE

``shorten`` keeps the passages that a question needs (those that contain an answer, or those that
``--gold`` names) and some others, where a machine is too slow for whole prompts. ``collect`` writes
no text: of each question a digit a ratio, 1 where at some token of the full prefill's answer the
likeliest token differs. ``simulate`` has the controller serve requests drawn from them, whose mix
shifts from single-passage to multi-hop questions, and holds it against fixed ratios.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cacheblend_rag.calibration import ratio_of, resolved
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.evaluate.results import Answer, read_results
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.shadow import LADDER, Shadowed
from cacheblend_rag.shadow.steering import Steering

LEAST_WORDS = 150


def main(arguments: Sequence[str] | None = None) -> None:
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
    two.add_argument("--selector", default="query", help="rows of others are left out")
    two.add_argument("--multi-hop", nargs="+", default=[], metavar="SET")
    two.add_argument("--out", type=Path, required=True)
    two.set_defaults(run=collect)
    three = commands.add_parser("simulate")
    three.add_argument("file", type=Path)
    three.add_argument("--requests", type=int, default=2000)
    three.add_argument("--runs", type=int, default=100)
    three.add_argument("--changed-allowed", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    three.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2, 0.5])
    three.set_defaults(run=simulate)
    args = parser.parse_args(arguments)
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
    own = re.compile(re.escape(args.selector) + "[:@]")
    ratios = {row: ratio for row, ratio in rows.items() if ratio is not None and own.match(row)}
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


# ---- the simulation ------------------------------------------------------------------------------


class Recorded:
    """What changed, by question and ratio."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._ratios: list[float] = data["ratios"]
        self.kinds: tuple[list[str], list[str]] = data["single_passage"], data["multi_hop"]

    def changed(self, question: str, ratio: float) -> bool:
        """Of a question's digits; at a ratio that was not recorded, at the next one below it, and
        at 1, which is exact, never.
        """
        known = [n for n, r in enumerate(self._ratios) if r <= ratio + 1e-9]
        return ratio < 1 and (not known or question[known[-1]] == "1")


class Run(NamedTuple):
    """Shares of a run's requests.

    Attributes:
        changed: whose answer was another; ratio: the mean, 1 where nothing was blended.
        shadowed: that were computed again; off: that were not blended.
    """

    changed: float
    ratio: float
    shadowed: float
    off: float


def traffic(recorded: Recorded, requests: int, seed: int) -> list[str]:
    """Questions of which the first 40 % are single-passage and the last 40 % multi-hop."""
    draw = random.Random(seed)
    hard = [min(1.0, max(0.0, (n / requests - 0.4) / 0.2)) for n in range(requests)]
    return [draw.choice(recorded.kinds[draw.random() < share]) for share in hard]


def fixed(recorded: Recorded, questions: Sequence[str], ratio: float) -> float:
    """The share that is changed at one ratio."""
    return sum(recorded.changed(question, ratio) for question in questions) / len(questions)


def controlled(
    recorded: Recorded,
    questions: Sequence[str],
    config: BlendConfig,
    seed: int,
    waiting: int = 3,
) -> Run:
    """What the controller makes of them. What a shadow finds is known ``waiting`` shadows later."""
    steering, keys = Steering(), KeySpace("", ())
    config = replace(config, shadow_options={**config.shadow_options, "seed": seed})
    begin = resolved(config, None)
    steering.open("s", config)
    changed, ratios, shadows, off = 0, 0.0, 0, 0
    found = deque[Shadowed]()
    for question in questions:
        steered = steering.steer(config, begin, "s", keys, ())
        if steered.why_not is not None:
            ratios, off = ratios + 1, off + 1
            continue
        ratio = ratio_of(steered.config)
        is_changed = recorded.changed(question, ratio)
        changed, ratios = changed + is_changed, ratios + ratio
        drawn = steering.drawn("s", steered)
        if drawn is not None:
            shadows += 1
            found.append(Shadowed(drawn.key, ratio, is_changed))
        while len(found) > waiting:
            steering.learn(found.popleft())
    return Run(*(n / len(questions) for n in (changed, ratios, shadows, off)))


def best_fixed(recorded: Recorded, runs: Sequence[Sequence[str]], most: float) -> float:
    """The lowest ratio of the ladder, or 1, that keeps the mean share of changed answers."""
    return next(
        (r for r in LADDER if statistics.mean(fixed(recorded, q, r) for q in runs) <= most), 1.0
    )


def simulate(args: argparse.Namespace) -> None:
    """A table for each target."""
    recorded = Recorded(json.loads(args.file.read_text(encoding="utf-8")))
    runs = [traffic(recorded, args.requests, seed) for seed in range(args.runs)]
    print("changed at fixed ratios, all / single-passage / multi-hop:")
    for ratio in LADDER:
        kinds = [fixed(recorded, kind, ratio) for kind in recorded.kinds]
        all_ = statistics.mean(fixed(recorded, questions, ratio) for questions in runs)
        print(f"  {ratio:g}: {all_:.3f} / {kinds[0]:.3f} / {kinds[1]:.3f}")
    for allowed in args.changed_allowed:
        best = best_fixed(recorded, runs, allowed)
        print(f"target {allowed:g}: the lowest fixed ratio that keeps it is {best:g}")
        for share in args.shares:
            config = BlendConfig(recompute_ratio="auto", shadow=share, changed_allowed=allowed)
            got = [controlled(recorded, q, config, seed) for seed, q in enumerate(runs)]
            mean = Run(*map(statistics.mean, zip(*got, strict=True)))
            within = statistics.mean(run.changed <= allowed + 0.02 for run in got)
            print(
                f"  shadow {share:g}: changed {mean.changed:.3f}, mean ratio {mean.ratio:.3f}, "
                f"shadowed {mean.shadowed:.3f}, off {mean.off:.2f}, runs within {within:.2f}"
            )


if __name__ == "__main__":
    main()
