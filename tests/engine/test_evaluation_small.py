"""The small evaluation of continuous integration: the command, a real model, questions of our own.

Its order must hold on any machine: the question's attention before KV deviation before naive reuse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_set import QUESTIONS, prepare, write

from cacheblend_rag import BlendConfig, cli

# more than half a minute, yet not marked slow: this is the check of quality that CI is to run
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), pytest.mark.usefixtures("embedded")]

DEFAULT = BlendConfig()
SHIPS = f"{DEFAULT.selector}@{DEFAULT.recompute_ratio:g}~{DEFAULT.propagation_length}"
PUBLISHED = "hkvd@0.15"  # CacheBlend's own selection, which moves no other tokens
ROWS = ["reuse", PUBLISHED, SHIPS]


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["eval", "--json", *arguments]) == 0
    out: dict[str, Any] = json.loads(capsys.readouterr().out)
    return out


def test_the_question_chooses_better_than_deviation_and_both_than_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    prepare(monkeypatch)
    data, out = write(tmp_path / "valley.jsonl", every=2), tmp_path / "out"
    asked = evaluate(
        capsys, "--data", str(data), "--out", str(out), "--only-rows", *ROWS,
        "--group", "4", "--show", "1", "--max-tokens", "6",
        "--engine-arg", "max_model_len=2048",
    )  # fmt: skip
    [valley] = asked["sets"]
    assert valley["questions"] == len(QUESTIONS[::2]) and not valley["left_out"]
    rows = {row["row"]: row for row in valley["rows"]}
    assert list(rows) == ["full", *ROWS]
    for name in ROWS:
        record_property(f"KL {name}", f"{rows[name]['kl']:.4f}")
    assert rows[SHIPS]["kl"] < rows[PUBLISHED]["kl"] < rows["reuse"]["kl"]
    assert all(rows[name]["not_blended"] == 0 for name in ROWS)
    assert rows[SHIPS]["ratio"] == pytest.approx(0.15, abs=0.003)
    assert rows["reuse"]["ratio"] == 0.0
    assert "<mark>" in (out / "recomputed.html").read_text()
    # what is finished is not asked again, and results can be scored elsewhere
    before = (out / "answers-1of1.jsonl").read_bytes()
    scored = evaluate(capsys, "--report", str(out), "--out", str(tmp_path / "again"))
    assert scored == asked
    assert (out / "answers-1of1.jsonl").read_bytes() == before
