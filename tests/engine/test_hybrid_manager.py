"""vLLM's hybrid KV cache manager on: layers with a window keep the last window only, in blocks of
their own, and blends are what they are without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import untried
from blending import (
    GLUE,
    PARTS,
    PREFIX,
    PROMPT,
    QUESTION,
    A,
    C,
    agree,
    blends_as_the_reference,
    forget_prompts,
)
from engines import (
    EXACT,
    FULL_LOGPROBS,
    logprobs,
    planner,
    selected,
    start_in_process,
)
from reference import Part, Reference
from tiny import Words, make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import BlendResult, CacheBlend, EngineError
from cacheblend_rag.config import PROPAGATION_LENGTH
from cacheblend_rag.engine import compat
from cacheblend_rag.engine.groups import GroupedBlends
from cacheblend_rag.engine.outcome import BlendTask
from cacheblend_rag.engine.scratch import PromptForward, Scratch
from cacheblend_rag.reason import Reason

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]

BLOCK, WINDOW = 32, 64
ON: dict[str, Any] = {"disable_hybrid_kv_cache_manager": False, "block_size": BLOCK}
words = Words(41)
SYSTEM = words(3 * BLOCK)  # no chunk
LATER = (*SYSTEM, *C, *GLUE, *A, *QUESTION)


@pytest.fixture(scope="module", params=["gpt_oss", "gemma3"])
def family(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[Family]:
    untried.skip("kv_groups")
    path = make(request.param, tiny_models)
    reference = Reference(path, PREFIX)
    # Fewer tokens a step than the prompt has: so at ratio 1 it takes two forwards of ours.
    with start_in_process(path, prefix=PREFIX, max_num_batched_tokens=256, **ON) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        blend.ingest([p.ids for p in PARTS if p.stored], progress=False)
        yield Family(blend, reference)


class Family(NamedTuple):
    """An engine that has stored the chunks, and the reference over the same weights."""

    blend: CacheBlend
    reference: Reference


@pytest.fixture
def blend(family: Family) -> CacheBlend:
    return family.blend


@pytest.fixture(autouse=True)
def nothing_cached(family: Family) -> Iterator[None]:
    """Nothing is answered from an earlier test's blocks, and no test writes the null block."""
    forget_prompts(family.blend)
    layers = blends().handle.layers
    hold(1e3)
    before = [layer.kv_cache[0].clone() for layer in layers]
    yield
    assert all(torch.equal(layer.kv_cache[0], b) for layer, b in zip(layers, before, strict=True))


def blends() -> GroupedBlends:
    rows = get_kv_transfer_group().rows  # type: ignore[attr-defined]
    assert isinstance(rows, GroupedBlends)
    return rows


def hold(value: float) -> None:
    """Have all blocks hold KV that is no model's: an engine on a CPU starts with zeros."""
    for layer in blends().handle.layers:
        layer.kv_cache[1:].fill_(value)


def scheduler(blend: CacheBlend) -> Any:
    core: Any = blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    return core.scheduler


def same(one: BlendResult, other: BlendResult) -> None:
    assert one.token_ids == other.token_ids
    torch.testing.assert_close(logprobs(one), logprobs(other), atol=EXACT, rtol=0)


def spy(monkeypatch: pytest.MonkeyPatch, note: Callable[[BlendTask], object]) -> None:
    run = GroupedBlends._run

    def noting(self: GroupedBlends, task: BlendTask) -> None:
        note(task)
        run(self, task)

    monkeypatch.setattr(GroupedBlends, "_run", noting)


def test_blends_are_those_of_one_group(family: Family) -> None:
    blends_as_the_reference(*family)


def agrees(
    family: Family, parts: list[Part], *, exact: int = 0, least: int = 0, **options: Any
) -> None:
    """A blend is what the reference says, which computes the ``exact`` first tokens; its first row
    is at ``least``, or behind. The parts end on a block, or are exact.
    """
    blend, reference = family
    ids = tuple(t for part in parts for t in part.ids)
    result = blend.generate((*ids, *QUESTION), **options, **FULL_LOGPROBS)
    assert result.report.blended, result.report.detail
    rows = selected(blend, result)
    assert all(at >= least for at in rows)
    rows = sorted({*range(exact), *rows})
    agree(result, reference.blend(parts, QUESTION, rows, 4, PROPAGATION_LENGTH))


