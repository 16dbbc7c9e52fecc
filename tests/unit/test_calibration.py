"""What ``auto`` stands for: how it is chosen, kept and found again."""

from __future__ import annotations

import argparse
import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag import calibration
from cacheblend_rag.calibration import Calibration, find, in_folder, resolved, sent, usual_path
from cacheblend_rag.cli import calibrate
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ConfigError, DataError
from cacheblend_rag.evaluate.base import Question
from cacheblend_rag.evaluate.calibrate import CANDIDATES, choose, pooled
from cacheblend_rag.evaluate.results import Answer, ResultFile, read_results
from cacheblend_rag.evaluate.rows import parse_row
from cacheblend_rag.evaluate.summary import SetSummary, summarise

WEIGHTS = "ab" * 32
MADE = Calibration(
    fingerprint=WEIGHTS,
    version="0.1.0",
    ratio=0.5,
    selector="query",
    selector_options={"coverage": 0.6},
    propagation_length=16,
    changed_allowed=0.2,
    changed=0.18,
    mean_ratio=0.12,
    questions=40,
    data=("s",),
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHEBLEND_HOME", str(tmp_path))
    return tmp_path


def test_a_calibration_is_found_by_the_weights_it_was_made_with(tmp_path: Path) -> None:
    assert find(WEIGHTS) is None
    MADE.save(usual_path(WEIGHTS))
    assert find(WEIGHTS) == MADE
    assert find("cd" * 32) is None
    MADE.save(tmp_path / "elsewhere.json")
    assert find(WEIGHTS, str(tmp_path / "elsewhere.json")) == MADE
    with pytest.raises(ConfigError, match="of other weights"):
        find("cd" * 32, str(tmp_path / "elsewhere.json"))


def test_a_calibration_s_usual_place(home: Path) -> None:
    """32 of 64 digits tell weights apart, and leave a name that every file system takes."""
    assert usual_path(WEIGHTS) == home / "calibrations" / f"{'ab' * 16}.json"
    deep = home / "a" / "b" / "c.json"
    MADE.save(deep)
    assert find(WEIGHTS, str(deep)) == MADE


def test_it_is_made_in_the_dtype_that_is_served() -> None:
    """Weights in another dtype have another fingerprint: it would not be found."""
    parser = argparse.ArgumentParser()
    calibrate.add(parser.add_subparsers())
    assert parser.parse_args(["calibrate"]).dtype == "auto"


def test_what_ships_is_found_behind_what_was_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "shipped")
    shipped = replace(MADE, ratio=0.3)
    shipped.save(in_folder(tmp_path / "shipped", WEIGHTS))
    assert find(WEIGHTS) == shipped and find("cd" * 32) is None
    MADE.save(usual_path(WEIGHTS))
    assert find(WEIGHTS) == MADE


def test_those_that_ship_are_whole_and_kept_on_questions_they_were_not_chosen_by() -> None:
    for path in calibration.SHIPPED.glob("*.json"):
        found = find(json.loads(path.read_text())["fingerprint"], str(path))
        assert found is not None and path == in_folder(calibration.SHIPPED, found.fingerprint)
        assert found.model and found.data and found.questions >= 20, path.name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format 2"),
        ({"ratio": 7}, "7"),
        ({"selector": "nobody"}, "nobody"),
        ({"surprise": 1}, "surprise"),
        (None, "no calibration"),
    ],
)
def test_what_is_no_calibration(change: dict[str, Any] | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    MADE.save(path)
    data = json.loads(path.read_text())
    path.write_text("[]" if change is None else json.dumps({**data, **change}))
    with pytest.raises(ConfigError, match=says):
        find(WEIGHTS, str(path))
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        find(WEIGHTS, str(path))


@pytest.mark.parametrize("text", ["", '{"format": 1, "ratio"', '{"format": 99}', "[]", "\xff"])
def test_a_damaged_one_that_nobody_named_counts_as_absent(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "shipped")
    path = usual_path(WEIGHTS)
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=rf"Left out: .*{path.name}.*cacheblend calibrate"):
        assert find(WEIGHTS) is None
    MADE.save(in_folder(tmp_path / "shipped", WEIGHTS))
    with pytest.warns(RuntimeWarning, match="Left out"):
        assert find(WEIGHTS) == MADE
    with pytest.raises(ConfigError, match="calibrat"):
        find(WEIGHTS, str(path))


