"""What happens where a block fails: something is undone, or it is logged and others go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
