"""The command line without an engine: arguments, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_retriever import FakeRetriever, split

from cacheblend_rag import __version__, cli, demo
from cacheblend_rag.calibration import Calibration
from cacheblend_rag.engine.base import EngineInfo, EngineOutput, LayerCheck, ModelCheck
from cacheblend_rag.errors import EngineError
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.reason import Reason
from cacheblend_rag.report import BlendReport, SegmentReport
from cacheblend_rag.result import BlendResult, BlendStream, make_result
from cacheblend_rag.store import ChunkKV, DiskStore

REFUSAL = "the model mixes attention with recurrent layers"


class FakeBlend:
    """Stands in for CacheBlend: says "It is 42." to everything, without an engine."""

    made: list[FakeBlend]
    stored: set[str]
    refusal = ""
    max_tokens: int | None = None
    fails: type[BaseException] | None = None
    blends = True
    calibration: Calibration | None = None

    def __init__(self, model: str, **options: Any) -> None:
        self.made.append(self)
        self.options, self.asked = options, list[dict[str, Any]]()
        self.tokenizer = None
        check = LayerCheck(0, 37, 1e-4, 2e-4, not self.refusal)
        self.model_check = ModelCheck(
            passed=not self.refusal,
            reason=Reason.HYBRID if self.refusal else None,
            detail=self.refusal,
            layers=[check, check._replace(shift=8000)],
            prefill_error=None if self.refusal else 1e-5,
            tolerance=(2e-3, 1e-3),
            max_tokens=self.max_tokens,
        )
        self.info = EngineInfo(
            model=model,
            vllm_version="0.30.0",
            dtype="float32",
            device="cpu",
            block_size=32,
            max_model_len=8192,
            max_num_batched_tokens=2048,
            vocab_size=512,
        )
        if self.fails is not None:
            os.write(2, b"the engine's last words\n")
            raise self.fails("the engine did not start")

    def __enter__(self) -> FakeBlend:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ingest(self, texts: Sequence[str]) -> IngestReport:
        if self.refusal:
            return IngestReport(chunks=len(texts), reason=Reason.HYBRID, detail=self.refusal)
        new = [text for text in texts if text not in self.stored]
        self.stored.update(new)
        return IngestReport(
            chunks=len(texts),
            computed=len(new),
            present=len(texts) - len(new),
            tokens=100 * len(new),
            bytes=1000 * len(new),
            seconds=0.5,
            keys=["ab"] * len(texts),
        )

    def stream(self, messages: Sequence[Mapping[str, str]], **options: Any) -> BlendStream:
        self.asked.append({"messages": messages, **options})
        ids = [(7, "It is"), (8 if options.get("mode") == "reuse" else 9, " 42.")]
        pieces = [
            EngineOutput(text, (token,), "stop" if number else None, None, None, {}, 0.0)
            for number, (token, text) in enumerate(ids)
        ]

        def finish(all_pieces: Sequence[EngineOutput], start: float) -> BlendResult:
            report = a_report(str(options.get("mode")), self.blends)
            return make_result((1, 2, 3), all_pieces, report, "r-0")

        return BlendStream(iter(pieces), finish)


def a_report(mode: str, blended: bool) -> BlendReport:
    if not blended or mode == "full":
        return BlendReport(
            mode=mode,
            blended=False,
            reason=Reason.NO_CHUNK_FOUND,
            detail="no stored chunk found in the prompt",
            tokens_total=100,
            tokens_fresh=100,
        )
    return BlendReport(
        mode=mode,
        blended=True,
        tokens_total=100,
        tokens_reused=70,
        tokens_recomputed=10,
        tokens_fresh=20,
        recompute_ratio=0.15,
        selector="query",
        ttft_s=0.25,
        stages_s={"load": 0.01},
        segments=[SegmentReport(0, 80, "reused", 10, "stored KV", "ab")],
    )


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeBlend]]:
    class Fake(FakeBlend):
        made = []  # noqa: RUF012
        stored = set()  # noqa: RUF012

    monkeypatch.setattr(cli.engine, "CacheBlend", Fake)
    for family in (cli.documents, cli.store, cli.demo):
        monkeypatch.setattr(family, "Retriever", FakeRetriever)
    for family in (cli.documents, cli.demo, cli.workers):
        monkeypatch.setattr(family, "split", split)
    monkeypatch.setattr(cli.engine, "EXTRAS", {})
    for starter in (cli.engine, cli.workers):
        monkeypatch.setattr(starter, "resolve_model", lambda name: name or str(tmp_path))
    environment = {k: v for k, v in os.environ.items() if k not in cli.output.ENVIRONMENT}
    environment["CACHEBLEND_HOME"] = str(tmp_path / "home")
    with mock.patch.dict(os.environ, environment, clear=True):
        yield Fake


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.md").write_text("One.\n\nTwo.")
    (folder / "b.txt").write_text("Three.")
    return folder


def object_on_stdout(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    data = json.loads(capsys.readouterr().out)
    assert isinstance(data, dict)
    return data


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice"),
        (["aks", "q"], "Did you mean ask?"),
        (["ask", "q", "--modle", "off"], "there is no option --modle. Did you mean --mode?"),
        (["check", "m", "--xyz"], "there is no option --xyz. cacheblend check --help lists all"),
        (["ask", "When", "is", "it?"], "not expected: is it?. Put a text of several words"),
        (["ingest"], "PATH"),
        (["ask"], "question"),
        (["check"], "MODEL"),
        (["ask", "q", "--ratio", "1.5"], "'1.5' is not a share"),
        (["ask", "q", "--ratio", "much"], "'much' is not a share"),
        (["ask", "q", "--k", "0"], "'0' is not a whole number of 1 or more"),
        (["ask", "q", "--max-tokens", "x"], "'x' is not a whole number"),
        (["ask", "q", "--mode", "fast"], "invalid choice: 'fast'"),
        (["ask", "q", "--selector", "best"], "invalid choice: 'best'"),
        (["ask", "q", "--selector", "hkdv"], "Did you mean hkvd?"),
        (["serve", "--selector", "hkdv"], "Did you mean hkvd?"),
        (["ingest", "a", "--chunk-tokens", "31"], "whole number of 32 or more"),
        (["stats", "--store", "memory://"], "'memory://' is not a folder"),
        (["ingest", "a", "--store", "ftp://x"], "cannot be opened by ftp"),
        (["ingest", "a", "--store", "file:///x"], "give its plain path"),
        (["ingest", "a", "--ray", "--workers", "0"], "whole number of 1 or more"),
        (["demo", "--questions", "0"], "whole number of 1 or more"),
    ],
)
def test_wrong_usage_ends_with_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, said in (("--version", __version__), ("--help", "ingest")):
        with pytest.raises(SystemExit) as ended:
            cli.main([option])
        assert not ended.value.code
        assert said in capsys.readouterr().out


def test_a_home_with_a_percent_sign_breaks_no_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CACHEBLEND_HOME", "/tmp/100%s")
    with pytest.raises(SystemExit):
        cli.main(["ask", "--help"])
    assert "/tmp/100%s/store" in capsys.readouterr().out.replace("\n", "").replace(" ", "")


# ---- errors --------------------------------------------------------------------------------------


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said on stderr by a command that ends with 1 and prints nothing else."""
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_our_errors_end_with_1_and_their_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake: type[FakeBlend]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    absent = tmp_path / "absent"
    assert "does not exist" in fails(["ingest", str(absent)], capsys)
    assert "No documents found" in fails(["ingest", str(empty), "--json"], capsys)
    assert "Ingest documents first" in fails(["ask", "Who?"], capsys)
    assert "cacheblend ingest" in fails(["stats", "--store", str(empty)], capsys)
    assert not list(empty.iterdir())  # looking claims nothing
    assert not fake.made  # no engine was started in vain


