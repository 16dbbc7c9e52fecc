"""What is done where a block fails."""

from __future__ import annotations

import logging

import pytest

from cacheblend_rag.undo import logging_failures, on_failure

logger = logging.getLogger("cacheblend_rag.test")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_a_failure_is_undone_and_raised_on(kind: type[BaseException]) -> None:
    done: list[str] = []
    error = kind("it failed")
    with pytest.raises(kind) as caught, on_failure(lambda: done.append("undone")):
        raise error
    assert caught.value is error
    assert done == ["undone"]


def test_nothing_is_undone_where_nothing_fails() -> None:
    def begun() -> int:
        with on_failure(pytest.fail):
            return 3

    assert begun() == 3


def test_a_failure_to_undo_names_what_came_before() -> None:
    def fails() -> None:
        raise OSError("can't be undone")

    with pytest.raises(OSError, match="undone") as caught, on_failure(fails):
        raise ValueError("the cause")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_logged_failure_is_seen_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    with logging_failures(logger, "%s was left out", "a prompt"):
        raise ValueError("half a character")
    [record] = caplog.records
    assert record.getMessage() == "a prompt was left out"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


def test_an_interrupt_is_not_logged_away() -> None:
    with pytest.raises(KeyboardInterrupt), logging_failures(logger, "never"):
        raise KeyboardInterrupt
