"""Models that take images blend prompts of text as the models of their text parts do."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import untried
from image_models import FAILED, STAND_INS
from renamed import RENAMED
from tiny import SEEING, TEXT_OF

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.anywhere]

HELPERS = STAND_INS.parent
WITH_EXPERTS = {"glm4v_moe", "qwen3_vl_moe", "llama4"}
RENAMED_SEEING = [name for name, model in RENAMED.items() if model.sees]
# as a GPU's user gets them
COMPILED = [f"{name} compiled" for name in (*SEEING, "gemma3", "internvl")]
# each group in a process of its own
GROUPS = [[*SEEING, *TEXT_OF], RENAMED_SEEING]
if torch.cuda.is_available():  # where a process for each costs little beside others
    GROUPS = [[name] for group in [*GROUPS, COMPILED] for name in group]


Errors = Mapping[str, str]


@pytest.fixture(scope="module")
def errors_of(tiny_models: Path) -> Callable[[tuple[str, ...]], Errors]:
    """Of each model of a group, how far it is off at ratio 1; what else is compared fails there."""

    @functools.cache
    def measured(group: tuple[str, ...]) -> Errors:
        paths = [str(HELPERS), *filter(None, [os.getenv("PYTHONPATH")])]
        if importlib.util.find_spec("torchvision") is None:
            paths.append(str(STAND_INS))  # for the processes that vLLM starts, too
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [
            sys.executable,
            str(HELPERS / "image_models.py"),
            str(tiny_models),
            *group,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found: Errors = json.loads(done.stdout.splitlines()[-1])
        return found

    return measured


def why_not_on_this_gpu(name: str) -> str:
    """Why a GPU can't load it; empty if it can. On a CPU, nothing is skipped."""
    if name in WITH_EXPERTS:
        return untried.lacks_experts()
    is_new = name in RENAMED_SEEING or name == "mistral3"
    return untried.too_old(name) if is_new else ""


@pytest.mark.parametrize(
    ("group", "name"),
    [pytest.param(tuple(group), name, id=name) for group in GROUPS for name in group],
)
def test_text_blends(
    group: tuple[str, ...],
    name: str,
    errors_of: Callable[[tuple[str, ...]], Errors],
    record_property: Callable[[str, object], None],
) -> None:
    untried.skip_if(why_not_on_this_gpu(name))
    error = errors_of(group)[name]
    assert not error.startswith(FAILED), error
    record_property("ratio 1", error)
