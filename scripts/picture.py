"""Draws docs/prompt.svg: which tokens of a prompt are reused, recomputed and fresh.

    python scripts/picture.py

The picture has a background of its own, so it reads the same on a dark page and on a light one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).resolve().parents[1] / "docs" / "prompt.svg"

CELL, HEIGHT, LEFT, WIDTH = 12, 22, 24, 800
PAPER, INK, FAINT = "#f6f8fa", "#1f2328", "#59636e"
COLOURS = {"reused": "#9ec5fe", "recomputed": "#d9480f", "fresh": "#1864ab", "cached": "#ced4da"}
PARTS = (  # name, tokens, those that are recomputed: first ones, and those the question attends to
    ("system prompt", 7, ()),
    ("chunk C", 16, (0, 10, 11)),
    ("chunk A", 16, (0, 1)),
    ("chunk B", 16, (0, 5)),
    ("question", 7, None),
)
LEGEND = (
    ("reused", "reused: stored KV, keys rotated to the new position"),
    ("recomputed", "recomputed: 15 % of these, in the whole prompt"),
    ("fresh", "fresh: no stored KV, computed as always"),
    ("cached", "vLLM's own prefix cache"),
)


def text(x: float, y: float, words: str, size: int, colour: str, **more: str) -> str:
    extra = "".join(f' {name}="{value}"' for name, value in more.items())
    return (
        f'<text x="{x:g}" y="{y}" font-size="{size}" fill="{colour}"{extra}>{escape(words)}</text>'
    )


def row(y: int, kinds: list[str]) -> Iterator[str]:
    for place, kind in enumerate(kinds):
        yield (
            f'<rect x="{LEFT + place * CELL}" y="{y}" width="{CELL - 1}" height="{HEIGHT}" '
            f'fill="{COLOURS[kind]}"/>'
        )


def plain() -> list[str]:
    return [kind for name, size, _ in PARTS for kind in size * [
        "cached" if name == "system prompt" else "fresh"
    ]]  # fmt: skip


def blended() -> list[str]:
    kinds = list[str]()
    for _, size, recomputed in PARTS:
        for place in range(size):
            kinds.append(
                "fresh" if recomputed is None else "recomputed" if place in recomputed else "reused"
            )
    return kinds


def names(y: int) -> Iterator[str]:
    start = 0
    for name, size, _ in PARTS:
        middle = LEFT + (start + size / 2) * CELL
        yield text(middle, y, name, 12, FAINT, **{"text-anchor": "middle"})
        start += size


def legend(y: int) -> Iterator[str]:
    for number, (kind, words) in enumerate(LEGEND):
        x, line = LEFT + number % 2 * 380, y + number // 2 * 22
        yield f'<rect x="{x}" y="{line - 11}" width="{CELL}" height="12" fill="{COLOURS[kind]}"/>'
        yield text(x + 20, line, words, 13, INK)


def picture() -> str:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 232" '
        'font-family="system-ui, sans-serif" role="img">',
        "<title>A prompt's tokens: reused, recomputed and fresh</title>",
        f'<rect width="{WIDTH}" height="232" rx="8" fill="{PAPER}"/>',
        text(LEFT, 30, "vLLM: every token behind the first change is computed", 14, INK),
        *row(42, plain()),
        *names(82),
        text(
            LEFT, 116, "vLLM with cacheblend-rag: most tokens of known chunks are loaded", 14, INK
        ),
        *row(128, blended()),
        *legend(184),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
    print(FILE.relative_to(FILE.parents[1]))
