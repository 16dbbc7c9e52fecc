"""Writes docs/reference.md from the code: options, selectors, stores, commands, reports, errors.

    python scripts/reference.py            # write it
    python scripts/reference.py --check    # exit code 1 where it is stale

``tests/unit/test_docs.py`` fails where the page is stale.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import cacheblend_rag
from cacheblend_rag import (
    BlendConfig,
    BlendReport,
    IngestReport,
    ModelCheck,
    SegmentReport,
    ShadowReport,
)
from cacheblend_rag import errors as errors_module
from cacheblend_rag import reason as reason_module
from cacheblend_rag.cli.main import _parser
from cacheblend_rag.options import PER_CALL
from cacheblend_rag.reason import Reason
from cacheblend_rag.select import SELECTORS
from cacheblend_rag.store import open_store, url

FILE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
HEAD = """# Reference

Options, commands, reports and errors. `python scripts/reference.py` writes this page from the code:
to change it, change the docstrings. [Concepts](concepts.md) explains the words.
"""


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        *config(),
        *selectors(),
        *stores(),
        *reports(),
        *reasons(),
        *errors(),
        *commands(),
    ]
    return "\n".join(parts)


def config() -> Iterator[str]:
    yield "## BlendConfig\n"
    yield "All fields can be set at start. Those with a mark can be set for one call too.\n"
    described = attributes(BlendConfig)
    rows = [
        (f"`{f.name}`", default(f), "yes" if f.name in PER_CALL else "", described[f.name])
        for f in fields(BlendConfig)
    ]
    yield table(("option", "default", "per call", "what it is"), rows)


def selectors() -> Iterator[str]:
    yield "## Selectors\n"
    yield "`selector_options` sets the parameters of one, by name.\n"
    for name, kind in SELECTORS.items():
        yield f"### `{name}`\n"
        yield plain(inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0] + "\n"
        described = attributes(kind)
        if rows := [(f"`{f.name}`", default(f), described.get(f.name, "")) for f in fields(kind)]:
            yield table(("parameter", "default", "what it is"), rows)


def stores() -> Iterator[str]:
    yield "## Store URLs\n"
    text = inspect.getdoc(open_store) or ""
    rows = [r.split(maxsplit=1) for r in joined(text.split("=\n", 1)[1].split("\n=", 1)[0])]
    yield table(("URL", "where, and options of its own"), [(code(a), plain(b)) for a, b in rows])
    known = [(f"`{scheme}`", ", ".join(f"`{o}`" for o in sorted(names)) or "none")
             for scheme, names in url._OPTIONS.items()]  # fmt: skip
    yield table(("scheme", "options"), known)
    yield "How to choose, and what each option does: [stores](store.md).\n"


def reports() -> Iterator[str]:
    yield "## Reports\n"
    for kind in (BlendReport, ShadowReport, IngestReport, ModelCheck):
        yield f"### {kind.__name__}\n"
        yield plain(inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0] + "\n"
        described = attributes(kind)
        names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
        rows = [(f"`{name}`", described.get(name, "")) for name in names]
        yield table(("field", "what it is"), rows)
    yield "### SegmentReport\n"
    yield plain(inspect.getdoc(SegmentReport) or "") + "\n"
    described = comments(SegmentReport)
    yield table(("field", "what it is"), [(f"`{n}`", described[n]) for n in SegmentReport._fields])


def reasons() -> Iterator[str]:
    yield "## Reasons\n"
    yield "Why a request or a model is not blended: `report.reason`. `report.detail` says more.\n"
    described = after_each(reason_module, "Reason")
    yield table(("value", "meaning"), [(f"`{r.value}`", plain(described[r.name])) for r in Reason])


def errors() -> Iterator[str]:
    yield "## Errors\n"
    tree, _, rest = (errors_module.__doc__ or "").partition("\n\n")[2].partition("\n\n")
    yield f"```text\n{tree}\n```\n"
    yield plain(rest).strip() + "\n"


def commands() -> Iterator[str]:
    yield "## Commands\n"
    yield (
        "Exit codes: 0 done, 1 one of our errors, 2 wrong arguments, 3 refused or damaged, 130 "
        "interrupted.\n"
    )
    parser = _parser()
    [choices] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for name, command in choices.choices.items():
        yield f"### `cacheblend {name}`\n"
        yield f"{sentence(command.description or '')}\n"
        rows = [argument(a) for a in command._actions if not isinstance(a, argparse._HelpAction)]
        yield table(("argument", "default", "what it is"), rows)


def argument(action: argparse.Action) -> tuple[str, str, str]:
    """A row for one argument of a command."""
    shown = "/".join(map(str, action.choices)) if action.choices else action.metavar
    value = "" if action.nargs == 0 else f" {shown or action.dest.upper()}"
    names = f"{action.option_strings[-1]}{value}" if action.option_strings else value.strip()
    usual = action.default
    if usual in (None, False, [], "", argparse.SUPPRESS) or isinstance(usual, Path | tuple):
        usual = None
    if isinstance(usual, list):
        usual = " ".join(map(str, usual))
    text = re.sub(r"\((/[^)]*)\)", "(a folder of the user's cache)", action.help or "")
    return code(names.replace("|", "/")), "" if usual is None else code(str(usual)), text


# --- from docstrings to Markdown ------------------------------------------------------------------


def attributes(kind: type) -> dict[str, str]:
    """What the ``Attributes`` section of a class's docstring says of each."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    found = dict[str, str]()
    for entry in joined(section):
        names, _, text = entry.partition(": ")
        for name in names.split(", "):
            found[name] = plain(text)
    return found


