"""Benchmarks run rarely, most of them on a GPU: what they read of their arguments has to exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(FOLDER.glob("*.py"))}
_SHARED = ("shapes", "plots")  # they add options to others' parsers
_OF_MAPPINGS = {"items"}  # where ``options`` are a mapping


def options(tree: ast.Module) -> set[str]:
    """The names of the arguments that a file adds to parsers."""
    found = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr == "set_defaults":
            found |= {str(keyword.arg) for keyword in node.keywords}
        if node.func.attr == "add_argument":
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            named = [k.value.value for k in node.keywords if k.arg == "dest"]  # type: ignore[attr-defined]
            long = [word for word in words if str(word).startswith("--")]
            found.add(str((named or long or words)[0]).lstrip("-").replace("-", "_"))
    return found


def read(tree: ast.Module) -> set[str]:
    """What a file reads of ``args``."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "args"
    }


@pytest.mark.parametrize("name", TREES)
def test_arguments_that_are_read_are_there(name: str) -> None:
    others = {
        each
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.ImportFrom | ast.Import)
        for each in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    known = options(TREES[name]).union(
        *(options(TREES[other]) for other in {*others, *_SHARED} if other in TREES)
    )
    assert not read(TREES[name]) - known - _OF_MAPPINGS
