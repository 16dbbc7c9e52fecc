"""The worker's side of blends without an engine: what fails costs its own request, on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from threading import Barrier
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from vllm.forward_context import override_forward_context

from cacheblend_rag.engine.blend import Choice, Positions
from cacheblend_rag.engine.blends import Scheduled
from cacheblend_rag.engine.outcome import BlendTask
from cacheblend_rag.engine.ranks import PeerError, Ranks
from cacheblend_rag.engine.rows import StepRows
from cacheblend_rag.plan import Plan, Segment
from cacheblend_rag.reason import Reason

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

    def __init__(self, said: list[str], fails: str = "", ranks: Ranks | None = None) -> None:
        self._said, self._fails, self._ranks = said, fails, ranks
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
        if self._ranks is not None:
            self._ranks.agree()  # as a forward of ours does

    def propagator(self, tile: torch.Tensor) -> None:
        return None

    def give_up(self) -> None:
        self._say("give_up")


class Blender:
    """Chooses the last tokens, ``spare`` more than there are rows.

    Args:
        said: what executors are asked for; fails: what each request's executor can't do.
    """

    def __init__(
        self,
        said: list[str],
        spare: int = 0,
        fails: Mapping[str, str] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._said, self._spare, self._fails, self._ranks = said, spare, fails or {}, ranks

    def choose(self, task: BlendTask, outcome: Any) -> Choice:
        self._said.append("choose")
        chosen = torch.arange(PROMPT - task.rows - self._spare, PROMPT)
        executor: Any = Executor(self._said, self._fails.get(task.name, ""), self._ranks)
        return Choice(executor, Positions(chosen))

    def recompute(self, executor: Any, positions: torch.Tensor) -> None:
        executor.recompute(positions)


class Tensors:
    """Stands where vLLM's step is."""

    zeroes_blocks = False

    def order(self, counts: Mapping[str, int]) -> list[str]:
        return list(counts)

    def table(self, count: int) -> torch.Tensor:
        return torch.zeros(count, 1)

    def positions(self, count: int) -> torch.Tensor:
        return torch.zeros(count)

    def write(self, place: slice, number: int, ids: torch.Tensor, *args: Any) -> None:
        torch.zeros(PROMPT * 4)[place] = ids.float()  # as many as there are rows

    def write_nothing(self, rows: slice) -> None:
        pass


class Voices:
    """Between two ranks: each vote takes one flag after another from both."""

    def __init__(self) -> None:
        self._barrier = Barrier(2, timeout=10)
        self._flags: list[Sequence[bool]] = [[], []]

    def any(self, rank: int, flags: Sequence[bool]) -> list[bool]:
        self._flags[rank] = flags
        self._barrier.wait()
        both = list(zip(*self._flags, strict=True))
        self._barrier.wait()
        return [any(flags) for flags in both]


class TwoRanks(Ranks):
    """A rank in a thread of its own. It fails where it would wait for the other in vain.

    Attributes:
        votes: how many flags each vote was on.
    """

    def __init__(self, voices: Voices, number: int) -> None:
        self.alone, self.number, self.votes = False, number, list[int]()
        self._voices = voices

    def _any(self, flags: Sequence[bool]) -> list[bool]:
        self.votes.append(len(flags))
        return self._voices.any(self.number, flags)


_T = TypeVar("_T")


def on_two_ranks(work: Callable[[TwoRanks], _T]) -> list[_T]:
    """What it returns on each; all have cast the same votes."""
    voices = Voices()
    ranks = [TwoRanks(voices, number) for number in range(2)]
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(work, ranks))
    assert ranks[0].votes == ranks[1].votes
    return results


def rows_of(ranks: Any = None) -> StepRows:
    alone = SimpleNamespace(
        all_or_none=lambda work: work(), any=lambda flags: flags, agree=lambda **_: None
    )
    adapters = SimpleNamespace(using=lambda adapter: torch.inference_mode())
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    handle: Any = SimpleNamespace(
        device=CPU,
        num_layers=LAYERS,
        config=config,
        ranks=ranks or alone,
        adapters=adapters,
        attention={},
    )
    cache: Any = SimpleNamespace(block_size=BLOCK, handle=handle, build=lambda *args: {})
    return StepRows(handle, cache, Tensors())  # type: ignore[arg-type]


def no_graph() -> AbstractContextManager[None]:
    """Steps within are no whole graphs. For all threads: vLLM keeps it in a global variable."""
    context: Any = SimpleNamespace(
        cudagraph_runtime_mode=None, no_compile_layers={}, slot_mapping={"layer": torch.zeros(1)}
    )
    within: AbstractContextManager[None] = override_forward_context(context)
    return within


def begin_step(rows: StepRows, tasks: Sequence[BlendTask], batch: Mapping[str, Scheduled]) -> None:
    rows.begin_step({task.name: task for task in tasks}, batch)


