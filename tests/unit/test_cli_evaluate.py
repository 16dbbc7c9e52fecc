"""``cacheblend eval`` over an engine that computes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, install

from cacheblend_rag import cli
from cacheblend_rag.cli.base import OUR_ERROR
from cacheblend_rag.engine import answers

pytestmark = pytest.mark.usefixtures("embedded")

LONG = "A passage about rivers, bridges and clocks that has enough words to be kept. " * 4


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    return install(monkeypatch)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = [
        {"id": str(i), "question": f"Who {i}?", "answers": ["a short answer"],
         "passages": [f"{n} {LONG}" for n in (i, i + 1)]}
        for i in range(5)
    ]  # fmt: skip
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = cli.main(["eval", "--json", *map(str, arguments)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    parsed: dict[str, Any] = json.loads(printed.out)
    return parsed


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["eval", *map(str, arguments)]) == OUR_ERROR
    return capsys.readouterr().err


def asked(engine: FakeEngine) -> list[str]:
    """What was wished of each answer, in order."""
    wishes = [(r.sampling.get("extra_args") or {}).get(answers.KEY) for r in engine.requests]
    return [wish for wish in wishes if wish]


def test_all_rows_are_asked_and_scored(
    engines: Sequence[FakeEngine], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    got = run(
        capsys, MODEL, "--data", data, "--out", out, "--ratios", 0.1, "--group", 2, "--show", 1
    )
    [own] = got["sets"]
    rows = {r["row"]: r for r in own["rows"]}
    assert list(rows) == [
        "full", "prefix_caching", "ratio_1", "reuse", "reuse/none", "query@0.1", "hkvd@0.1",
        "query@0.1~64",
    ]  # fmt: skip
    assert own["questions"] == 5 and rows["query@0.1"]["quality"] == 1.0
    assert rows["reuse"]["kl"] == 0.375 and rows["reuse"]["top1"] == 0.5
    assert rows["query@0.1"]["ratio"] == pytest.approx(0.1, abs=0.01)
    [engine] = engines
    assert engine.options["logits_processors"] == [answers.PROCESSOR]
    assert asked(engine).count("keep") == 5 and asked(engine).count("compare") == 35
    assert len(set(engine.ingested)) > 12, "six passages behind two prefixes"
    for name in ("summary.json", "summary.md", "recomputed.html", "answers-1of1.jsonl"):
        assert (out / name).stat().st_size > 0


def test_passages_are_forgotten_before_memory_is_full(
    engines: Sequence[FakeEngine],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = ["--data", data, "--only-rows", "reuse"]
    run(capsys, MODEL, *rows, "--out", tmp_path / "kept")
    monkeypatch.setattr("cacheblend_rag.evaluate.run._KEEP_BYTES", 0)
    run(capsys, MODEL, *rows, "--out", tmp_path / "forgotten")
    kept, forgotten = engines
    assert len(kept.stored) - len(forgotten.stored) == 6, "six passages in all"
    assert len(forgotten.ingested) - len(kept.ingested) == 4, "four of them twice"


def test_all_sets_advance_together(
    engines: Sequence[FakeEngine], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    got = run(
        capsys, MODEL, "--data", data, other, "--out", tmp_path / "o", "--only-rows", "reuse",
        "--pool", "both=own,other",
    )  # fmt: skip
    assert [(s["set"], s["questions"]) for s in got["sets"]] == [
        ("other", 2), ("own", 5), ("both", 7), ("all", 7)
    ]  # fmt: skip
    lines = map(json.loads, (tmp_path / "o" / "answers-1of1.jsonl").read_text().splitlines())
    order = [line["set"] for line in lines if line["type"] == "question"]
    assert order == ["own", "own", "other", "own", "own", "own", "other"]
    report = ["--report", tmp_path / "o", "--pool"]
    assert "false" in refused(capsys, *report, "both=own,false")
    assert "the same name" in refused(capsys, *report, "a=own", "a=other")
    for wrong in ("a/b=own", "all=own", "=own", "a="):
        with pytest.raises(SystemExit):
            cli.main(["eval", *map(str, report), wrong])


def test_parted_answers_are_asked_again(
    engines: Sequence[FakeEngine],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = FakeEngine._answer

    def parting(self: FakeEngine, request: Any) -> Any:
        reuses = request.params is not None
        self.answer = ("Another",) if reuses else ("A", " short", " answer", ".")
        return plain(self, request)

    monkeypatch.setattr(FakeEngine, "_answer", parting)
    got = run(
        capsys, MODEL, "--data", data, "--out", tmp_path / "o", "--only-rows", "reuse", "--limit", 3
    )
    [_, reuse] = got["sets"][0]["rows"]
    assert reuse["changed"] == 1.0 and reuse["quality"] == 0.0
    assert asked(engines[0]) == ["keep", "compare", "force"] * 3


def test_a_run_goes_on_where_it_ended(
    engines: Sequence[FakeEngine], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [MODEL, "--data", data, "--out", tmp_path / "out", "--ratios", 0.1]
    first = run(capsys, *common, "--limit", 2)
    second = run(capsys, *common)
    third = run(capsys, *common)
    assert first["sets"][0]["questions"] == 2
    assert second["sets"][0]["questions"] == 5 and third == second
    assert [asked(e).count("keep") for e in engines] == [2, 3, 0]
    more = run(capsys, *common, "--rows", "random@0.2")
    assert more["sets"][0]["rows"][-1]["row"] == "random@0.2"
    assert asked(engines[-1]) == ["keep", "compare"] * 5
    assert "other settings" in refused(capsys, *common, "--max-tokens", 3)
    assert run(capsys, "--report", tmp_path / "out", "--out", tmp_path / "again") == more


def test_shards_together_are_the_whole(
    engines: Sequence[FakeEngine], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", data, "--out", tmp_path / "out", "--ratios", 0.1]
    for shard in ("1/2", "2/2"):
        run(capsys, MODEL, *common, "--shard", shard)
    joined = run(capsys, "--report", tmp_path / "out", "--out", tmp_path / "joined")
    assert joined["sets"][0]["questions"] == 5


def test_long_questions_are_skipped_and_counted(
    engines: Sequence[FakeEngine], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"question": "Who?", "passages": [LONG] * 40}
    data.write_text(data.read_text() + json.dumps(record) + "\n")
    got = run(
        capsys, MODEL, "--data", data, "--out", tmp_path / "o", "--only-rows", "reuse/none",
        "--engine-arg", "max_model_len=1024",
    )  # fmt: skip
    assert (got["sets"][0]["questions"], got["sets"][0]["skipped"]) == (5, 1)


def test_pieces_of_passages_stand_behind_one_another(
    engines: Sequence[FakeEngine], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--only-rows", "reuse", "reuse/document"]
    common = [MODEL, "--data", data, *rows, "--limit", 1, "--out", tmp_path / "out"]
    got = run(capsys, *common, "--cut", 30)
    assert got["settings"]["cut"] == 30
    engine, tokenizer = engines[0], engines[0].tokenizer
    behind = [tokenizer.decode(ids) for ids in engine.behind.values()]
    pieces = [text for text in behind if text.endswith("be kept. A\n\n")]
    assert len(pieces) == 1, "both passages go on alike: the first is taken"
    lengths = {len(engine.behind[key]) for key in engine.ingested}
    assert len(lengths) == 3, "the prompt prefix, the model check's probe, and the rest"
    assert "cut is None, was 30" in refused(capsys, *common)
    run(capsys, *common[:-1], tmp_path / "whole")
    other = [tmp_path / "out", tmp_path / "whole"]
    assert "other settings (cut" in refused(capsys, "--report", *other)


def test_what_the_user_got_wrong(
    engines: Sequence[FakeEngine], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --data" in refused(capsys)
    assert "give --data" in refused(capsys, "--data", data, "--report", data)
    assert "there is no file" in refused(capsys, "--data", tmp_path / "absent")
    assert "not a result" in refused(capsys, "--report", data)
    assert "no answers-" in refused(capsys, "--report", tmp_path)
    assert "selector is 'qery'" in refused(capsys, "--data", data, "--selectors", "qery")
    assert "with --cut" in refused(capsys, "--data", data, "--scatter")
    assert "ingest prefix" in refused(capsys, "--data", data, "--prefixes", "nothing")
    for wrong in (["--shard", "3/2"], ["--engine-arg", "eager"], ["--ratios", "15"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["eval", *wrong])
    assert not engines, "nothing was started in vain"
