"""What graphs are captured over, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cacheblend_rag.engine import graphs as graphs_module
from cacheblend_rag.engine.graphs import CapturedPass, QuestionGraphs, longest_table
from cacheblend_rag.engine.kernel_executor import KernelCache

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("parts", [1, 4, 16])
@pytest.mark.parametrize("most", [63, 64, 1025, 4096])
def test_the_table_has_room_for_any_request(most: int, parts: int) -> None:
    """A backend may cut the scheduler's blocks into smaller ones: their whole blocks count."""
    size = 16
    block_size = parts * size
    cache: Any = KernelCache.__new__(KernelCache)
    cache._block_size = block_size
    cache._views = [(SimpleNamespace(shape=(9, size, 1, 1)), None)]
    blocks = range(1, -(-most // block_size) + 1)  # as many as the longest request takes
    assert len(cache.table(blocks)) <= longest_table(most, block_size, size)


def test_all_graphs_of_a_pass_are_replayed_whatever_fails_between_them() -> None:
    """Ranks sum in each of them: one that left would leave the others waiting."""
    captured = CapturedPass(None, None, reads_from=2)  # type: ignore[arg-type]
    replayed: list[int] = []
    for number, last in enumerate((1, 5, 9, 13)):
        captured._graphs.append(SimpleNamespace(replay=lambda n=number: replayed.append(n)))  # type: ignore[arg-type, misc]
        captured._last.append(last)
    asked: list[int] = []

    def before(last: int) -> None:
        asked.append(last)
        if last == 5:
            raise MemoryError("of this rank")

    with pytest.raises(MemoryError):
        captured.replay(before)
    assert replayed == [0, 1, 2, 3] and asked == [5]


def test_ranks_agree_before_they_go_through_the_sums_of_a_graph() -> None:
    done: list[str] = []
    graphs: Any = QuestionGraphs.__new__(QuestionGraphs)
    graphs.usable, graphs._contexts = True, [8192]
    graphs._rows, graphs._groups = torch.zeros(6, 256, dtype=torch.int64), 1
    graphs._handle = SimpleNamespace(device=torch.device("cpu"))
    graphs._ranks = SimpleNamespace(alone=False, agree=lambda: done.append("agreed"))
    graphs._scores = {8192: torch.ones(1, 8192)}
    replay = SimpleNamespace(replay=lambda before: done.append("replayed"))
    graphs._captured = lambda key, make: replay
    rows = np.zeros((5, 7), dtype=np.int64)
    score = graphs.ask(rows, None, 40, lambda: None, lambda last: None)
    assert done == ["agreed", "replayed"] and not score.any() and len(score) == 40


@pytest.mark.parametrize(
    ("factor", "is_right"), [(1.0, True), (1.01, True), (1.05, False), (float("nan"), False)]
)
def test_a_graph_whose_scores_differ_is_told(
    factor: float, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: Any = QuestionGraphs.__new__(QuestionGraphs)
    graphs._groups, graphs._longest = 2, 40
    graphs._view = lambda *given: SimpleNamespace(k_BSGD=torch.zeros(1, 16, 2, 4))
    graphs._handle = SimpleNamespace(device=torch.device("cpu"), run=lambda step, *rows: step())
    graphs._ranks = SimpleNamespace(all_or_none=lambda work: work())
    truth = torch.rand(2, 16)
    monkeypatch.setattr(
        graphs_module,
        "question_pass",
        lambda handle, view, rows, known, score, layers: lambda: score.copy_(truth),
    )
    graphs.ask = lambda *given: torch.cat([truth.sum(0) * factor, torch.ones(8)])
    assert graphs._is_right(None, 24, 32) is is_right
