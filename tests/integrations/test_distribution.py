"""The distribution under LlamaIndex's own name: built, installed, imported beside LlamaIndex."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import cacheblend_rag
import llama_index_cacheblend

FOLDER = Path(__file__).parents[2] / "integrations" / "llama-index-llms-cacheblend"


def run(*command: str | Path, cwd: Path = FOLDER, path: Path | None = None) -> str:
    env = {"PYTHONPATH": str(path)} if path else None
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_built_installed_and_imported(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "llama_index/llms/cacheblend/__init__.py" in names
    assert "llama_index/llms/cacheblend/py.typed" in names
    assert not {"llama_index/__init__.py", "llama_index/llms/__init__.py"} & set(names)

    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel)
    code = """
import llama_index.core, llama_index.llms.cacheblend as ours, llama_index_cacheblend as theirs
assert ours.__all__ == theirs.__all__
assert all(getattr(ours, name) is getattr(theirs, name) for name in ours.__all__)
print(ours.__file__)
"""
    shown = run(sys.executable, "-c", code, cwd=tmp_path, path=target)
    assert Path(shown.strip()).is_relative_to(target)


def test_it_follows_the_main_distribution() -> None:
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    assert project["version"] == cacheblend_rag.__version__
    init = (FOLDER / "llama_index" / "llms" / "cacheblend" / "__init__.py").read_text()
    assert all(name in init for name in llama_index_cacheblend.__all__)
