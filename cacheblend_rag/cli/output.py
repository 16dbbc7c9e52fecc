"""What other code prints: kept quiet, and off stdout where that is to carry one JSON object."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

# Defaults of this command; what the user's environment sets wins.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler in this process: a quicker start
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def quieten() -> None:
    """Keep vLLM's own chatter out of the way; whoever sets its variables gets to see it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # until vLLM sets up its logging, Python would print its warnings
    level = logging.getLevelNamesMapping().get(os.environ["VLLM_LOGGING_LEVEL"].upper())
    logging.getLogger("vllm").setLevel(level or logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


@contextlib.contextmanager
def nothing_else_on_stdout(wanted: bool) -> Iterator[None]:
    """Send to stderr what anyone writes to stdout, C libraries and child processes included."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    with descriptor(1, 2), contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def descriptor(number: int, target: int) -> Iterator[None]:
    """Let a file descriptor lead to ``target`` for a while."""
    kept = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