@pytest.mark.parametrize("zeroes", [False, True])
def test_nothing_is_begun_in_blocks_that_are_yet_to_be_zeroed(
    zeroes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, said = rows_of(), list[str]()
    monkeypatch.setattr(Tensors, "zeroes_blocks", zeroes)
    rows.blender = Blender(said, spare=4)  # type: ignore[assignment]
    rows.begin_ahead(task_of("a"))
    assert said == ([] if zeroes else ["choose", "open", "recompute", "place"])
    rows._begin(task_of("a"))
    assert said == ["choose", "open", "recompute", "place"], "once, at the latest with the step"


def test_blends_that_are_lost_together_end_with_their_last_rows() -> None:
    """Those that go on as plain requests would else be taken for blends in a later step, and have
    its blends lost with them.
    """
    rows = rows_of()
    rows.blender = Blender([], fails={"a": "open"})  # type: ignore[assignment]
    a, b, c = (task_of(name, rows=PROMPT) for name in "abc")
    with no_graph():
        begin_step(rows, [a, b], {name: Scheduled(0, PROMPT) for name in "ab"})
    assert [(f.name, f.why_not is None) for f in rows.finished()] == [("a", False), ("b", False)]
    with no_graph():
        begin_step(rows, [c], {"b": Scheduled(PROMPT, 1), "c": Scheduled(0, PROMPT)})
    assert [(f.name, f.why_not) for f in rows.finished()] == [("c", None)]
    assert not rows.lost()


@pytest.mark.parametrize("fails", ["open", "peer", "fewer"])
def test_who_can_not_be_blended_gives_its_transfer_up(fails: str) -> None:
    """Its chunks would stay half filled in GPU memory, and be brought anew for each request."""

    def refuses(work: Callable[[], Any]) -> Any:
        work()
        raise PeerError("another rank failed on purpose")

    rows, said = rows_of(), list[str]()
    if fails == "peer":
        rows.handle.ranks.all_or_none = refuses  # type: ignore[method-assign]
    spare = -1 if fails == "fewer" else 0
    rows.blender = Blender(said, spare, {"a": fails})  # type: ignore[assignment]
    with no_graph():
        begin_step(rows, [task_of("a", rows=PROMPT)], {"a": Scheduled(0, PROMPT)})
    assert said.count("give_up") == 1 and said[-1] == "give_up"
    (done,) = rows.finished()
    assert done.why_not is not None


ERRORS = [
    ([1e-6, 1e-6], "holds"),
    ([1e-6, 1.0], "differs"),
    ([float("nan"), 1e-6], "differs"),
    ([1e-6, MemoryError("on purpose")], "lost"),
    ([1.0, "lost"], "lost"),
    ([None, None], "unknown"),
    ([1e-6, None], "unknown"),
]


@pytest.mark.parametrize(("errors", "what"), ERRORS)
def test_all_ranks_vote_on_each_proof_that_was_begun(errors: list[Any], what: str) -> None:
    """One may have lost the blend, or know nothing of it, alone: the others would wait for it."""

    def judge(ranks: TwoRanks) -> tuple[bool, list[Any]]:
        rows, error, said = rows_of(ranks), errors[ranks.number], list[Any]()
        rows.blender = Blender([])  # type: ignore[assignment]
        rows._cache.slots = lambda *args: torch.zeros(0)  # type: ignore[method-assign]
        rows.proved = said.append
        begin_step(rows, [task_of("a")], {"a": Scheduled(PROMPT - 8, 8)})
        (blend,) = rows._finished
        blend.proof = SimpleNamespace(error=lambda: measured(error))  # type: ignore[assignment]
        if error == "lost":
            rows._lose(blend, "on purpose")
        rows.prove()
        return bool(rows.lost()), [said and said[0] and said[0].reason]

    expected = {
        "holds": [(False, [None])] * 2,
        "differs": [(True, [Reason.ROWS_DIFFER])] * 2,
        "lost": [(False, [[]]), (True, [[]])],  # told once: the blocks may be another's by now
        "unknown": [(False, [[]])] * 2,
    }
    with no_graph():
        assert on_two_ranks(judge) == expected[what]


def test_a_blend_that_was_lost_is_not_placed_again() -> None:
    """A step that is one graph follows one whose rows were computed exactly."""
    rows = rows_of()
    rows.blender = Blender([])  # type: ignore[assignment]
    written = list[slice]()
    rows._tensors.write_nothing = written.append  # type: ignore[method-assign]
    with no_graph():
        begin_step(rows, [task_of("a", rows=PROMPT)], {"a": Scheduled(0, PROMPT - 1)})
    (blend,) = rows._blends.values()
    rows._lose(blend, "in a layer of that step")
    placed = list[range]()
    blend.executor.place = placed.append  # type: ignore[union-attr, method-assign]
    begin_step(rows, [], {"a": Scheduled(PROMPT - 1, 1)})
    assert not placed and not written
    [done] = rows.finished()
    assert done.why_not is not None and "in a layer" in done.why_not.detail


def measured(error: Any) -> Any:
    if isinstance(error, Exception):
        raise error
    return 1.0 if error == "lost" else error


class Together(Tensors):
    """So it does to embed."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def write(self, place: slice, *args: Any) -> None:
        self._ranks.agree()


@pytest.mark.parametrize("is_graph", [True, False])
@pytest.mark.parametrize("fails", ["open", "recompute", "place"])
def test_who_fails_alone_in_a_step_leaves_no_rank_waiting(fails: str, is_graph: bool) -> None:
    def step(ranks: TwoRanks) -> list[tuple[str, bool]]:
        rows = rows_of(ranks)
        rows._tensors = Together(ranks)  # type: ignore[assignment]
        blender = Blender([], fails={"a": fails} if ranks.number else {}, ranks=ranks)
        rows.blender = blender  # type: ignore[assignment]
        tasks = [task_of(name, rows=PROMPT) for name in "ab"]
        batch = {name: Scheduled(0, PROMPT) for name in "ab"}
        begin_step(rows, tasks, batch)
        return [(done.name, done.why_not is None) for done in rows.finished()]

    there = not is_graph and fails != "open"  # other steps neither compute nor place before
    expected = [("a", there), ("b", is_graph or there)]
    with contextlib.nullcontext() if is_graph else no_graph():
        assert on_two_ranks(step) == [expected] * 2
