"""What happens where a block fails: something is undone, or it is logged and others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def on_failure(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` where the block is left by any exception, an interrupt too; it is raised on."""
    try:
        yield
    except BaseException:
        undo()
        raise


@contextmanager
def logging_failures(logger: logging.Logger, message: str, *args: object) -> Iterator[None]:
    """Log an error of the block in full and go on behind it: for what no answer depends on."""
    try:
        yield
    except Exception:
        logger.exception(message, *args)


def try_all(work: Callable[[Item], object], items: Iterable[Item], error: type[Exception]) -> None:
    """Do ``work`` for every item, also behind one for which it raises ``error``; the first of these
    is raised when all were tried.
    """
    first: Exception | None = None
    for item in items:
        try:
            work(item)
        except error as failure:
            first = first or failure
    if first is not None:
        raise first
