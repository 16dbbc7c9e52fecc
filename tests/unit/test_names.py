"""Names are the field's: no private word comes back, and one thing has one name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cacheblend_rag import BlendConfig, ConfigError
from cacheblend_rag.options import unknown_option

ROOT = Path(__file__).parents[2]
CODE = ("cacheblend_rag", "integrations", "kernels")
# each stands for something that has another name now
PRIVATE = {
    "reach", "pays", "late", "gate", "flips", "flip", "noise", "company", "label", "labelled",
    "unlabel", "retain", "beside", "lane", "lanes", "hot", "movers", "spoken", "sooner", "told",
    "untold", "heard", "unheard", "said", "speaking", "pulse", "turns", "born",
}  # fmt: skip
# in the running text of documents, where a word may be an ordinary one
IN_TEXT = re.compile(
    rf"`(?:{'|'.join(sorted(PRIVATE))})[`=(]|--(?:reach|flips)\b|\bthe gate\b|GateReport|"
    "when=.(?:pays|always)|company:",
    re.IGNORECASE,
)


def names_of(tree: ast.Module) -> Iterator[str]:
    """Names of classes, functions, their arguments, fields, constants and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def words(name: str) -> set[str]:
    """``KernelLane`` and ``kernel_lane`` are the words kernel and lane."""
    return set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


SOURCES = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_word_is_in_a_name(path: Path) -> None:
    # matplotlib's own argument, and the sigmoid gates of model files
    foreign = {"label"} if path.name == "plots.py" else set()
    found = {
        name for name in names_of(ast.parse(path.read_text())) if words(name) & PRIVATE - foreign
    }
    assert not found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_word_is_in_a_document(path: Path) -> None:
    assert not IN_TEXT.findall(path.read_text())


def test_a_private_word_would_be_found() -> None:
    names = set(names_of(ast.parse("class KernelLane:\n    reach: int\n    def f(self, late): 0")))
    assert [bool(words(name) & PRIVATE) for name in sorted(names)] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert IN_TEXT.search("set `reach` to 0") and IN_TEXT.search("The gate refuses it")


@pytest.mark.parametrize(("old", "new"), [("reach", "propagation_length"), ("when", "blend_if")])
def test_a_name_that_was_changed_is_refused_with_the_one_it_has(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"{old!r}: it is called {new!r}"):
        BlendConfig.of({old: 0}, "the configuration")
    assert "it is called" not in str(unknown_option(old, ["mode"], "a request"))
