"""CONTRIBUTING's recipes, followed: what their code blocks hold works where it is put."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cacheblend_rag import BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.evaluate import readers
from cacheblend_rag.select import SELECTORS, Evidence, create_selector
from cacheblend_rag.store import KVStore, url

ROOT = Path(__file__).parents[2]
CONTRACT = [
    "test_absent_key",
    "test_close_twice",
    "test_discard",
    "test_latents_come_back_bit_for_bit",
    "test_put_twice_keeps_one",
    "test_scan_tells_every_chunk_once",
    "test_stats_count_hits_and_misses",
]


def recipe(title: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(rf"^## {title}\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def module_of(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


Follow = Callable[[str, str], ModuleType]


@pytest.fixture
def follow(tmp_path: Path) -> Follow:
    """Write a recipe's code block to a file of this name in a new folder, and import it."""

    def write(title: str, name: str) -> ModuleType:
        [code] = re.findall(r"^```python\n(.*?)^```", recipe(title), re.DOTALL | re.MULTILINE)
        file = tmp_path / f"{name}.py"
        file.write_text(code)
        lint = [sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", file]
        checked = subprocess.run(lint, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
        return module_of(file)

    return write


def test_the_files_that_recipes_name_are_there() -> None:
    titles = ("a selector", "a store tier", "a reader of evaluation data", "a model family")
    named = {
        path
        for title in titles
        for path in re.findall(r"`([\w/]+\.py)`", recipe(f"Add {title}"))
    }  # fmt: skip
    assert len(named) > 6
    folders = (ROOT, ROOT / "cacheblend_rag", ROOT / "kernels")
    assert [p for p in named if not any((folder / p).is_file() for folder in folders)] == []


def test_a_selector(follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = follow("Add a selector", "last_k").LastKSelector
    monkeypatch.setitem(SELECTORS, kind.name, kind)
    BlendConfig(selector="last_k", selector_options={"skip": 2})
    with pytest.raises(ConfigError, match="skip must be 0 or more"):
        create_selector("last_k", {"skip": -1})
    selector = create_selector("last_k", {"skip": 2})
    evidence = Evidence(
        candidate_N=torch.tensor([True] * 4 + [False] + [True] * 3),
        offset_N=torch.tensor([0, 1, 2, 3, 0, 0, 1, 2]),
        ids_N=torch.arange(8),
        budget=2,
    )
    score_N = selector.score(evidence)
    assert score_N.tolist() == [0, 0, 2, 3, 0, 0, 0, 2]
    chosen = selector.choose(evidence, score_N).tolist()
    assert chosen[0] == 3 and chosen[1] in (2, 7)


def test_a_store(follow: Follow) -> None:
    kind = follow("Add a store tier", "dict").DictStore
    assert issubclass(kind, KVStore)
    assert "memory" in url._OPTIONS, "where the recipe names the URL's options"
    contract = module_of(Path(__file__).with_name("test_store.py"))
    for name in CONTRACT:
        getattr(contract, name)(kind())
    for dtype in contract.DTYPES:
        contract.test_get_returns_what_was_put_bit_for_bit(kind(), dtype)


def test_the_contract_is_whole() -> None:
    """A new test of the contract that a store alone can pass is one of the list above."""
    contract = module_of(Path(__file__).with_name("test_store.py"))
    alone = [
        name
        for name, test in inspect.getmembers(contract, inspect.isfunction)
        if name.startswith("test_") and list(inspect.signature(test).parameters) == ["store"]
    ]
    assert alone == CONTRACT


def test_a_reader(follow: Follow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = follow("Add a reader of evaluation data", "one_text").OneTextReader
    monkeypatch.setattr(readers, "READERS", (*readers.READERS, kind()))
    file = tmp_path / "harbour.jsonl"
    file.write_text(json.dumps({"ask": "When?", "text": "At noon.\n\nOr later.", "gold": "noon"}))
    [question] = readers.read_file(file)
    assert (question.set, question.question, question.answers) == ("harbour", "When?", ("noon",))
    assert question.passages == ("At noon.", "Or later.")
