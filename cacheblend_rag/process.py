"""The process that an engine was started in: a fork takes its threads along in name only."""

from __future__ import annotations

import os

from cacheblend_rag.errors import EngineError


class Home:
    """The process that makes this object."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process, and no child that was forked from it."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Refuse any other process.

        Raises:
            EngineError: this is one.
        """
        if not self.is_here:
            raise EngineError(
                "this engine was started before this process was forked, and runs for the parent "
                "only. Start it in each worker after the fork (gunicorn: without --preload; "
                "Celery: in worker_process_init, or with --pool threads), or make processes with "
                "multiprocessing.get_context('spawn')"
            )