def test_one_that_cannot_be_written_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    MADE.save(path := usual_path(WEIGHTS))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_space)
        with pytest.raises(OSError, match="No space left"):
            replace(MADE, ratio=0.3).save(path)
    assert find(WEIGHTS) == MADE and list(path.parent.iterdir()) == [path]


def no_space(path: Path, text: str, encoding: str) -> None:
    path.write_bytes(text[:9].encode())
    raise OSError(errno.ENOSPC, "No space left on device")


def test_auto_is_the_calibration_or_the_careful_ratio() -> None:
    auto = BlendConfig(recompute_ratio="auto")
    assert resolved(auto, None) == BlendConfig(recompute_ratio=0.5)
    got = resolved(auto, MADE)
    assert (got.recompute_ratio, got.selector, got.propagation_length) == (0.5, "query", 16)
    assert dict(got.selector_options) == {"coverage": 0.6}
    fixed = BlendConfig(recompute_ratio=0.3)
    assert resolved(fixed, MADE) is fixed
    # What a request says itself, no calibration changes.
    asked = auto.for_call({"propagation_length": 0})
    got = resolved(asked, MADE, {"propagation_length"})
    assert (got.recompute_ratio, got.selector, got.propagation_length) == (0.5, "query", 0)
    got = sent(auto.for_call({"selector": "first_k"}), MADE, {"selector"})
    assert (got.recompute_ratio, got.selector, got.propagation_length) == (0.5, "first_k", 16)
    assert dict(got.selector_options) == {}
    with pytest.raises(ConfigError, match="number or 'auto'"):
        BlendConfig(recompute_ratio="much")  # type: ignore[arg-type]


# --- the choice -----------------------------------------------------------------------------------

FLIPS = {
    "query@0.05": 5,
    "query@0.15": 2,
    "query@0.3~64": 1,
    "query:coverage=0.6:first_share=0@0.5": 2,
}
SHARES = {
    "query@0.05": 5,
    "query@0.15": 15,
    "query@0.3~64": 30,
    "query:coverage=0.6:first_share=0@0.5": 12,
}


def summary(tmp_path: Path, sets: tuple[str, ...] = ("s",), kind: str = "qa") -> list[SetSummary]:
    """Ten questions a set, so many of whose answers differ."""
    path = tmp_path / "answers.jsonl"
    with ResultFile(path, {"model": "m"}) as file:
        for name in sets:
            for n in range(10):
                about: dict[str, Any] = {"set": name, "id": str(n)}
                common = {**about, "tokens": 1, "tokens_total": 100}
                asked = Question(
                    question="Q?", passages=("p",), answers=("Rome",), kind=kind, **about
                )
                file.add_question(asked)
                file.add([Answer(row="full", text="Rome", **common)])
                for row, changed in FLIPS.items():
                    text = "Oslo" if n < changed else "Rome"
                    blended: dict[str, Any] = {
                        "tokens_reused": 100 - SHARES[row],
                        "tokens_recomputed": SHARES[row],
                        "chunks": [[100, SHARES[row]]],
                    }
                    file.add([Answer(row=row, text=text, kl=[0.1], **blended, **common)])
    return summarise(read_results([path]))


def test_the_cheapest_row_that_keeps_to_it_is_chosen(tmp_path: Path) -> None:
    assert set(FLIPS) <= set(CANDIDATES)
    together = pooled(summary(tmp_path))
    assert choose(together, 0.5) == "query@0.05"
    assert choose(together, 0.2) == "query:coverage=0.6:first_share=0@0.5"
    assert choose(together, 0.1) == "query@0.3~64"
    assert choose(together, 0.5, ("query@0.15", "query@0.3~64")) == "query@0.15"
    with pytest.raises(DataError, match=r"the best, query@0.3~64, changes 10%.*mode='full'"):
        choose(together, 0.05)


def test_every_candidate_is_a_row() -> None:
    for name in CANDIDATES:
        options = parse_row(name).options
        replace(
            MADE, ratio=options["recompute_ratio"], propagation_length=options["propagation_length"]
        )


def test_sets_are_taken_together(tmp_path: Path) -> None:
    assert pooled(summary(tmp_path, ("s", "t"))).questions == 20
    with pytest.raises(DataError, match="one set of summaries"):
        pooled(summary(tmp_path / "x", ("s", "t"), "summary"))