def joined(section: str) -> Iterator[str]:
    """Entries of an indented list, each on one line."""
    lines = [line for line in section.splitlines() if line.strip()]
    if not lines:
        return
    least = min(len(line) - len(line.lstrip()) for line in lines)
    entry = list[str]()
    for line in lines:
        if len(line) - len(line.lstrip()) == least and entry:
            yield " ".join(entry)
            entry = []
        entry.append(line.strip())
    yield " ".join(entry)


def plain(text: str) -> str:
    """reStructuredText's code as Markdown's, and pages where they are."""
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    return re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", text)


def code(text: str) -> str:
    """As code, once."""
    return text if text.startswith("`") and not text.startswith("``") else f"`{text.strip('`')}`"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def default(field: Field[Any]) -> str:
    """A field's default, as code."""
    value = field.default
    if value is MISSING:
        value = field.default_factory() if field.default_factory is not MISSING else None
    if isinstance(value, tuple) and any(isinstance(v, float) for v in value):
        return code("(" + ", ".join(f"{v:g}" for v in value) + ")")
    return code(repr(value))


def after_each(module: ModuleType, name: str) -> dict[str, str]:
    """The strings that stand below the members of a class, by member."""
    tree = ast.parse(inspect.getsource(module))
    [body] = [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    described = dict[str, str]()
    for member, text in itertools.pairwise(body):
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr):
            [target] = member.targets
            assert isinstance(target, ast.Name) and isinstance(text.value, ast.Constant)
            described[target.id] = str(text.value.value)
    return described


def comments(kind: type) -> dict[str, str]:
    """What stands behind each field of a class, as a comment."""
    found = re.findall(r"^    (\w+): [^#\n]*(?:# (.*))?$", inspect.getsource(kind), re.MULTILINE)
    return {name: text.replace(" | ", ", ") for name, text in found}


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown of a table."""
    titles = list(titles)
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    lines = [titles, ["---"] * len(titles), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is stale")
    if parser.parse_args().check:
        stale = FILE.read_text(encoding="utf-8") != page()
        print("docs/reference.md is stale: python scripts/reference.py" if stale else "up to date")
        return int(stale)
    FILE.write_text(page(), encoding="utf-8")
    print(f"docs/reference.md, cacheblend-rag {cacheblend_rag.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
