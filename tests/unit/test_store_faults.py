"""A store whose index is damaged, or cannot be used, goes on as if it were not: small versions of
the runs of ``benchmarks/store_faults.py``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "store_faults.py"
    spec = importlib.util.spec_from_file_location("store_faults", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["store_faults"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:The index of the chunk store")
def test_damaged_indexes_are_opened_with_all_chunks(faults: ModuleType) -> None:
    counts = faults.closed(4 * len(faults.DAMAGES), seed=7, chunks=30)
    assert counts["wrong"] == {}


@pytest.mark.filterwarnings("ignore:The index of the chunk store")
def test_an_index_damaged_under_an_open_store(faults: ModuleType) -> None:
    counts = faults.under_way(2 * len(faults.DAMAGES), seed=7)
    assert counts["wrong"] == {}
    assert counts["operations"] > 1000


@pytest.mark.filterwarnings("ignore:The index of the chunk store")
def test_a_disk_full_to_the_last_byte_serves_and_is_pruned(faults: ModuleType) -> None:
    counts = faults.full(48)
    if "skipped" in counts:
        pytest.skip(counts["skipped"])
    assert counts["served_full"] == counts["told"] == counts["served_after_opening"] == 300
    assert counts["forgotten"] == 1
    assert counts["bytes_after_prune_to_1MiB"] <= 1 << 20
