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
import untried
from image_models import FAILED, STAND_INS
from renamed import RENAMED
from tiny import SEEING, TEXT_OF

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.anywhere]

HELPERS = STAND_INS.parent
# each group in a process of its own
GROUPS = {
    "own": [*SEEING, *TEXT_OF],
    "renamed": [name for name, model in RENAMED.items() if model.sees],
}


Errors = Mapping[str, str]


@pytest.fixture(scope="module")
def errors_of(tiny_models: Path) -> Callable[[str], Errors]:
    """Of each model of a group, how far it is off at ratio 1; what else is compared fails there."""

    @functools.cache
    def measured(group: str) -> Errors:
        paths = [str(HELPERS), *filter(None, [os.getenv("PYTHONPATH")])]
        if importlib.util.find_spec("torchvision") is None:
            paths.append(str(STAND_INS))  # for the processes that vLLM starts, too
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [
            sys.executable,
            str(HELPERS / "image_models.py"),
            str(tiny_models),
            *GROUPS[group],
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found: Errors = json.loads(done.stdout.splitlines()[-1])
        return found

    return measured


@pytest.mark.parametrize(
    ("group", "name"),
    [pytest.param(group, name, id=name) for group, names in GROUPS.items() for name in names],
)
def test_text_blends(
    group: str,
    name: str,
    errors_of: Callable[[str], Errors],
    record_property: Callable[[str, object], None],
) -> None:
    untried.skip("images_v2")
    error = errors_of(group)[name]
    assert not error.startswith(FAILED), error
    record_property("ratio 1", error)
