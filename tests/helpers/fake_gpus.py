"""Engines of ``benchmarks/two_gpus.py`` that measure nothing, in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import two_gpus


class FakeEngine:
    """Chooses, answers and takes as long as a perfect one."""

    def __init__(self, name: str, args: Any) -> None:
        self._name, self._args = name, args

    @classmethod
    @contextmanager
    def opened(cls, name: str, weights: Any, args: Any) -> Iterator[FakeEngine]:
        assert (weights / "model.safetensors.index.json").is_file()
        yield cls(name, args)

    def about(self) -> str:
        return f"sees {os.environ['CUDA_VISIBLE_DEVICES']}"

    def ingest(self) -> None:
        if self._name == self._args.attention_backend:  # an option that is of no use here
            raise MemoryError("no memory on purpose")

    def answers(self) -> list[two_gpus.Row]:
        chosen = [*range(10), 20 if self._name == "2" else 10]
        full = {5: -0.5, 6: -2.0 - 0.01 * (self._name == "2")}
        return [two_gpus.Row(chosen, 10, full, {5: -0.5, 6: -2.0}, {5: -0.6, 6: -2.0})] * 2

    def ttft(self) -> dict[str, dict[str, list[float]]]:
        speed = len(two_gpus.ENGINES[self._name])
        return {"6 x 9": {"full": [1.0 / speed] * 3, "blend": [0.5 / speed] * 3}}

    def warm_up(self) -> None:
        pass

    def load(self, mode: str, at: float) -> tuple[int, float]:
        return 30, float(mode == "blend")


def serve(*given: Any) -> None:
    """``two_gpus.serve`` with such an engine."""
    two_gpus.Engine = FakeEngine  # type: ignore[attr-defined,misc]
    two_gpus.serve(*given)
