"""The command line over a real engine, the embedded model and the demo's documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag import CacheBlend, cli, demo

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

# two threads that wait for each other cost more than they save on a busy machine
THREADS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def model(embedded: Path) -> Path:
    return embedded


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def one_engine(model: Path, home: Path) -> Iterator[None]:
    """All commands of this module share the engine that the first one starts, and its store."""
    for package in cli.engine.EXTRAS:
        pytest.importorskip(package)
    started: list[CacheBlend] = []

    class Shared:
        def __init__(self, *args: Any, **options: Any) -> None:
            if not started:
                # many CPUs take twice as long for bfloat16, which test_tokens.py has
                started.append(CacheBlend(*args, **{"dtype": "float32", **options}))

        def __enter__(self) -> CacheBlend:
            return started[0]

        def __exit__(self, *_: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (cli.output.ENVIRONMENT | THREADS).items():
            patch.setenv(name, os.environ.get(name, value))  # as the command, and undone
        patch.setenv("CACHEBLEND_HOME", str(home))
        patch.setattr(cli.engine, "CacheBlend", Shared)
        patch.setattr(cli.engine, "resolve_model", lambda name: name or str(model))
        yield
    for blend in started:
        blend.close()


@pytest.fixture
def run(
    one_engine: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run a command that ends well; what it prints as JSON."""
    monkeypatch.chdir("/")  # it works from any folder

    def command(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert cli.main([*arguments, "--json"]) == 0
        data: dict[str, Any] = json.loads(capsys.readouterr().out)
        return data

    return command


@pytest.mark.slow
def test_ingest_then_ask_then_stats(run: Run, home: Path) -> None:
    documents = str(demo.data_folder())
    first = run("ingest", documents)
    report = first["report"]
    assert report["computed"] == report["chunks"] == first["passages"] > 20
    second = run("ingest", documents)["report"]
    assert (second["computed"], second["present"]) == (0, report["chunks"])

    answer = run("ask", "What was the first ship of the line called?", "--max-tokens", "8")
    served = answer["report"]
    assert answer["answer"].strip() and len(answer["passages"]) == 6
    assert served["blended"] and served["tokens_reused"] > served["tokens_total"] / 2
    assert served["ttft_s"] > 0 and served["stages_s"]["select"] > 0
    exact = run("ask", "Who is the shopkeeper of Venn?", "--mode", "full", "--max-tokens", "1")
    assert exact["report"]["tokens_fresh"] == exact["report"]["tokens_total"]

    held = run("stats")
    assert held["passages"] == report["computed"]
    assert held["total"]["chunks"] == report["computed"] + 1  # the head of chat prompts
    assert held["total"]["tokens"] > report["tokens"]
    assert held["total"]["bytes"] > report["bytes"]
    assert len(held["namespaces"]) == 1


def test_demo(run: Run) -> None:
    data = run("demo", "--questions", "1")
    assert set(data) == {"model", "versions", "block_size", "ingest", "questions", "summary"}
    [question] = data["questions"]
    assert set(question) == {"question", "gold", "order", "answers", "speedup"}
    assert question["answers"]["full"]["correct"]  # by whom the questions were chosen
    assert question["answers"]["blend"]["blended"] and question["answers"]["reuse"]["blended"]
    assert not question["answers"]["full"]["blended"]
    summary = data["summary"]
    assert set(summary["ttft_median_s"]) == {"full", "reuse", "blend"}
    assert all(seconds > 0 for seconds in summary["ttft_median_s"].values())
    assert {"cacheblend_rag", "vllm", "torch", "cpu", "dtype"} <= set(data["versions"])


@pytest.mark.slow
def test_check_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    """From the shell: the exit code, a silent stderr, and nothing but the object on stdout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    environment |= {"CACHEBLEND_HOME": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1", **THREADS}
    command = [sys.executable, "-m", "cacheblend_rag", "check", str(model), "--json"]
    ended = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    data = json.loads(ended.stdout)
    assert data["passed"] and {row["layer"] for row in data["layers"]} == set(range(30))
    assert "passed" in ended.stderr
    for noise in ("WARNING", "Warning", "Triton", "Loading"):
        assert noise not in ended.stderr
