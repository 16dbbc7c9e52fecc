"""Every ``cacheblend`` command of README and docs, run in order from a folder that has what they
name, over an engine that computes nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from chunks import chunk_of, key_of
from fake_engine import MODEL, FakeEngine, install
from fake_retriever import FakeRetriever, make_pdf, split

from cacheblend_rag import cli
from cacheblend_rag.cli.main import _parser
from cacheblend_rag.store import DiskStore

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE = re.compile(r"^    (?:cacheblend) ([^#\n]*)", re.MULTILINE)
PASSAGE = "The last ferry leaves the pier at nine in the evening, and the ships are old. " * 4
# they run until they are stopped: see test_live.py and test_proxy.py in tests/server
SERVERS = {"serve", "route"}
# what stands for something of the reader's
NAMED = {
    "MODEL": str(MODEL), "DIR": "./store", "OTHER": "./other", "PATH": "docs/old.md",
    "FILE": "questions.jsonl", "DATA": "questions.jsonl", "FILE_OR_FOLDER": "questions.jsonl",
}  # fmt: skip


def commands(page: Path) -> list[list[str]]:
    """Of a page's indented lines, with what is meant in place of the words in capitals."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    found = [shlex.split(line) for line in LINE.findall(text)]
    found += [shlex.split(line) for line in re.findall(r"# and: cacheblend (.*)", text)]
    shown = [[NAMED.get(word, word) for word in line if word != "..."] for line in found]
    # see test_cli.py for those of Ray
    return [line for line in shown if line[0] not in SERVERS and "--ray" not in line]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: Path) -> Path:
    """A reader's: documents, questions, and the model's results."""
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    (tmp_path / "docs").mkdir()
    for name in ("new", "old"):
        (tmp_path / "docs" / f"{name}.md").write_text(f"This is {name}. {PASSAGE}\n")
    make_pdf(tmp_path / "notes.pdf", PASSAGE)
    records = [
        {"id": str(i), "question": f"Who {i}?", "answers": ["a short answer"],
         "passages": [f"{n} {PASSAGE}" for n in (i, i + 1)]}
        for i in range(8)
    ]  # fmt: skip
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "models").symlink_to(embedded.parent)
    monkeypatch.setenv("CACHEBLEND_HOME", str(tmp_path / "home"))
    with DiskStore(tmp_path / "store", namespace="of-an-engine") as store:  # ours keeps no KV
        store.put(key_of(0), chunk_of(0))
    return tmp_path


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch, embedded: Path) -> list[FakeEngine]:
    for family in (cli.documents, cli.store, cli.demo):
        monkeypatch.setattr(family, "Retriever", FakeRetriever)
    for family in (cli.documents, cli.demo):
        monkeypatch.setattr(family, "split", split)
    return install(monkeypatch)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_the_commands_of_a_page(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if page.name == "store.md":  # which looks after what was ingested
        assert cli.main(["ingest", "docs", "--store", "./store"]) == 0
    for line in commands(page):
        assert cli.main(line) == 0, f"{line}: {capsys.readouterr().err}"
        assert "".join(capsys.readouterr()).strip(), f"{line} says nothing"


def test_pages_show_each_command() -> None:
    [parsers] = [a.choices for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    shown = {line[0] for page in PAGES for line in commands(page)}
    assert shown | SERVERS >= parsers.keys()
