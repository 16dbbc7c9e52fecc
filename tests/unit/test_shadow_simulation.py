"""The controller over 2,000 requests whose mix shifts from single-passage to multi-hop questions,
drawn from answers that were recorded: what docs/serving.md says of it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmark import benchmark

from cacheblend_rag import BlendConfig
from cacheblend_rag.evaluate.base import Question
from cacheblend_rag.evaluate.results import Answer, ResultFile

FILE = Path(__file__).parents[1] / "helpers" / "recorded_answers.json"
TARGET, POINTS, RUNS = 0.05, 0.02, 2


@pytest.fixture(scope="module")
def script() -> Any:
    return benchmark("recorded_answers")


@pytest.fixture(scope="module")
def recorded(script: Any) -> Any:
    return script.Recorded(json.loads(FILE.read_text()))


@pytest.fixture(scope="module")
def runs(script: Any, recorded: Any) -> Sequence[list[str]]:
    return [script.traffic(recorded, 2000, seed) for seed in range(RUNS)]


def controlled(script: Any, recorded: Any, runs: Sequence[list[str]], share: float) -> list[Any]:
    config = BlendConfig(recompute_ratio="auto", shadow=share, changed_allowed=TARGET)
    return [script.controlled(recorded, run, config, seed) for seed, run in enumerate(runs)]


def test_traffic_shifts_from_one_kind_to_the_other(recorded: Any, runs: Any) -> None:
    single, hop = (set(kind) for kind in recorded.kinds)
    assert set(runs[0][:800]) <= single and set(runs[0][1200:]) <= hop


def test_a_tenth_keeps_the_target_below_the_fixed_ratio_that_keeps_it(
    script: Any, recorded: Any, runs: Any
) -> None:
    fixed = script.best_fixed(recorded, runs, TARGET)
    found = controlled(script, recorded, runs, 0.1)
    assert all(run.changed <= TARGET + POINTS for run in found), found
    assert statistics.mean(run.ratio for run in found) < fixed - 0.05
    assert all(run.shadowed < 0.1 for run in found)  # little is blended, and so little drawn


def test_a_hundredth_is_too_little_for_so_few_requests(script: Any, recorded: Any) -> None:
    """No promise: the documentation says so."""
    more = [script.traffic(recorded, 2000, seed) for seed in range(4)]
    found = controlled(script, recorded, more, 0.01)
    assert sum(run.changed <= TARGET + POINTS for run in found) < 0.9 * len(found), found


def test_what_was_not_recorded_is_taken_from_the_next_ratio_below(script: Any) -> None:
    data = {"ratios": [0.1, 0.3], "single_passage": ["10"], "multi_hop": ["11"]}
    recorded = script.Recorded(data)
    assert [recorded.changed("10", ratio) for ratio in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


# ---- recording -----------------------------------------------------------------------------------


def test_questions_are_shortened_to_what_they_need(script: Any, tmp_path: Path) -> None:
    passages = [{"title": str(n), "text": f"{n} {'word ' * 60} answer{n}"} for n in range(8)]
    rows = [
        {"id": "a", "question": "?", "answers": ["answer6"], "passages": passages},
        {"id": "b", "question": "?", "answers": ["none"], "passages": passages},
        {"id": "c", "question": "?", "answers": ["answer1"], "passages": passages[:2]},  # short
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gold.json").write_text(json.dumps({"set.jsonl": {"b": [3, 4]}}))
    files = ["--gold", str(tmp_path / "gold.json"), "--out", str(tmp_path / "out")]
    script.main(["shorten", str(tmp_path / "set.jsonl"), *files, "--passages", "3"])
    got = [json.loads(line) for line in (tmp_path / "out/set.jsonl").read_text().splitlines()]
    titles = {row["id"]: [passage["title"] for passage in row["passages"]] for row in got}
    assert titles.keys() == {"a", "b"} and all(len(kept) == 3 for kept in titles.values())
    assert "6" in titles["a"] and {"3", "4"} <= set(titles["b"])


def test_results_become_digits_and_no_text(script: Any, tmp_path: Path) -> None:
    def answer(set_name: str, row: str, same: int) -> Answer:
        return Answer(
            set=set_name, id="1", row=row, text="secret", tokens=3, kl=[0.0, 0.1, 0.2], same=same,
            tokens_total=9, blended=True,
        )  # fmt: skip

    with ResultFile(tmp_path / "answers-1of1.jsonl", {"model": "m"}) as file:
        for name in ("squad", "hops"):
            question = Question(set=name, id="1", question="?", answers=(), passages=("p",))
            file.add_question(question)
            file.add([answer(name, "full", 0), answer(name, "query@0.3~64", 3)])
            file.add([answer(name, "query@0.05~64", 2), answer(name, "hkvd@0.15", 2)])
    out = tmp_path / "out.json"
    script.main(["collect", str(tmp_path), "--multi-hop", "hops", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["ratios"] == [0.05, 0.3] and found["model"] == "m"
    assert found["single_passage"] == found["multi_hop"] == ["10"]
    assert "secret" not in out.read_text()
