"""The thread that does a worker's work on its store."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from cacheblend_rag.engine.base import WORKER_ERROR
from cacheblend_rag.engine.stored import StoreThread
from cacheblend_rag.errors import StoreError


def result_of(error: Exception) -> Any:
    def work() -> None:
        raise error

    thread = StoreThread()
    [number] = thread.start(work).values()
    while not (found := thread.take(number)):
        time.sleep(0.01)
    thread.close()
    return found[0]


def test_a_fault_is_told_and_logged_with_its_place(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM turns it off
    told = result_of(ZeroDivisionError("by nothing"))
    assert told[WORKER_ERROR] == "EngineError" and "by nothing" in told["message"]
    assert "raise error" in caplog.text  # of the traceback, which the caller does not get


def test_what_the_caller_can_mend_is_only_told(caplog: pytest.LogCaptureFixture) -> None:
    assert result_of(StoreError("full"))[WORKER_ERROR] == "StoreError"
    assert caplog.text == ""