@pytest.mark.parametrize("options", [{"mode": "reuse"}, {"recompute_ratio": 0.1}], ids=str)
def test_a_prompt_whose_first_tokens_are_stored(family: Family, options: dict[str, Any]) -> None:
    parts = [Part(C, True), Part(words(25), False), Part(A, True)]
    agrees(family, parts, least=0 if "mode" not in options else len(C), **options)


@pytest.mark.parametrize("head", [PREFIX, words(59)], ids=["ingest_prefix", "other"])
def test_behind_a_stored_prompt_prefix(
    family: Family, monkeypatch: pytest.MonkeyPatch, head: tuple[int, ...]
) -> None:
    blend = family.blend
    parts = [Part(head, False), Part(A, True)]
    with monkeypatch.context() as patch:
        patch.setattr(blend, "_prompt_prefix_ids", lambda **_: head)
        blend._open_space()
    try:
        if head == PREFIX:  # all of it is exact
            size = len(head) + len(A)
            agrees(family, parts, exact=size, least=size, mode="reuse")
        else:
            agrees(family, parts, exact=len(head), least=len(head), mode="reuse")
            agrees(family, parts, exact=len(head), least=len(head), recompute_ratio=0.1)
    finally:
        blend._open_space()


def test_first_rows_far_behind_a_hit(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the free blocks held before has no part in it."""
    prompt, results = (*C, *GLUE, *A, *QUESTION), []
    tasks: list[BlendTask] = []
    for held in (1e3, -1e3):
        forget_prompts(blend)
        hold(held)
        blend.generate(prompt[: 2 * BLOCK + 1], mode="off", **FULL_LOGPROBS)
        with monkeypatch.context() as patch:
            spy(patch, tasks.append)
            options = {"recompute_ratio": 0.0, "blend_if": "faster", **FULL_LOGPROBS}
            results.append(blend.generate(prompt, **options))
    assert [task.found for task in tasks] == [2 * BLOCK] * 2
    assert all(min(selected(blend, r)) == len(C) > 3 * BLOCK for r in results)
    same(*results)


def test_what_is_kept_is_the_last_window(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[BlendTask] = []
    spy(monkeypatch, tasks.append)
    blend.generate(PROMPT, recompute_ratio=0.3, **FULL_LOGPROBS)
    [task] = tasks
    cache = blends()._scratch.cache
    windows = [compat.sight(layer).window for layer in cache.handle.layers]
    blocks = -(-(len(PROMPT) - 1) // BLOCK)
    kept = [sum(map(bool, task.tables[group])) for group in cache.groups]
    whole = [n for n, window in zip(kept, windows, strict=True) if window is None]
    some = [n for n, window in zip(kept, windows, strict=True) if window == WINDOW]
    assert whole and set(whole) == {blocks}
    assert len(some) == len(kept) - len(whole) and max(some) <= WINDOW // BLOCK + 1
    assert sum(kept) < 0.7 * blocks * len(kept), "of what one group keeps"


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_beside_other_requests(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    options = {"recompute_ratio": ratio, **FULL_LOGPROBS, "max_tokens": 12}
    fixed = Words(5)
    plain = [fixed(20), fixed(500)]  # decodes, and is still prefilled, as blends begin
    prompts = [*plain, PROMPT, LATER]
    apart = []
    for ids in prompts:
        apart.append(blend.generate(ids, **options))
        forget_prompts(blend)
    running: list[int] = []
    spy(monkeypatch, lambda task: running.append(len(scheduler(blend).running)))
    together = blend.generate(prompts, **options)
    assert len(running) == 2 and max(running) >= 2
    for one, other in zip(apart, together, strict=True):
        assert one.report.blended == other.report.blended
        same(one, other)
    if ratio == 1:
        forget_prompts(blend)
        same(blend.generate(PROMPT, **{**options, "mode": "full"}), together[2])


@pytest.mark.parametrize("propagation_length", [0, PROPAGATION_LENGTH])
def test_several_forwards_are_as_one(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, propagation_length: int
) -> None:
    options = {"recompute_ratio": 0.3, "propagation_length": propagation_length, **FULL_LOGPROBS}
    one = blend.generate(PROMPT, **options)
    rows = selected(blend, one)
    forget_prompts(blend)
    # Not those of a block. What moves is known once all that shows it was computed.
    monkeypatch.setattr(blends(), "_most_rows", len(rows) if propagation_length else 50)
    tiles = list[int]()
    run = blends().handle.run
    monkeypatch.setattr(blends().handle, "run", lambda *a: (tiles.append(len(a[2])), run(*a))[1])
    several = blend.generate(PROMPT, **options)
    assert len(rows) > 100 and selected(blend, several) == rows
    assert tiles[-2:] == [len(rows), len(QUESTION) - 1] or not propagation_length
    same(one, several)


def shared(task: BlendTask) -> list[torch.Tensor]:
    """What each layer's blocks hold that vLLM found for a request."""
    cache = blends()._scratch.cache
    numbers = [list(task.tables[group][: task.found // BLOCK]) for group in cache.groups]
    return [
        layer.kv_cache[[n for n in some if n]].clone()
        for layer, some in zip(cache.handle.layers, numbers, strict=True)
    ]


def own(task: BlendTask) -> list[torch.Tensor]:
    """What each layer's blocks hold that are a request's own."""
    cache = blends()._scratch.cache
    numbers = [list(task.tables[group][task.found // BLOCK :]) for group in cache.groups]
    return [
        layer.kv_cache[[n for n in some if n]]
        for layer, some in zip(cache.handle.layers, numbers, strict=True)
    ]


def test_behind_a_hit(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"recompute_ratio": 0.3, **FULL_LOGPROBS}
    alone = blend.generate(LATER, **options)
    forget_prompts(blend)
    blend.generate((*SYSTEM, *words(30)), **FULL_LOGPROBS)
    tasks: list[BlendTask] = []
    spy(monkeypatch, tasks.append)
    behind = blend.generate(LATER, **options)
    [task] = tasks
    assert task.found == len(SYSTEM)
    assert behind.report.blended and behind.report.segments == alone.report.segments
    same(alone, behind)  # what was found was fresh in both


def test_what_vllm_found_is_read_and_stays(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend.generate(PROMPT[: 5 * BLOCK + 1], mode="off", **FULL_LOGPROBS)  # to within a chunk
    tasks: list[BlendTask] = []
    found: list[list[torch.Tensor]] = []
    spy(monkeypatch, lambda task: (tasks.append(task), found.append(shared(task))))
    attend, seen = Scratch.attend, list[int]()

    def compared(self: Scratch, index: int, *args: Any) -> None:
        if compat.sight(self.cache.handle.layers[index]).window is None:
            assert torch.equal(self._kv[1:6], found[0][index]), "it is exact"
            seen.append(index)
        attend(self, index, *args)

    monkeypatch.setattr(Scratch, "attend", compared)
    options = {"recompute_ratio": 0.3, "blend_if": "faster", **FULL_LOGPROBS}
    result = blend.generate(PROMPT, **options)
    assert result.report.blended and seen and tasks[0].found == 5 * BLOCK
    assert min(selected(blend, result)) < 5 * BLOCK
    after = shared(tasks[0])
    assert all(torch.equal(*pair) for pair in zip(found[0], after, strict=True)), "others read it"


def test_what_vllm_has_most_of_is_not_blended(blend: CacheBlend) -> None:
    other = (*PROMPT[: 8 * BLOCK], *A, *QUESTION)  # a chunk behind the hit
    plain = blend.generate(other, mode="full", **FULL_LOGPROBS)
    # where it ends: of a prompt's windows, vLLM's cache keeps the last ones
    blend.generate(PROMPT[: 8 * BLOCK + 1], mode="off", **FULL_LOGPROBS)
    result = blend.generate(other, recompute_ratio=0.3, blend_if="faster", **FULL_LOGPROBS)
    assert result.report.reason is Reason.PREFIX_CACHED
    assert "no fewer tokens" in result.report.detail
    assert result.report.tokens_prefix_cached == 8 * BLOCK
    same(plain, result)


def test_a_plain_request_finds_nothing_of_a_blend(blend: CacheBlend) -> None:
    plain = blend.generate(PROMPT, mode="off", **FULL_LOGPROBS)
    forget_prompts(blend)
    for _ in range(2):  # nor does another blend
        options = {"recompute_ratio": 0.1, "blend_if": "faster", **FULL_LOGPROBS}
        some = blend.generate(PROMPT, **options)
        assert some.report.blended
    same(plain, blend.generate(PROMPT, mode="off", **FULL_LOGPROBS))


@pytest.mark.parametrize("are_kept", [True, False])
def test_a_preempted_blend_answers_as_alone(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, are_kept: bool
) -> None:
    options = {"recompute_ratio": 0.3, **FULL_LOGPROBS, "max_tokens": 12}
    alone = blend.generate(PROMPT, **options)
    forget_prompts(blend)
    engine, numbers, steps = scheduler(blend), list[int](), 0
    spy(monkeypatch, lambda task: numbers.append(task.number))
    schedule = engine.schedule

    def interrupted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 6:
            [request] = engine.running
            assert request.num_output_tokens > 1
            engine.running.clear()
            engine._preempt_request(request, 0.0)
            if not are_kept:
                assert engine.reset_prefix_cache()
        return schedule(*args)

    monkeypatch.setattr(engine, "schedule", interrupted)
    again = blend.generate(PROMPT, **options)
    assert numbers == ([1] if are_kept else [1, 2]) and steps > 6
    same(alone, again)


def test_a_lost_chunk_is_computed_afresh(blend: CacheBlend) -> None:
    plain = blend.generate(PROMPT, mode="full", **FULL_LOGPROBS)
    key, chunk = blend.key(C), C
    for ratio in (1.0, 0.1):
        blends().blender.store.discard(key)  # type: ignore[union-attr]
        planner(blend).known.index(blend._name).add(key, chunk)  # as if nobody had noticed
        forget_prompts(blend)
        result = blend.generate(PROMPT, recompute_ratio=ratio, **FULL_LOGPROBS)
        assert result.report.missing_keys == (key,)
        start = next(s.start for s in result.report.segments if s.kind == "missing")
        assert set(range(start, start + len(chunk))) <= set(selected(blend, result))
        if ratio == 1:
            same(plain, result)
    assert blend.ingest([C], progress=False).computed == 1


def test_one_that_is_aborted_gives_its_blocks_back(blend: CacheBlend) -> None:
    pool = scheduler(blend).kv_cache_manager.block_pool
    asked = blend._prepare(PROMPT, {"recompute_ratio": 0.3, **FULL_LOGPROBS}).request
    engine = blend._engine._llm.llm_engine  # type: ignore[attr-defined]
    for steps in range(3):
        blend._engine._add(engine, f"abandoned-{steps}", asked)  # type: ignore[attr-defined]
        for _ in range(steps):
            engine.step()
        engine.abort_request([f"abandoned-{steps}"])
        assert not pool.get_usage()
    assert blend.generate(PROMPT, mode="reuse", **FULL_LOGPROBS).report.blended


def failing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("layer", [None, 2])
def test_a_failed_blend_is_computed_exactly(
    family: Family, monkeypatch: pytest.MonkeyPatch, layer: int | None
) -> None:
    blend, _ = family
    plain = blend.generate(LATER, mode="full", **FULL_LOGPROBS)
    forget_prompts(blend)
    blend.generate((*SYSTEM, *words(30)), **FULL_LOGPROBS)  # behind a hit, too
    if layer is None:
        monkeypatch.setattr(blends().blender, "choose", failing)
    else:  # in the midst of it, and it leaves rubbish
        compute = PromptForward.compute

        def broken(self: PromptForward, index: int, *args: Any) -> None:
            if index == layer and self._executor is not None:
                self._scratch._kv.fill_(torch.nan)
                failing()
            compute(self, index, *args)

        monkeypatch.setattr(PromptForward, "compute", broken)
    result = blend.generate(LATER, recompute_ratio=0.3, **FULL_LOGPROBS)
    assert result.report.reason is Reason.BLEND_FAILED
    assert f"after {len(SYSTEM)} cached tokens: " in result.report.detail
    assert "broken on purpose" in result.report.detail
    same(plain, result)


def test_what_cannot_be_computed_ends_alone(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = blend.generate(QUESTION, mode="full", **FULL_LOGPROBS)
    tasks: list[BlendTask] = []
    with monkeypatch.context() as patch:
        spy(patch, tasks.append)
        patch.setattr(Scratch, "write", failing)
        with pytest.raises(EngineError, match=r"broken on purpose.*before that"):
            blend.generate(PROMPT, recompute_ratio=0.3, **FULL_LOGPROBS)
        assert not any(map(torch.count_nonzero, own(tasks[0]))), "whatever was left there"
        # an older vLLM can't end a single request
        patch.setattr(compat, "tells_failed_loads", lambda: False)
        with pytest.raises(EngineError, match="so the engine ends"):
            blends()._lose(tasks[0], RuntimeError("x"))
    assert not scheduler(blend).kv_cache_manager.block_pool.get_usage()
    same(plain, blend.generate(QUESTION, mode="full", **FULL_LOGPROBS))
    assert blend.generate(PROMPT, recompute_ratio=0.3, **FULL_LOGPROBS).report.blended
