"""The worker's side of blends without an engine: what fails costs its own request, on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_rag.engine.blend import Choice, Positions
from cacheblend_rag.engine.outcome import BlendTask
from cacheblend_rag.engine.rows import StepRows
from cacheblend_rag.plan import Plan, Segment

pytestmark = pytest.mark.vllm
CPU, BLOCK, LAYERS = torch.device("cpu"), 4, 2
PROMPT = 24  # tokens


def task_of(name: str, *, rows: int = 8, blocks: int = 6) -> BlendTask:
    plan = Plan(
        segments=(Segment(0, 20, "a" * 64),),
        question_start=20,
        ratio=0.5,
        selector="query",
        selector_options={},
    )
    return BlendTask(
        name, name, tuple(range(PROMPT)), (), plan, tuple(range(1, blocks + 1)), 0, rows, rows
    )


class Executor:
    """Stands where a request's executor does, and writes down what it is asked for."""

    def __init__(self, said: list[str], fails: str = "") -> None:
        self._said, self._fails = said, fails
        self.ids_E = torch.arange(PROMPT)

    def _say(self, word: str) -> None:
        self._said.append(word)
        if word == self._fails:
            raise MemoryError(f"no memory on purpose to {word}")

    def open(self, *args: Any) -> None:
        self._say("open")

    def resume(self) -> None:
        self._say("resume")

    def place(self, layers: range) -> None:
        self._say("place")

    def place_layer(self, index: int) -> None:
        self._say("place_layer")

    def recompute(self, tile: torch.Tensor) -> None:
        self._say("recompute")

    def propagator(self, tile: torch.Tensor) -> None:
        return None

    def give_up(self) -> None:
        self._say("give_up")


class Blender:
    """Chooses every second token, and a ``spare`` number more than there are rows."""

    def __init__(self, said: list[str], spare: int = 0, fails: str = "") -> None:
        self._said, self._spare, self._fails = said, spare, fails

    def choose(self, task: BlendTask, outcome: Any) -> Choice:
        self._said.append("choose")
        chosen = torch.arange(PROMPT - task.rows - self._spare, PROMPT)
        executor: Any = Executor(self._said, self._fails)
        return Choice(executor, Positions(chosen))

    def recompute(self, executor: Any, positions: torch.Tensor) -> None:
        executor.recompute(positions)


def rows_of(**tensors: Any) -> StepRows:
    alone = SimpleNamespace(
        all_or_none=lambda work: work(), any=lambda flags: flags, agree=lambda **_: None
    )
    adapters = SimpleNamespace(using=lambda adapter: torch.inference_mode())
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    handle: Any = SimpleNamespace(
        device=CPU, num_layers=LAYERS, config=config, ranks=alone, adapters=adapters
    )
    cache: Any = SimpleNamespace(block_size=BLOCK, handle=handle)
    return StepRows(handle, cache, SimpleNamespace(zeroes_blocks=False, **tensors))  # type: ignore[arg-type]


@pytest.mark.parametrize("zeroes", [False, True])
def test_nothing_is_begun_in_blocks_that_are_yet_to_be_zeroed(zeroes: bool) -> None:
    rows, said = rows_of(), list[str]()
    rows._tensors.zeroes_blocks = zeroes  # type: ignore[misc]
    rows.blender = Blender(said, spare=4)  # type: ignore[assignment]
    rows.begin_ahead(task_of("a"))
    assert said == ([] if zeroes else ["choose", "open", "recompute", "place"])
    rows._begin(task_of("a"))
    assert said == ["choose", "open", "recompute", "place"], "once, at the latest with the step"
