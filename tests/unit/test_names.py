"""Names are the field's: no private word comes back, and one thing has one name.

A private word is looked for in every name that code gives to something, in what else users meet
(options, commands, fields of reports, metrics, dashboards, templates, pages, names of files), and
in what documents write as code.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheblend_rag import BlendConfig, ConfigError
from cacheblend_rag.options import unknown_option

ROOT = Path(__file__).parents[2]
# each stands for something that has another name now
PRIVATE = {
    "reach", "pays", "late", "gate", "flips", "flip", "noise", "company", "label", "labelled",
    "unlabel", "retain", "beside", "lane", "lanes", "hot", "mover", "movers", "moving", "spoken",
    "sooner", "told", "untold", "heard", "unheard", "said", "speaking", "pulse", "turns", "born",
    "labels", "gates",
}  # fmt: skip
# of words that are ordinary ones alone
COMPOUND = ("place_through", "is_near", "too_far", "on_record", "when_pays")
# of others: matplotlib, Grafana, ARIA, files of models, a paper; and the rename itself, see the end
FOREIGN = re.compile(r"(aria-)?label(_values|Of)?|late_chunking|(mlp\.|ffn_)gate\w*|reach")
MAY_BE_FOREIGN = {"plots.py", "page.js", "grafana.json", "models.py", "options.py"}
NAME = re.compile(r"[A-Za-z_][\w.:-]*")
CODE = re.compile(r"```\w*\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)


def files() -> Iterator[Path]:
    """Text that somebody else may read, but for tests, data, and results of earlier versions."""
    shown = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    past = ("tests/", "benchmarks/results/", "examples/data/", "CHANGELOG.md", "docs/models.md")
    for name in shown.stdout.split("\0"):
        path = ROOT / name
        if name and not name.startswith(past) and path.is_file() and path.suffix != ".png":
            yield path


def words(name: str) -> list[str]:
    """``KernelLane``, ``GPULane2`` and ``kernel-lane`` all have the word lane."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|\d+", "_", name)
    return [word for word in re.split(r"[\W_]+", spaced.lower()) if word]


def is_private(name: str) -> bool:
    found = words(name)
    return bool(PRIVATE.intersection(found)) or any(c in "_".join(found) for c in COMPOUND)


def names_of(tree: ast.AST) -> Iterator[str]:
    """Names of all that code defines, and those in its strings: fields, options, metrics."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from names_in(node.value)


def names_in(text: str) -> list[str]:
    """A text that is a name as a whole, and what is in it that no sentence would have."""
    found = NAME.findall(text)
    compound = [name for name in found if re.search(r"[a-z\d][_:]\w|[a-z][A-Z]", name)]
    flags = re.findall(r"(?<![\w-])--([a-z-]+)", text)
    quoted = re.findall(r"""[`'"]([\w.:-]+)[`'"=]""", text)
    return [*compound, *flags, *quoted, *([text] if found == [text] else [])]


def names_of_file(path: Path) -> Iterator[str]:
    yield path.stem
    text = path.read_text()
    if path.suffix == ".py":
        yield from names_of(ast.parse(text))
    elif path.suffix == ".md":
        for block, span in CODE.findall(text):
            strings = re.sub(r'"([^"\n]*)"', lambda m: "" if " " in m[1] else m[0], block)
            yield from NAME.findall(re.sub(r"#.*", "", strings) + span)
        yield from re.findall(r"\bthe (gate)\b", text, re.IGNORECASE)
    else:
        yield from names_in(text)
        yield from re.findall(r"^\s*(?:- )?([\w.-]+)\s*[:=]", text, re.MULTILINE)


@pytest.mark.parametrize("path", list(files()), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_word_is_in_a_name(path: Path) -> None:
    found = {name for name in names_of_file(path) if is_private(name)}
    if path.name in MAY_BE_FOREIGN:
        found = {name for name in found if not FOREIGN.fullmatch(name)}
    assert not found


SEEN = {
    "names.py": """
class GPULane2: ...
class Score: reach_tokens: int
def f(x, late=0): ...
import numpy as hot
try: ...
except OSError as told: ...
match f:
    case {"a": pulse, **gates}: ...
for beside in f: x.noise = f(pays=1)
print(f"{x} --flips-allowed", "cacheblend:late_chunks_total", {"label": 1}, "the `lane` of it")
""",
    "names.md": "`reach`, `when='pays'`, `is_near`.\n\n```bash\nx --flips 3\n```\nThe gate is hot.",
    "names.json": '{"expr": "rate(cacheblend:late_total[5m])", "unlabelKeys": 1}',
    "names.yaml": "company: 3\nargs: [--reach-tokens, x]",
    "late.toml": "",
}
FOUND = {
    "names.py": {
        "GPULane2", "reach_tokens", "late", "hot", "told", "pulse", "gates", "beside", "noise",
        "pays", "flips-allowed", "cacheblend:late_chunks_total", "label", "lane",
    },
    "names.md": {"reach", "pays", "is_near", "flips", "gate"},
    "names.json": {"cacheblend:late_total", "unlabelKeys"},
    "names.yaml": {"company", "reach-tokens"},
    "late.toml": {"late"},
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_private_word_would_be_found(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(SEEN[name])
    assert {n for n in names_of_file(tmp_path / name) if is_private(n)} == FOUND[name]


def test_names_are_looked_for_in_all_that_others_read() -> None:
    suffixes = {path.suffix for path in files()}
    assert {".py", ".md", ".json", ".yaml", ".yml", ".toml", ".html", ".js", ""} <= suffixes


def documented(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names under ``Args`` and ``Attributes`` of a docstring."""
    text = ast.get_docstring(node) or ""
    section = re.search(r"^(?:Args|Attributes):\n((?: {4}.*\n?|\n)+)", text, re.MULTILINE)
    lines = re.findall(
        r"^ {4}(\*{0,2}\w+(?:, \w+)*): ", section[1] if section else "", re.MULTILINE
    )
    return {name.strip("*") for line in lines for name in line.split(", ")}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}


def members(node: ast.ClassDef) -> set[str]:
    """Fields, attributes, methods, and what makes an object."""
    found = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign | ast.AugAssign)
             and isinstance(n.target, ast.Name)}  # fmt: skip
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= {inner.name, *parameters(inner)}
        elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            found.add(inner.attr)
    return found


SOURCES = [path for name in ("cacheblend_rag", "integrations", "kernels")
           for path in (ROOT / name).rglob("*.py")]  # fmt: skip


def test_docstrings_name_what_is_there() -> None:
    wrong, seen = list[str](), 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                here = members(node) if isinstance(node, ast.ClassDef) else parameters(node)
                names = documented(node)
                seen += len(names)
                wrong += [f"{path.name}: {node.name}: {name}" for name in names - here - INHERITED]
    assert wrong == []
    assert seen > 500


INHERITED = {"blend_config", "engine_args", "fields"}  # of ``EngineSettings``, made by pydantic


@pytest.mark.parametrize(("old", "new"), [("reach", "propagation_length"), ("when", "blend_if")])
def test_a_name_that_was_changed_is_refused_with_the_one_it_has(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"{old!r}: it is called {new!r}"):
        BlendConfig.of({old: 0}, "the configuration")
    assert "it is called" not in str(unknown_option(old, ["mode"], "a request"))
