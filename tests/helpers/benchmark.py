"""The benchmarks and scripts, for tests of what they run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """The script ``name`` as a module; processes that it starts find it under that name."""
    return _load(name, FOLDER / f"{name}.py")


def script(name: str) -> ModuleType:
    """The same of one in scripts/, under a name that no helper has."""
    return _load(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
