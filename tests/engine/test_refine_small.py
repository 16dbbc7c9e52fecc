"""The check of refinement in continuous integration: the benchmark, on a real model, over an answer
to a question of our own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark import FOLDER, benchmark
from small_set import prepare, write

# not marked slow, see test_evaluation_small.py
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("embedded", "in_process"),
]


def test_an_answer_becomes_a_full_prefills_and_serves_the_next_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    prepare(monkeypatch)
    data, out = write(tmp_path / "valley.jsonl", every=14), tmp_path / "rows.json"
    monkeypatch.syspath_prepend(str(FOLDER))
    options = ["--limit", "2", "--tokens", "48", "--refine", "off", "64", "--eager"]
    monkeypatch.setattr(sys, "argv", ["refine.py", str(data), *options, "--json", str(out)])
    benchmark("refine").main()
    rows = json.loads(out.read_text())
    assert [len(done) for done in rows.values()] == [2, 2]
    half = {
        wish: sum(kl for row in done for kl in row["kl"][24:]) / 48 for wish, done in rows.items()
    }
    for wish, kl in half.items():
        record_property(f"KL of the last half, refine {wish}", f"{kl:.6f}")
    assert half["64"] < half["off"] / 5
    assert all(row["refined"] and row["same"] for row in rows["64"]), rows["64"]
    assert not any(row["refined"] or row["tokens"] for row in rows["off"])
