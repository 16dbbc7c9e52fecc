"""What README, docs and examples show runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from cacheblend_rag import CacheBlend
from cacheblend_rag.models import embedded_model
from cacheblend_rag.shared import SharedEngine, _by_model, _canonical

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
OURS = [name for name in EXAMPLES if name != "quickstart.py"]
OWN_STORE = "ingestion_pipeline.py"
CHUNK = (
    "On the first Sunday of June the islanders race their rowing boats around the lighthouse. " * 5
)


@pytest.fixture
def running(real: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> SharedEngine:
    """Whoever names the embedded model from here on shares the engine that runs already."""
    monkeypatch.chdir(ROOT)
    shared = SharedEngine.from_running(real)
    monkeypatch.setattr(shared, "close", lambda: None)  # others still need it
    monkeypatch.setitem(_by_model, _canonical(embedded_model()), shared)
    return shared


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(name: str) -> None:
    file = ROOT / "examples" / name
    scope = {"__name__": "__main__", "__file__": str(file)}
    exec(compile(file.read_text(), file, "exec"), scope)


def section(name: str) -> str:
    found = re.search(rf"^## {name}\n(.*?)(?=^## )", (ROOT / "README.md").read_text(), re.S | re.M)
    assert found
    return found[1]


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["LlamaIndex", "LangChain"])
def test_readme(name: str, running: SharedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks(section(name))
    exec(compile(code, f"README.md, {name}", "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.split()) > 3


def test_readme_python(engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks(section("Python"))
    named = '"Qwen/Qwen2.5-1.5B-Instruct"'  # is on a hub
    assert named in code
    messages = [{"role": "user", "content": f"{CHUNK}\n\nWho rings the bell?"}]
    scope = {"MODEL": embedded_model(), "chunks": [CHUNK], "messages": messages}
    exec(compile(code.replace(named, "MODEL"), "README.md, Python", "exec"), scope)
    text, _, reused = capsys.readouterr().out.splitlines()[0].rsplit(maxsplit=2)
    assert text == "A short answer." and int(reused) > 0


def test_debug_page(engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    with CacheBlend(embedded_model()) as blend:
        blend.ingest([CHUNK])
        prompt = f"{CHUNK}\n\nWho rings the bell?"
        scope = {"blend": blend, "prompt": prompt, "prompt_text": prompt, "chunk": CHUNK}
        for number, code in enumerate(blocks((ROOT / "docs" / "debug.md").read_text())):
            exec(compile(code, f"debug.md, block {number}", "exec"), scope)
    assert not scope["plain"].report.blended and scope["exact"].report.tokens_reused == 0
    shown = capsys.readouterr().out
    assert "True None" in shown and "stored KV, keys re-rotated" in shown


def test_python_page(engines: list[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": f"{CHUNK}\n\nWho rings the bell?"}]
    scope = {"MODEL": embedded_model(), "chunks": [CHUNK], "messages": messages}
    for number, code in enumerate(blocks((ROOT / "docs" / "python.md").read_text())):
        exec(compile(code, f"python.md, block {number}", "exec"), scope)
    shown = capsys.readouterr().out
    assert "1 computed, 0 there before" in shown and "mode 0.3 hkvd" in shown
    assert "1 chunks forgotten" in shown
    assert engines[0].prefetched and engines[0].closed


@pytest.mark.vllm
@pytest.mark.slow
def test_tutorial(running: SharedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    scope = {"__name__": "tutorial"}
    for number, code in enumerate(blocks((ROOT / "docs" / "tutorial.md").read_text())):
        exec(compile(code, f"tutorial.md, block {number}", "exec"), scope)
    shown = capsys.readouterr().out
    assert "tokens reused" in shown
    assert "stored KV, keys re-rotated" in shown
    assert re.search(r"^[1-9]\d* chunks forgotten$", shown, re.MULTILINE)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OURS if name != OWN_STORE])
def test_example(
    name: str,
    running: SharedEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--plot", str(tmp_path / "plot.png")] if "compare" in name else []
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run(name)
    assert len(capsys.readouterr().out.split()) > 3
    if options:
        assert (tmp_path / "plot.png").stat().st_size > 1000


def test_example_with_a_store_of_its_own(
    engines: list[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [OWN_STORE])
    run(OWN_STORE)
    new, again, forgotten = capsys.readouterr().out.splitlines()
    assert int(new.split()[0]) > 10
    assert again.startswith("0 ")
    assert int(forgotten.split()[0]) > 0


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_examples_alone(name: str, tmp_path: Path) -> None:
    """As a user starts them: a process and an engine of their own."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 40