def test_a_missing_extra_is_named(
    documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.engine, "EXTRAS", {"no_such_module": "no-such-package"})
    for arguments in (["ingest", str(documents)], ["ask", "Who?"], ["demo"]):
        said = fails(arguments, capsys)
        assert "no-such-package is not installed" in said and "cacheblend-rag[cli]" in said


def test_the_engines_own_output_is_shown_where_it_failed(
    fake: type[FakeBlend], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(tmp_path)]) == 0
    fake.fails = EngineError
    assert cli.main(["check", str(tmp_path)]) == 1
    said = capfd.readouterr().err
    assert "the engine's last words" in said and "the engine did not start" in said


def test_ctrl_c_ends_with_130(
    fake: type[FakeBlend], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails = KeyboardInterrupt
    assert cli.main(["check", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_missing_demo_documents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "cacheblend_rag" / "demo.py"))
    assert "Clone" in fails(["demo"], capsys)


# ---- ingest and ask ------------------------------------------------------------------------------


def test_ingest_reports_and_the_second_one_computes_nothing(
    documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ingest", str(documents), "--json"]) == 0
    data = object_on_stdout(capsys)
    assert (data["documents"], data["passages"], data["passages_indexed"]) == (2, 3, 3)
    assert data["report"]["computed"] == 3
    assert data["report"]["tokens_per_s"] == 600
    assert data["store"] == str(Path(os.environ["CACHEBLEND_HOME"], "store"))
    assert cli.main(["ingest", str(documents)]) == 0
    assert "Nothing new to compute: 3 of 3" in capsys.readouterr().out


class Workers:
    """In the place of a cluster: what it was asked for, and what it says."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def load(self) -> Any:
        return self.ingest

    def ingest(
        self, texts: Sequence[str], documents: Sequence[str | None], **options: Any
    ) -> IngestReport:
        self.asked = {"texts": texts, "documents": documents, **options}
        return IngestReport(chunks=3, computed=3, tokens=30, keys=["ab"] * 3, seconds=0.5)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    made = Workers()
    found = {"cacheblend_rag.workers": [made]}
    monkeypatch.setattr(cli.workers, "entry_points", lambda group, name: found[group])
    monkeypatch.setattr(cli.workers, "_tokenizer", lambda model: None)
    return made


def test_ingest_by_workers_into_a_folder(
    documents: Path, tmp_path: Path, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    """As without them: ``ask`` finds the passages, and the command keeps the register."""
    store = tmp_path / "kv"
    asked = ["ingest", str(documents), "--store", str(store), "--ray", "--workers", "2"]
    assert cli.main(asked) == 0
    assert "Computed 3 of 3" in capsys.readouterr().out
    assert len(FakeRetriever.load(tmp_path / "kv-index").passages) == 3
    assert workers.asked["texts"] == ["One.", "Two.", "Three."]
    assert set(workers.asked["documents"]) == {None}
    assert (workers.asked["address"], workers.asked["workers"]) == ("local", 2)
    assert workers.asked["config"]["store"] == store.as_uri()
    assert workers.asked["config"]["system_prompt"] == demo.SYSTEM_PROMPT


def test_ingest_by_workers_into_a_store_that_they_share(
    documents: Path, workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    """``ask`` has no such store: nothing is indexed, and the workers label the documents."""
    url = "redis://user:secret@host:6379/0"
    asked = ["ingest", str(documents), "--store", url, "--ray", "host:6380", "--json"]
    assert cli.main([*asked, "--namespace", "red"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert "secret" not in captured.out + captured.err
    assert (data["passages"], data["passages_indexed"], data["index"]) == (3, 0, None)
    assert [Path(d).name for d in workers.asked["documents"]] == ["a.md", "a.md", "b.txt"]
    assert (workers.asked["address"], workers.asked["workers"]) == ("host:6380", 1)
    assert workers.asked["config"]["store"] == url
    assert workers.asked["config"]["namespace"] == "red"


def test_what_is_for_workers_needs_ray(
    documents: Path, fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(documents)
    assert "--workers is for --ray" in fails(["ingest", path, "--workers", "2"], capsys)
    assert "add --ray" in fails(["ingest", path, "--store", "redis://host:1/0"], capsys)
    assert not fake.made


def test_workers_that_are_not_installed(
    documents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.workers, "entry_points", lambda group, name: [])
    assert "cacheblend-rag[ray]" in fails(["ingest", str(documents), "--ray"], capsys)


def test_ingestions_add_up_and_replace_what_is_read_again(
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "kv"
    monkeypatch.chdir(documents)
    for paths, expected in (
        (["a.md"], ["One.", "Two."]),
        (["b.txt", "a.md", "."], ["Three.", "One.", "Two."]),
    ):
        assert cli.main(["ingest", *paths, "--store", str(store)]) == 0
        passages = FakeRetriever.load(tmp_path / "kv-index").passages
        assert [p.text for p in passages] == expected
    assert all(Path(p.source).is_absolute() for p in passages)
    (documents / "a.md").unlink()
    assert cli.main(["ingest", str(documents), "--store", str(store)]) == 0
    assert [p.text for p in FakeRetriever.load(tmp_path / "kv-index").passages] == ["Three."]


def test_a_file_that_cannot_be_read_stops_no_other(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ingest", str(documents), "--json"]) == 0
    bad = {
        "caf\udce9.md": b"One.",
        "empty.md": b" \n",
        "latin.txt": b"caf\xe9",
        "broken.pdf": b"%PDF-1.7 no",
        "a.md": b"",
    }
    for name, content in bad.items():
        (documents / name).write_bytes(content)
    capsys.readouterr()
    assert cli.main(["ingest", str(documents), "--json"]) == 3
    said = capsys.readouterr()
    data = json.loads(said.out)
    assert {Path(row["path"]).name for row in data["left_out"]} == {
        name.encode(errors="replace").decode().replace("?", "\ufffd") for name in bad
    }
    assert "latin.txt is not UTF-8" in said.err
    assert data["documents"] == 1
    assert data["passages_indexed"] == 3  # what was read of a.md before stays
    alone = str(documents / "latin.txt")
    assert cli.main(["ingest", str(documents / "b.txt"), alone]) == 3
    capsys.readouterr()
    assert "not UTF-8" in fails(["ingest", alone], capsys)
    assert "does not exist" in fails(["ingest", str(documents), str(tmp_path / "no")], capsys)


def test_a_refused_model_stores_nothing_and_says_why(
    documents: Path, fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.refusal = REFUSAL
    assert cli.main(["ingest", str(documents), "--json"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["report"]["reason"] == "hybrid"
    assert REFUSAL in captured.err


def test_ask_streams_and_prints_the_report(
    documents: Path, fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ingest", str(documents)]) == 0
    capsys.readouterr()
    assert cli.main(["ask", "What is it?"]) == 0
    captured = capsys.readouterr()
    for said in ("It is 42.", "tokens reused", "70", "load", "stored KV"):
        assert said in captured.out
    assert "Starting vLLM" in captured.err and "Nothing stored" not in captured.err
    assert fake.made[-1].options["config"].system_prompt == demo.SYSTEM_PROMPT
    [asked] = fake.made[-1].asked
    assert asked["mode"] == "blend" and "recompute_ratio" not in asked
    system, user = asked["messages"]
    assert system == {"role": "system", "content": demo.SYSTEM_PROMPT}
    assert "One.\n\nTwo.\n\nThree.\n\nQuestion: What is it?" in user["content"]


def test_ask_with_options_and_json(
    documents: Path, fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ingest", str(documents)]) == 0
    capsys.readouterr()
    options = ["--k", "1", "--ratio", "0.5", "--selector", "hkvd", "--max-tokens", "9"]
    assert cli.main(["ask", "What is it?", *options, "--json"]) == 0
    data = object_on_stdout(capsys)
    assert set(data) == {"question", "answer", "finish_reason", "passages", "report"}
    assert data["answer"] == "It is 42."
    assert [p["text"] for p in data["passages"]] == ["One."]
    assert data["report"]["segments"][0]["kind"] == "reused"
    [asked] = fake.made[-1].asked
    expected = {"recompute_ratio": 0.5, "selector": "hkvd", "max_tokens": 9, "temperature": 0.0}
    assert expected.items() <= asked.items()


def test_ask_hints_where_nothing_was_stored_for_this_model(
    documents: Path, fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ingest", str(documents)]) == 0
    fake.blends = False
    assert cli.main(["ask", "What?", "--model", "org/other"]) == 0
    assert "--model org/other" in capsys.readouterr().err
    assert cli.main(["ask", "What?", "--mode", "full"]) == 0
    assert "Nothing stored" not in capsys.readouterr().err


# ---- check and stats -----------------------------------------------------------------------------


def test_check_passed_and_refused(
    fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "org/model", "--json"]) == 0
    data = object_on_stdout(capsys)
    assert data["passed"] and data["model"] == "org/model" and len(data["layers"]) == 2
    assert set(data["layers"][0]) == {"layer", "shift", "key_error", "value_error", "ok"}
    assert fake.made[-1].options["config"].store == "memory://"
    fake.refusal = REFUSAL
    assert cli.main(["check", "org/model"]) == 3
    captured = capsys.readouterr()
    assert "refused" in captured.out and REFUSAL in captured.out.replace("\n", " ")


def test_check_says_how_far_blends_reach(
    fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", "org/model"]) == 0
    assert "sliding window" not in capsys.readouterr().out
    fake.max_tokens = 4126
    assert cli.main(["check", "org/model"]) == 0
    assert "first 4126 tokens" in capsys.readouterr().out


def test_check_shows_a_calibration(
    fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.calibration = Calibration(
        fingerprint="ab", version="0", ratio=0.3, selector="query", propagation_length=16,
        changed_allowed=0.2, changed=0.18, mean_ratio=0.12, questions=40,
    )  # fmt: skip
    assert cli.main(["check", "org/model"]) == 0
    assert "changed 18% of 40 answers, recomputed 12.0%" in capsys.readouterr().out
    assert cli.main(["check", "org/model", "--json"]) == 0
    assert object_on_stdout(capsys)["calibration"]["propagation_length"] == 16


def test_stats_count_each_namespace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for namespace, lengths in (("one", (32, 40)), ("two", (50,))):
        with DiskStore(tmp_path / "kv", namespace=namespace) as store:
            for number, length in enumerate(lengths):
                kv_L2NHD = torch.zeros(2, 2, length, 1, 8)
                store.put(f"{number:064x}", ChunkKV(tuple(range(length)), 4, kv_L2NHD))
    assert cli.main(["stats", "--store", str(tmp_path / "kv"), "--json"]) == 0
    data = object_on_stdout(capsys)
    size = 2 * 2 * 8 * 4
    assert data["namespaces"] == [
        {"namespace": "one", "chunks": 2, "tokens": 72, "bytes": 72 * size},
        {"namespace": "two", "chunks": 1, "tokens": 50, "bytes": 50 * size},
    ]
    assert data["total"] == {"chunks": 3, "tokens": 122, "bytes": 122 * size}
    assert cli.main(["stats", "--store", str(tmp_path / "kv")]) == 0
    assert "122" not in capsys.readouterr().err


# ---- demo ----------------------------------------------------------------------------------------


@pytest.fixture
def demo_folder(monkeypatch: pytest.MonkeyPatch, documents: Path) -> Path:
    rows = [{"question": f"What is {n}?", "answer": "42", "documents": []} for n in range(4)]
    (documents / "questions.json").write_text(json.dumps(rows))
    monkeypatch.setattr(demo, "data_folder", lambda: documents)
    return documents


@pytest.mark.usefixtures("demo_folder")
def test_demo_asks_in_turns_and_compares(
    fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--json"]) == 0
    data = object_on_stdout(capsys)
    keys = {"model", "versions", "block_size", "ingest", "questions", "summary"}
    assert set(data) == keys
    turns = [question["order"] for question in data["questions"]]
    assert [turn[0] for turn in turns] == ["full", "reuse", "blend", "full"]
    assert all(sorted(turn) == sorted(demo.MODES) for turn in turns)
    summary = data["summary"]
    assert summary["correct"] == {"full": 4, "reuse": 4, "blend": 4}
    assert summary["agree"] == {"reuse": 4, "blend": 4}
    assert set(summary["speedup_median"]) == {"reuse", "blend"}
    answer = data["questions"][0]["answers"]["blend"]
    assert answer["tokens_reused"] == 70 and answer["correct"] and answer["first_token_agrees"]
    assert len(fake.made[-1].asked) == 3 * 5  # the first three warm it up


@pytest.mark.usefixtures("demo_folder")
def test_demo_shows_answers_and_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--questions", "1"]) == 0
    shown = capsys.readouterr().out
    for said in ("1/1", "What is 0?", "It is 42.", "70 reused", "vllm 0.30.0", "tiny", "--model"):
        assert said in shown
    assert cli.main(["demo", "--questions", "1", "--model", "org/large"]) == 0
    assert "tiny" not in capsys.readouterr().out


@pytest.mark.usefixtures("demo_folder")
def test_demo_with_a_refused_model(
    fake: type[FakeBlend], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.refusal = REFUSAL
    assert cli.main(["demo"]) == 3
    assert REFUSAL in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("gold", "text", "right"),
    [
        ("Idony Crake", "It was idony crake.", True),
        ("12", "In 1912.", False),
        ("4.6 bar", "The pressure is 4.6 bar.", True),
        ("1,250", "It cost 1250 crowns", True),
        ("Crake", "", False),
    ],
)
def test_an_answer_is_correct_where_it_holds_the_gold_words(
    gold: str, text: str, right: bool
) -> None:
    answer = demo.Answer(text, (), 1.0, a_report("full", False))
    assert (
        demo.Outcome(question=demo.Question("?", gold), answers={"full": answer}).correct("full")
        is right
    )


# ---- environment ---------------------------------------------------------------------------------


def test_the_users_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    assert cli.main(["check", str(tmp_path)]) == 0
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_nothing_but_the_object_reaches_stdout(
    fake: type[FakeBlend], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def chatty(self: FakeBlend) -> FakeBlend:
        sys.stdout.write("python chatter\n")
        os.write(1, b"native chatter\n")
        return self

    monkeypatch.setattr(fake, "__enter__", chatty)
    assert cli.main(["check", "org/model", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["passed"]
    assert "python chatter" in captured.err and "native chatter" in captured.err


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["cacheblend", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("cacheblend_rag", run_name="__main__")
    assert not ended.value.code
