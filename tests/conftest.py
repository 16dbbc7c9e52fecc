"""Environment of all tests: no network, a small CPU KV cache."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread a process: tiny models gain nothing from more, those wait for one another on busy
# cores, and `make test` has a process for each of two. PyTorch reads them when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
import torch

# float32 means float32: vLLM's own Triton attention would multiply in TF32
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    """What no GPU has run is taken in this process, if it is to be tried."""
    import untried

    untried.lift()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, tests of what is to hold anywhere are tests of the GPU."""
    if torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("anywhere"):
                item.add_marker("gpu")


# Skips that say what a machine lacks, not what an installation does. With NO_SKIPS, which
# continuous integration sets, any other is a failure: it would hide that a test no longer runs.
_MAY_SKIP = (
    "needs a GPU",
    "Triton",
    "mount command",
    "file system may be mounted",
    "no Chromium",
    "no Node",
    "no curl",
    "dependency group clients",
)


def _as_failure(report: Any) -> None:
    if report.skipped and os.environ.get("NO_SKIPS"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        place = str(report.longrepr[0]) if isinstance(report.longrepr, tuple) else ""
        theirs = "site-packages" in place  # a standard suite's own choice
        if not theirs and not any(words in reason for words in _MAY_SKIP):
            report.outcome, report.longrepr = "failed", f"NO_SKIPS: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _as_failure(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _as_failure(report)
    return report


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The folder of the embedded model, made where it is not there yet."""
    from cacheblend_rag.errors import ModelError
    from cacheblend_rag.models import embedded_model

    try:
        return embedded_model(progress=False)
    except ModelError as error:
        pytest.skip(f"the embedded model can't be had here: {error}")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny models are made, each once a session."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine in the test's own process: quicker to start, and its inside can be looked at."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests counted and measured (``user_properties``), for who reads the log."""
    reports = [
        report
        for report in terminalreporter.getreports("passed")
        if report.when == "call" and report.user_properties
    ]
    if reports:
        terminalreporter.section("counts")
    for report in reports:
        counts = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        terminalreporter.line(f"{report.nodeid.rpartition('/')[2]}: {counts}")
