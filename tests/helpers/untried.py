"""What no GPU has run yet is refused by all of them. To run it on one for the first time, set
TRY_ON_GPU=1: the engines of that process, and no other, take it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

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


def too_old(what: str) -> str:
    """Why a GPU, whose vLLM is older than 0.32, can't load ``what``; empty if it can."""
    if not torch.cuda.is_available():
        return ""
    import vllm

    is_old = tuple(map(int, vllm.__version__.split(".")[:2])) < (0, 32)
    return f"{what} needs a GPU with vLLM 0.32; this is {vllm.__version__}" if is_old else ""


def lacks_experts() -> str:
    """Why a GPU can't run experts; empty if it can."""
    if not torch.cuda.is_available() or find_spec("vllm._moe_C_stable_libtorch"):
        return ""
    return "needs a GPU machine whose vLLM has its kernels for experts"


def skip_if(why_not: str) -> None:
    """Skip the test where there is a reason."""
    if why_not:
        pytest.skip(why_not)
