"""docs/models.md is what ``scripts/models.py`` writes for the families that the tests blend."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text()
_ROW = re.compile(r"^\| (\w+) \| (\S+) \| (\de[+-]\d\d) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "scripts" / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # named tuples look for it there
    spec.loader.exec_module(module)
    return module


def test_every_family_is_on_the_page_and_no_other(script: ModuleType) -> None:
    rows = [(architecture, family) for architecture, family, _ in _ROW.findall(PAGE)]
    assert rows == script.families(), "run the two commands at the top of scripts/models.py"
    assert len(set(rows)) == len(rows), "a model is on the page twice"


def test_errors_are_small() -> None:
    errors = [float(error) for *_, error in _ROW.findall(PAGE)]
    assert errors and max(errors) <= 1e-3


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    """Given the errors that it says itself."""
    tested = [script.Tested(*row) for row in _ROW.findall(PAGE)]
    assert "\n".join(script.page(tested)) + "\n" == PAGE


def test_every_recipe_is_there_once(script: ModuleType) -> None:
    names = [recipe.name for recipe in script.recipes()]
    assert len(names) == len(set(names)) == 132
