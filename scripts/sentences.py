"""How long the sentences of README and docs are: information for who writes them, not a gate.

    python scripts/sentences.py                  # README, CONTRIBUTING and docs
    python scripts/sentences.py --longest 10     # and the longest sentences of all

Headings, tables, code blocks and pictures do not count; a list item is a paragraph of its own, and
code within a sentence is one word. The aim: a median of 16 words at most, and 90 % below 32.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MEDIAN, LONG = 16, 32

_FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
_NO_PROSE = re.compile(r"^(#|\||\s{4,}\S|!\[|!!!|\?\?\?|<|---)")
_ITEM = re.compile(r"^\s*([-*]|\d+\.)\s+")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_END = re.compile(r"(?<=[.!?])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9`])")
_WORD = re.compile(r"\S*\w\S*")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|No|etc)\.$")


class Figures(NamedTuple):
    """Lengths of sentences, in words."""

    sentences: int
    median: float
    p90: int
    longest: int
    long: float  # share of LONG words or more


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's paragraphs and list items."""
    return [s for paragraph in _paragraphs(markdown) for s in _split(paragraph)]


def words(sentence: str) -> int:
    """How many words a sentence has."""
    return len(_WORD.findall(sentence))


def figures(lengths: Sequence[int]) -> Figures:
    """What the lengths of a page's sentences come to."""
    ordered = sorted(lengths)
    return Figures(
        sentences=len(ordered),
        median=statistics.median(ordered),
        p90=ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
        longest=ordered[-1],
        long=sum(length >= LONG for length in ordered) / len(ordered),
    )


def _paragraphs(markdown: str) -> Iterator[str]:
    lines: list[str] = []
    in_item = False
    for line in _FENCE.sub("", markdown).splitlines():
        item = _ITEM.match(line)
        no_prose = _NO_PROSE.match(line) and not (in_item and line.startswith("    "))
        if item or no_prose or not line.strip():
            yield " ".join(lines)
            lines, in_item = [], bool(item) or (in_item and not line.strip())
        if not no_prose:
            lines.append(line[item.end() :] if item else line.strip())
    yield " ".join(lines)


def _split(paragraph: str) -> Iterator[str]:
    text = _LINK.sub(r"\1", re.sub(r"``?[^`]+``?", "`code`", paragraph))
    rest = ""
    for part in _END.split(text):
        whole = f"{rest} {part}".strip()
        rest = whole if _ABBREVIATION.search(part) else ""
        if not rest and words(whole) > 1:
            yield whole
    if words(rest) > 1:
        yield rest


def pages() -> list[Path]:
    """What people read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument("--longest", type=int, default=0, metavar="N", help="also print these")
    args = parser.parse_args()
    found = {page: sentences(page.read_text(encoding="utf-8")) for page in args.pages or pages()}
    everything = [sentence for of_page in found.values() for sentence in of_page]
    print(
        f"{'words a sentence':32} {'sentences':>9} {'median':>7} {'p90':>5} {'max':>5} {'long':>6}"
    )
    rows = [(_name(page), of_page) for page, of_page in found.items() if of_page]
    for name, of_page in [*rows, ("all", everything)]:
        f = figures([words(s) for s in of_page])
        print(f"{name:32}{f.sentences:10}{f.median:10.1f}{f.p90:10}{f.longest:10}{f.long:10.0%}")
    print(f"aim: median {MEDIAN} at most, 90 % below {LONG} (long: {LONG} words or more)")
    for sentence in sorted(everything, key=words, reverse=True)[: args.longest]:
        print(f"\n{words(sentence)}: {sentence}")


def _name(page: Path) -> str:
    page = page.resolve()
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)


if __name__ == "__main__":
    main()
