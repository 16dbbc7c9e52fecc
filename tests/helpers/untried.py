"""What no GPU has run yet is refused by all of them. To run it on one for the first time, set
TRY_ON_GPU=1: the engines of that process, and no other, take it.
"""

from __future__ import annotations

import os

import pytest
import torch

from cacheblend_rag.engine import compat

TRIED = bool(os.environ.get("TRY_ON_GPU"))


def lift() -> None:
    """Take it all from here on, if the environment says so."""
    if TRIED:
        compat.NOT_RUN_ON_A_GPU = frozenset()


def skip(kind: str) -> None:
    """Skip the test where a GPU refuses what it is about."""
    if torch.cuda.is_available() and not compat.was_run(kind):
        pytest.skip(f"{kind} is refused where it needs a GPU")
