"""What blending must not disturb: batches, caching, eviction, preemption, failures, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import (
    EXACT,
    FLASH_DTYPE,
    logprobs,
    planned,
    planner,
    selected,
    start_in_process,
)
from tiny import VOCAB, Words, make

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend
from cacheblend_rag.engine.base import EngineOutput
from cacheblend_rag.engine.blend import Blender, BlendTask, FromStore
from cacheblend_rag.engine.executor import BlendExecutor
from cacheblend_rag.engine.outcome import BlendOutcome
from cacheblend_rag.engine.schedule import _why
from cacheblend_rag.engine.torch_executor import TorchExecutor
from cacheblend_rag.errors import (
    ClosedError,
    ConfigError,
    EmptyTextError,
    EngineError,
    PromptError,
    PromptTooLongError,
)
from cacheblend_rag.plan import PARAMS_KEY, Kind
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.report import SegmentReport
from cacheblend_rag.select.query import QuerySelector
from cacheblend_rag.store.follow import Follower

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]

BLOCK = 32
TIGHT_BLOCKS = 19
SAMPLING: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, "logprobs": -1}

words = Words(7)
PREFIX = words(4)
SIZES = {"a": 70, "b": 33, "c": 64, "d": 100, "e": 41, "f": 55, "g": 62, "h": 90}
CHUNKS = {name: words(size) for name, size in SIZES.items()}

ENGINES: dict[str, dict[str, Any]] = {
    "wide": {"block_size": BLOCK, "max_num_batched_tokens": 64, "max_num_seqs": 8},
    # room for one long request or two and a half blends
    "tight": {
        "block_size": BLOCK,
        "max_model_len": 560,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": TIGHT_BLOCKS,
    },
    "lora": {
        "block_size": BLOCK,
        "enable_lora": True,
        "max_lora_rank": 8,
        "dtype": FLASH_DTYPE,  # vLLM's kernels for adapters take no float32
    },
}
tight = pytest.mark.parametrize("blend", ["tight"], indirect=True)
lora = pytest.mark.parametrize("blend", ["lora"], indirect=True)


@pytest.fixture(scope="module", params=["wide"])
def blend(
    request: pytest.FixtureRequest, tiny_models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CacheBlend]:
    """One engine at a time in this process, all chunks stored on disk."""
    store = tmp_path_factory.mktemp("store")
    # without propagation: with it, what a step moves depends on where vLLM cuts a prompt into steps
    config = BlendConfig(
        ingest_prefix=PREFIX, store=f"file://{store}", blend_if="always", propagation_length=0
    )
    options = ENGINES[request.param]
    with start_in_process(make("llama", tiny_models), config=config, **options) as opened:
        assert opened.model_check.passed, opened.model_check.detail
        yield opened


@pytest.fixture(autouse=True)
def everything_stored(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts with all chunks and an empty prefix cache, and leaves no request behind.
    What is done to the store behind the front door is told it by no feed.
    """
    monkeypatch.setattr(Follower, "_ask", lambda self: None)
    if not blend._closed:
        blend.ingest(list(CHUNKS.values()), progress=False)
        reset(blend)
    yield
    if not blend._closed:
        turn = blend._engine._call_lock  # type: ignore[attr-defined]
        left = core(blend).scheduler.has_unfinished_requests(), turn._lock.locked()
        let_go(blend)
        assert left == (False, False)
        rows = connector(blend).rows
        assert rows is None or not rows._blends


# ---- helpers -------------------------------------------------------------------------------------


def core(blend: CacheBlend) -> Any:
    return blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]


def let_go(blend: CacheBlend) -> None:
    """A test that fails takes no other along: its traceback would keep a stream open."""
    from vllm.v1.request import RequestStatus

    core(blend).scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    turn = blend._engine._call_lock  # type: ignore[attr-defined]
    if turn._lock.locked():
        turn.__exit__()


def connector(blend: CacheBlend) -> Any:
    """The worker's side of it."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def reset(blend: CacheBlend) -> None:
    scheduler = core(blend).scheduler
    if not scheduler.reset_prefix_cache():  # a step that was scheduled ahead holds blocks
        blend.generate((3, 4, 5), mode="off", max_tokens=1)
        assert scheduler.reset_prefix_cache()


def prompt(parts: Sequence[str | tuple[int, ...]]) -> tuple[int, ...]:
    """Chunks by name, other tokens as they are."""
    ids: list[int] = []
    for part in parts:
        ids += CHUNKS[part] if isinstance(part, str) else part
    return tuple(ids)


def ask(blend: CacheBlend, ids: tuple[int, ...], **options: Any) -> BlendResult:
    """One answer whose report adds up."""
    result = blend.generate(ids, **{**SAMPLING, **options})
    check_report(result)
    return result


def alone(blend: CacheBlend, ids: tuple[int, ...], **options: Any) -> BlendResult:
    """An answer that shares no cached block with an earlier one."""
    reset(blend)
    result = ask(blend, ids, **options)
    reset(blend)
    return result


def check_report(result: BlendResult) -> None:
    r = result.report
    parts = r.tokens_reused + r.tokens_recomputed + r.tokens_fresh + r.tokens_prefix_cached
    assert parts == r.tokens_total == len(result.prompt_token_ids)
    at = 0
    for s in r.segments:
        assert s.start == at and s.end >= s.start and s.detail
        assert 0 <= s.tokens_recomputed <= s.end - s.start
        at = s.end
    assert at == r.tokens_total
    assert 0 < r.ttft_s <= r.total_s
    assert r.blended == (r.reason is None) and r.blended == (not r.detail)
    assert (r.selector is not None) == (r.recompute_ratio is not None) == r.blended
    if r.blended:
        assert {"tokenize", "locate", "plan", "load", "select"} <= set(r.stages_s)
        assert (r.bytes_loaded > 0) == any(s.kind == "reused" for s in r.segments)
    json.dumps(r.to_dict())


def assert_same(a: BlendResult, b: BlendResult) -> None:
    assert a.token_ids == b.token_ids
    torch.testing.assert_close(logprobs(a), logprobs(b), atol=2 * EXACT, rtol=0)


def differs(a: BlendResult, b: BlendResult) -> bool:
    return (logprobs(a)[0] - logprobs(b)[0]).abs().max().item() > 1e-2


def kinds(result: BlendResult) -> list[str]:
    return [s.kind for s in result.report.segments]


def of_kind(result: BlendResult, kind: str) -> list[SegmentReport]:
    return [s for s in result.report.segments if s.kind == kind]


def key_of(blend: CacheBlend, name: str) -> str:
    return blend._space.key(CHUNKS[name])


def spy_on_tasks(patch: pytest.MonkeyPatch, note: Callable[[Blender, BlendTask], None]) -> None:
    """Call ``note`` at the start of every blend."""
    choose = Blender.choose

    def noted(self: Blender, task: BlendTask, outcome: BlendOutcome) -> Any:
        note(self, task)
        return choose(self, task, outcome)

    patch.setattr(Blender, "choose", noted)


# ---- 1. batches ----------------------------------------------------------------------------------

BLENDS = [
    prompt([words(5), "a", words(3), "b", "c", words(7)]),
    prompt([words(40), "d", "c", "a", words(90)]),
    prompt(["h", words(1), "g", words(2), "f", words(33)]),
]
PLAINS = [words(150), words(20), words(300)]
MIXED = [BLENDS[0], PLAINS[0], PLAINS[1], BLENDS[1], PLAINS[2], BLENDS[2]]


def test_a_mixed_batch_answers_as_each_request_alone(blend: CacheBlend) -> None:
    apart = [alone(blend, ids) for ids in MIXED]
    assert [r.report.blended for r in apart] == [ids in BLENDS for ids in MIXED]
    reset(blend)
    together = blend.generate(MIXED, **SAMPLING)
    for one, other in zip(apart, together, strict=True):
        check_report(other)
        assert other.report.blended == one.report.blended
        assert other.report.tokens_recomputed == one.report.tokens_recomputed
        assert_same(one, other)


@pytest.mark.parametrize("fails", [False, True])
def test_the_same_prompt_several_times_at_once(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    one = alone(blend, BLENDS[0], mode="off" if fails else "blend")
    if fails:
        break_blending(blend, monkeypatch, "middle")
    for other in blend.generate([BLENDS[0]] * 3, **SAMPLING):
        check_report(other)
        assert_same(one, other)


# ---- 2. prefix cache -----------------------------------------------------------------------------


def test_a_blend_never_answers_a_plain_prompt(blend: CacheBlend) -> None:
    before = alone(blend, BLENDS[0], mode="off")
    blended = ask(blend, BLENDS[0], mode="reuse")
    after = ask(blend, BLENDS[0], mode="off")
    assert differs(before, blended), "or this test shows nothing"
    assert after.report.tokens_prefix_cached == 0
    assert_same(before, after)
    # nor does the exact prefix answer the blend
    assert_same(blended, ask(blend, BLENDS[0], mode="reuse"))


def test_a_repeated_blend_hits_the_prefix_cache(blend: CacheBlend) -> None:
    first = ask(blend, BLENDS[0])
    again = ask(blend, BLENDS[0])
    end = planned(blend, BLENDS[0]).end
    assert again.report.tokens_prefix_cached == end
    assert again.report.reason is Reason.PREFIX_CACHED and not again.report.blended
    assert kinds(again) == ["prefix_cached", "fresh"]
    assert_same(first, again)


def test_another_question_reuses_no_blended_block(blend: CacheBlend) -> None:
    prompt_prefix = prompt([words(5), "a", "d", "c"])
    first, second = prompt_prefix + words(40), prompt_prefix + words(40)
    apart = alone(blend, second)
    ask(blend, first)
    after = ask(blend, second)
    assert after.report.blended and after.report.tokens_prefix_cached == 0
    assert selected(blend, after) == selected(blend, apart)
    assert_same(apart, after)


def test_other_ratios_and_selectors_share_no_block(blend: CacheBlend) -> None:
    options: list[dict[str, Any]] = [
        {"recompute_ratio": 0.1},
        {"recompute_ratio": 0.3},
        {"selector": "hkvd"},
    ]
    apart = [alone(blend, BLENDS[1], **o) for o in options]
    for one, option in zip(apart, options, strict=True):
        other = ask(blend, BLENDS[1], **option)
        assert other.report.tokens_prefix_cached == 0
        assert_same(one, other)


def test_full_mode_reads_no_cached_block(blend: CacheBlend) -> None:
    off = [ask(blend, BLENDS[0], mode="off") for _ in range(2)]
    assert off[1].report.tokens_prefix_cached > 0
    for _ in range(2):
        full = ask(blend, BLENDS[0], mode="full")
        assert full.report.tokens_prefix_cached == 0
        assert full.report.tokens_fresh == len(BLENDS[0])
        assert_same(off[0], full)


def test_a_callers_own_salt_is_kept(blend: CacheBlend) -> None:
    prepared = [blend._prepare(BLENDS[0], SAMPLING) for _ in range(4)]
    salts = ["one", "two", "one", None]
    cached = []
    for each, salt in zip(prepared, salts, strict=True):
        pieces = by_hand(blend, dataclasses.replace(each.request, cache_salt=salt))
        cached.append(pieces[-1].engine["prefix_cached"])
    assert cached == [0, 0, planned(blend, BLENDS[0]).end, 0]


def test_tenants_read_no_block_of_one_another(blend: CacheBlend) -> None:
    ids = prompt([words(40), "a", words(30)])
    fronts = [
        blend.with_config(dataclasses.replace(blend.config, namespace=name))
        for name in ("one", "two")
    ]
    cached = []
    for front in (blend, *fronts, *fronts, blend):
        cached.append(front.generate(ids, mode="off", max_tokens=1).report.tokens_prefix_cached)
    assert cached[:3] == [0, 0, 0] and min(cached[3:]) > 0
    assert fronts[0].stats() == [{"chunks": 0}]


MALFORMED: list[Any] = [
    {"space": "another's"},
    {"segments": [[0, 32, "k", 0, 1]]},
    {"recompute_ration": 1},
    {1: 2},
    ["mode"],
    "nonsense",
    5,
]


@pytest.mark.parametrize("options", MALFORMED, ids=str)
def test_options_that_are_none_of_ours_are_served_exactly(blend: CacheBlend, options: Any) -> None:
    plain = alone(blend, BLENDS[0], mode="off")
    prepared = blend._prepare(BLENDS[0], SAMPLING)
    pieces = by_hand(blend, dataclasses.replace(prepared.request, params={PARAMS_KEY: options}))
    result = blend._finish(prepared, pieces, pieces[0].at - 1)
    assert result.report.reason is Reason.MALFORMED_OPTIONS and result.report.detail
    assert_same(plain, result)


@pytest.mark.parametrize(
    "change",
    [
        {"recompute_ratio": 2.0},
        {"recompute_ratio": None},
        {"recompute_ratio": "0.5"},
        {"selector": "no such"},
        {"selector": ["query"]},
        {"selector_options": 3},
        {"selector_options": {"colour": 1}},
        {"propagation_length": -1},
        {"propagation_length": float("inf")},
        {"mode": "nonsense"},
        {"blend_if": 3},
        {"space": 5},
        {"space": None},
    ],
    ids=str,
)
def test_a_refused_option_is_served_exactly(blend: CacheBlend, change: dict[str, Any]) -> None:
    prepared = blend._prepare(BLENDS[0], SAMPLING)
    assert prepared.request.params is not None
    params = {PARAMS_KEY: {**prepared.request.params[PARAMS_KEY], **change}}
    pieces = by_hand(blend, dataclasses.replace(prepared.request, params=params))
    assert Reason(pieces[-1].engine["reason"]) is Reason.MALFORMED_OPTIONS
    assert pieces[-1].engine["detail"]


def by_hand(blend: CacheBlend, request: Any) -> list[EngineOutput]:
    [pieces] = blend._engine.generate([request])
    return pieces


# ---- 5. failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["start", "middle", "selector", "unbound"])
def test_a_failing_blend_is_computed_exactly(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    plain = [alone(blend, ids, mode="off") for ids in (BLENDS[0], PLAINS[0])]
    good = alone(blend, BLENDS[0], recompute_ratio=0.4)
    with monkeypatch.context() as patch:
        break_blending(blend, patch, place)
        batch = blend.generate([BLENDS[0], PLAINS[0]], recompute_ratio=0.4, **SAMPLING)
    for one, other in zip(plain, batch, strict=True):
        check_report(other)
        assert_same(one, other)
    report = batch[0].report
    assert not report.blended and report.tokens_fresh == len(BLENDS[0])
    assert "blending failed" in report.detail
    assert ("bound" if place == "unbound" else "broken on purpose") in report.detail
    assert_same(good, alone(blend, BLENDS[0], recompute_ratio=0.4))


TOO_SLOW = Why(Reason.PREFILL_AS_QUICK, "too slow on purpose")


def break_blending(blend: CacheBlend, patch: pytest.MonkeyPatch, place: str) -> None:
    if place == "unbound":
        patch.setattr(connector(blend).rows, "blender", None)
    elif place == "refused":
        patch.setattr(Blender, "_load", lambda *args: FromStore(TOO_SLOW, {}))
        patch.setattr(connector(blend).link, "rows", None)  # it is the worker that refuses
    elif place == "selector":
        patch.setattr(QuerySelector, "score", raises)
    else:
        choose = Blender.choose

        def broken(self: Blender, task: BlendTask, outcome: BlendOutcome) -> Any:
            if place == "middle":
                choose(self, task, outcome)
            raises()

        patch.setattr(Blender, "choose", broken)


def raises(*args: Any) -> Any:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("place", ["refused", "start", "middle"])
def test_a_retry_after_a_failed_blend_is_answered_from_its_own_kv(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    options: dict[str, Any] = {"recompute_ratio": 1.0}
    for _ in range(3):  # what the pages hold is another user's
        ask(blend, words(300), mode="off", max_tokens=1)
    prepared = blend._prepare(BLENDS[0], {**SAMPLING, "recompute_ratio": 0.3, "max_tokens": 40})
    engine = blend._engine._llm.llm_engine  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        break_blending(blend, patch, place)
        blend._engine._add(engine, "abandoned", prepared.request)  # type: ignore[attr-defined]
        engine.step()
        engine.step()
        engine.abort_request(["abandoned"])
    again = ask(blend, BLENDS[0], **options)
    assert_same(alone(blend, BLENDS[0], mode="full"), again)


def test_what_cannot_be_computed_raises(blend: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> None:
    good, plain = alone(blend, BLENDS[0]), alone(blend, PLAINS[0], mode="off")
    with monkeypatch.context() as patch:
        break_blending(blend, patch, "start")
        patch.setattr("cacheblend_rag.engine.rows.prefill", no_memory)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"no memory on purpose.*broken on purpose"):
                blend.generate(BLENDS[0], **SAMPLING)
        assert_same(plain, alone(blend, PLAINS[0], mode="off"))
    again = ask(blend, BLENDS[0])
    assert again.report.blended
    assert_same(good, again)


@pytest.mark.parametrize("where", ["place", "propagator"])
def test_a_blend_that_fails_within_the_step_raises(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The other requests of the step are answered."""
    good, plain = alone(blend, BLENDS[0]), alone(blend, PLAINS[0], mode="off")
    kind, rest = executor_class(blend), blend._prepare(PLAINS[0], {**SAMPLING, "mode": "off"})
    engine = blend._engine._llm.llm_engine  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(kind, where, no_memory)
        with pytest.raises(EngineError, match="no memory on purpose"):
            blend.generate(BLENDS[0], selector="first_k", **SAMPLING)
        asked = blend._prepare(BLENDS[0], {**SAMPLING, "selector": "first_k"}).request
        blend._engine._add(engine, "fails", asked)  # type: ignore[attr-defined]
        blend._engine._add(engine, "holds", rest.request)  # type: ignore[attr-defined]
        ended: dict[str, str | None] = {}
        tokens: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                piece = output.outputs[0]
                tokens += piece.token_ids if output.request_id == "holds" else []
                ended[output.request_id] = piece.finish_reason
    assert ended == {"fails": "error", "holds": "length"} and tuple(tokens) == plain.token_ids
    assert_same(good, alone(blend, BLENDS[0]))


def no_memory(*args: Any) -> Any:
    raise MemoryError("no memory on purpose")


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e4])
def test_what_a_failing_blend_leaves_harms_nobody(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, rubbish: float
) -> None:
    """Attention reads the rest of a block, times zero."""
    plain = [alone(blend, ids, mode="off") for ids in MIXED]

    def spoiling(self: Blender, task: BlendTask, outcome: BlendOutcome) -> Any:
        fill(self, task, rubbish)
        raises()

    monkeypatch.setattr(Blender, "choose", spoiling)
    for one, other in zip(plain, blend.generate(MIXED, **SAMPLING), strict=True):
        assert_same(one, other)
    reset(blend)
    for one, other in zip(plain, blend.generate(MIXED, mode="off", **SAMPLING), strict=True):
        assert_same(one, other)


def fill(blender: Blender, task: BlendTask, value: float) -> None:
    """Put ``value`` into every slot of a task's blocks."""
    device = blender.handle.device
    slots = torch.tensor([b * BLOCK + i for b in task.blocks for i in range(BLOCK)], device=device)
    for index, layer in enumerate(blender.handle.layers):
        shape = (2, len(slots), layer.num_kv_heads, layer.head_size)
        k, v = torch.full(shape, value, device=device)
        blender.handle.write(index, k, v, slots)


def executor_class(blend: CacheBlend) -> type[BlendExecutor]:
    """Whose executors this engine takes."""
    if connector(blend).blender._executors.reason:
        return TorchExecutor
    from cacheblend_rag.engine.kernel_executor import KernelExecutor

    return KernelExecutor


def test_a_request_that_vllm_refuses_leaves_nothing_behind(blend: CacheBlend) -> None:
    good = alone(blend, BLENDS[0])
    with pytest.raises(PromptError, match="517 is not in the model's vocabulary"):
        blend.generate([BLENDS[0], (VOCAB + 5,) * 40], **SAMPLING)
    with pytest.raises(PromptError, match="-1 is not"):
        blend.ingest([(*CHUNKS["a"], -1)], progress=False)
    request = blend._prepare(BLENDS[0], SAMPLING).request
    refused = dataclasses.replace(request, sampling={**SAMPLING, "logprobs": VOCAB + 1})
    lora = dataclasses.replace(request, lora_request=SimpleNamespace(lora_int_id=1, lora_name="x"))
    for bad in (refused, lora):
        with pytest.raises(ConfigError, match="vLLM refused"):
            blend._engine.generate([request, bad])
    assert_same(good, alone(blend, BLENDS[0]))


def test_leaving_a_stream_early_aborts_it(blend: CacheBlend) -> None:
    good = alone(blend, BLENDS[1])
    for pieces in (0, 1, 2):
        with blend.stream(BLENDS[1], **SAMPLING) as stream:
            for _ in range(pieces):
                next(stream)
        assert not core(blend).scheduler.has_unfinished_requests()
    assert_same(good, alone(blend, BLENDS[1]))


# ---- 6. missing and damaged chunks ---------------------------------------------------------------


def damage(blend: CacheBlend, name: str) -> None:
    folder = Path(blend.config.store.removeprefix("file://"))
    [file] = folder.rglob(f"{key_of(blend, name)}.safetensors")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    file.write_bytes(raw)


def forget(blend: CacheBlend, name: str) -> None:
    """Behind the front door: nobody is told."""
    connector(blend).blender.store.discard(key_of(blend, name))


@pytest.mark.parametrize("lose", [forget, damage])
def test_a_lost_chunk_is_computed_afresh(
    blend: CacheBlend, lose: Callable[[CacheBlend, str], None]
) -> None:
    ids = prompt([words(5), "a", words(3), "d", "c", words(12)])
    plain, good = alone(blend, ids, mode="off"), alone(blend, ids)
    lose(blend, "d")
    for ratio in (1.0, None):
        options = {} if ratio is None else {"recompute_ratio": ratio}
        index = planner(blend).known.index(blend._name)
        index.add(key_of(blend, "d"), CHUNKS["d"])  # as if nobody had noticed
        result = alone(blend, ids, **options)
        assert result.report.blended
        [missing] = of_kind(result, "missing")
        assert (missing.start, missing.end) == (78, 178) and "afresh" in missing.detail
        assert missing.key == key_of(blend, "d") == result.report.missing_keys[0]
        assert set(range(78, 178)) <= set(selected(blend, result))
        if ratio is not None:
            assert_same(plain, result)
    assert key_of(blend, "d") not in blend.stored()
    assert "missing" not in kinds(alone(blend, ids))
    report = blend.ingest(list(CHUNKS.values()), progress=False)
    assert (report.computed, report.present) == (1, len(CHUNKS) - 1)
    assert_same(good, alone(blend, ids))


def test_all_chunks_lost(blend: CacheBlend) -> None:
    ids = prompt([words(5), "a", words(3), "b", words(12)])
    plain = alone(blend, ids, mode="off")
    for name in "ab":
        forget(blend, name)
    result = alone(blend, ids)
    assert kinds(result) == ["fresh", "missing", "fresh", "missing", "fresh"]
    assert_same(plain, result)
    assert blend.ingest(list(CHUNKS.values()), progress=False).computed == 2


def test_forget_and_ingest(blend: CacheBlend) -> None:
    ids = prompt([words(5), "a", words(12)])
    blend.forget([CHUNKS["a"], words(50)])
    result = alone(blend, ids)
    assert not result.report.blended and "no stored chunk" in result.report.detail
    again = blend.ingest([CHUNKS["a"], CHUNKS["a"], CHUNKS["b"], words(20)], progress=False)
    assert (again.computed, again.repeated, again.present, again.too_short) == (1, 1, 1, 1)
    assert again.keys[:3] == [key_of(blend, n) for n in "aab"] and again.keys[3] == ""
    assert alone(blend, ids).report.blended


# ---- 7. refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs_are_served_without_blending(blend: CacheBlend, count: int) -> None:
    plain = alone(blend, BLENDS[0], mode="off")
    result = alone(blend, BLENDS[0], prompt_logprobs=count)
    assert not result.report.blended and "prompt_logprobs" in result.report.detail
    assert_same(plain, result)


def admitted(blend: CacheBlend, ids: tuple[int, ...], **changes: Any) -> Any:
    """What the scheduler's side says to a request like this."""
    fields: dict[str, Any] = {
        "request_id": "cmpl-0-b1b2b3b4",
        "prompt_token_ids": list(ids),
        "lora_request": None,
        "has_encoder_inputs": False,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
    }
    return _why(SimpleNamespace(**{**fields, **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"has_encoder_inputs": True}, Reason.ENCODER_INPUTS),
        ({"lora_request": SimpleNamespace(load_inplace=True)}, Reason.LORA),
        ({"lora_request": SimpleNamespace(load_inplace=False)}, None),
        ({"sampling_params": None}, Reason.NOT_GENERATIVE),
        ({"request_id": "cmpl-0-0123456789abcdef-beam-1-b1b2b3b4"}, Reason.BEAM_SEARCH),
        ({"prompt_token_ids": None}, Reason.PROMPT_EMBEDS),
        ({}, None),
    ],
)
def test_admission(blend: CacheBlend, changes: dict[str, Any], reason: Reason | None) -> None:
    refusal = admitted(blend, BLENDS[0], **changes)
    assert (refusal.reason if refusal else None) is reason


# ---- 8. options ----------------------------------------------------------------------------------


def test_one_token_answers_have_a_whole_report(blend: CacheBlend) -> None:
    longer = alone(blend, BLENDS[0])
    result = alone(blend, BLENDS[0], max_tokens=1)
    assert result.token_ids == longer.token_ids[:1] and result.finish_reason == "length"
    assert result.report.blended
    assert result.report.segments == longer.report.segments
    assert result.report.bytes_loaded == longer.report.bytes_loaded


def test_stop_tokens(blend: CacheBlend) -> None:
    longer = alone(blend, BLENDS[0])
    stop = longer.token_ids[2]
    assert stop not in longer.token_ids[:2]
    result = alone(blend, BLENDS[0], stop_token_ids=[stop])
    assert result.token_ids == longer.token_ids[:3]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)
    assert result.report.segments == longer.report.segments


def test_options_of_one_call(blend: CacheBlend) -> None:
    few = alone(blend, BLENDS[1], recompute_ratio=0.05).report
    many = alone(blend, BLENDS[1], recompute_ratio=0.5).report
    assert 0 < few.tokens_recomputed < many.tokens_recomputed
    assert (few.recompute_ratio, many.recompute_ratio) == (0.05, 0.5)
    assert blend.config.recompute_ratio == 0.15
    hkvd = alone(blend, BLENDS[1], selector="hkvd", selector_options={"check_layer": 2})
    assert hkvd.report.selector == "hkvd"
    wide = alone(blend, BLENDS[1], selector_options={"window": 33})
    narrow = alone(blend, BLENDS[1], selector_options={"window": 1})
    assert selected(blend, wide) != selected(blend, narrow)
    assert alone(blend, BLENDS[1], mode="reuse").report.tokens_recomputed == 0
    off = alone(blend, BLENDS[1], mode="off").report
    assert off.mode == "off" and "mode" in off.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute_ration": 0.5}, "'recompute_ratio'"),
        ({"max_token": 5}, "'max_tokens'"),
        ({"zzzzzz": 5}, "no option 'zzzzzz'"),
        ({"n": 2}, "n must be 1"),
        ({"recompute_ratio": 1.5}, "share"),
        ({"recompute_ratio": "0.5"}, "number"),
        ({"selector": "best"}, "one of"),
        ({"selector_options": {"windows": 3}}, "windows"),
        ({"selector_options": {"window": 4}}, "odd"),
        ({"mode": "fast"}, "one of"),
        ({"schedule": "sync"}, "no option"),
        ({"store": "null://"}, "store"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
def test_refused_options(blend: CacheBlend, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        blend.generate(BLENDS[0], **options)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ("", EmptyTextError),
        ([], EmptyTextError),
        ([[]], PromptError),
        ("text without a tokenizer", PromptError),
        ([{"role": "user", "content": "hello"}], PromptError),
        (words(1024), PromptTooLongError),
        (words(2000), PromptTooLongError),
        ([3, "x"], PromptError),
        (7, PromptError),
    ],
    ids=["empty", "none", "empty ids", "text", "chat", "long", "longer", "mixed", "number"],
)
def test_refused_prompts(blend: CacheBlend, bad: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        blend.generate(bad)


def test_refused_chunks(blend: CacheBlend) -> None:
    report = blend.ingest([words(1025)], progress=False)
    assert (report.too_long, report.computed, report.keys) == (1, 0, [""])
    with pytest.raises(EmptyTextError):
        blend.ingest([()], progress=False)


def test_the_longest_prompt(blend: CacheBlend) -> None:
    parts: list[str | tuple[int, ...]] = [words(5), *"dhadhadhca"]
    ids = prompt(parts)
    ids += words(1023 - len(ids))
    plain = alone(blend, ids, mode="off", max_tokens=1)
    exact = alone(blend, ids, max_tokens=1, recompute_ratio=1.0)
    assert exact.report.blended and exact.finish_reason == "length"
    assert_same(plain, exact)
    assert alone(blend, ids[:-20] + CHUNKS["b"][:20], max_tokens=1).report.blended


# ---- 10. layouts ---------------------------------------------------------------------------------

LAYOUTS: dict[str, list[str | tuple[int, ...]]] = {
    "adjacent": [words(5), "a", "b", "c", words(20)],
    "twice": [words(5), "a", words(2), "a", "a", words(20)],
    "head cut": [words(5), CHUNKS["d"][20:], words(20)],
    "tail cut": [words(5), CHUNKS["d"][:70], words(20)],
    "both cut": [words(5), CHUNKS["d"][8:96], words(3), "b", words(20)],
    "near duplicate": [words(5), (*CHUNKS["d"][:50], 3, 4, 5, *CHUNKS["d"][53:]), words(20)],
    "at the start": ["a", "b", words(20)],
    "in its own place": [PREFIX, "a", "b", words(20)],
    "question first": [words(40), "a", "b", "c"],
    "question first, template's tail": [words(40), "a", "b", "c", words(4)],
    "only chunks": ["a", "b", "c"],
    "one chunk": ["c"],
    "one chunk in its own place": [PREFIX, "d"],
    "on a block": [words(26), "a", "c", words(20)],
    "long glue": [words(100), "a", words(150), "b", words(100)],
    "one token asks": [words(5), "a", "d", words(1)],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(blend: CacheBlend, name: str) -> None:
    ids = prompt(LAYOUTS[name])
    plain = alone(blend, ids, mode="full")
    exact = alone(blend, ids, recompute_ratio=1.0)
    assert exact.report.blended
    assert_same(plain, exact)
    for selector in ("query", "hkvd"):
        some = alone(blend, ids, selector=selector)
        assert some.report.blended
        budget = sum(
            len(s) * {Kind.REUSE: 1, Kind.LEFT_TRUNCATED: 2}.get(s.kind, 0)
            for s in planned(blend, ids).segments
        )
        assert some.report.tokens_recomputed == -(-budget * 15 // 100)


def test_the_same_chunk_twice(blend: CacheBlend) -> None:
    result = alone(blend, prompt(LAYOUTS["twice"]))
    reused = of_kind(result, "reused")
    assert len(reused) == 3 and {s.key for s in reused} == {key_of(blend, "a")}


def test_a_cut_head_gets_twice_the_ratio(blend: CacheBlend) -> None:
    for parts, kind, times in (("head cut", Kind.LEFT_TRUNCATED, 2), ("tail cut", Kind.REUSE, 1)):
        ids = prompt(LAYOUTS[parts])
        [segment] = [s for s in planned(blend, ids).segments if s.key]
        assert segment.kind is kind and segment.offset == (20 if times == 2 else 0)
        for ratio in (0.1, 0.3, 0.7):
            result = alone(blend, ids, recompute_ratio=ratio)
            share = min(1.0, times * ratio)
            assert result.report.tokens_recomputed == -int(-len(segment) * share // 1)


def test_a_chunk_in_its_own_place_is_exact(blend: CacheBlend) -> None:
    ids = prompt(LAYOUTS["in its own place"])
    plan = planned(blend, ids)
    [first] = [s for s in plan.segments if s.kind is Kind.EXACT]
    assert (first.start, first.end) == (4, 74)
    for ratio in (0.15, 1.0):
        result = alone(blend, ids, recompute_ratio=ratio)
        assert not set(range(4, 74)) & set(selected(blend, result))
        assert "exact" in result.report.segments[1].detail
    ids = PREFIX + CHUNKS["a"] + words(20)
    plain, reused = alone(blend, ids, mode="full"), alone(blend, ids, mode="reuse")
    assert reused.report.tokens_reused == 60 and reused.report.tokens_recomputed == 0
    assert_same(plain, reused)


def test_a_repeated_prefix_of_other_tokens_is_not_exact(blend: CacheBlend) -> None:
    ids = (*PREFIX[:3], 2 if PREFIX[3] != 2 else 3, *CHUNKS["a"], *words(20))
    assert Kind.EXACT not in [s.kind for s in planned(blend, ids).segments]


def test_what_fills_no_block_is_not_blended(blend: CacheBlend) -> None:
    result = alone(blend, words(32) + CHUNKS["c"][:32])
    assert not result.report.blended and "block" in result.report.detail


def test_vllms_bound_of_a_prompts_tokens_a_step_is_kept_by_blends(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--long-prefill-token-threshold``: a stream waits less for each step."""
    stream, ids = words(20), prompt([words(5), "a", words(3), "d", words(20)])
    both = alone(blend, stream), alone(blend, ids, recompute_ratio=0.5)
    config, rows = core(blend).scheduler.scheduler_config, connector(blend).rows
    monkeypatch.setattr(config, "long_prefill_token_threshold", 16)
    begin_step, taken = rows.begin_step, list[int]()

    def noted(tasks: Any, batch: Any) -> None:
        if len(batch) > 1:  # newer vLLMs have no bound for who is alone
            taken.extend(part.rows for part in batch.values())
        begin_step(tasks, batch)

    monkeypatch.setattr(rows, "begin_step", noted)
    together = blend.generate([stream, ids], **{**SAMPLING, "recompute_ratio": 0.5})
    assert together[1].report.blended and max(taken) == 16 and taken.count(16) > 4
    for one, other in zip(both, together, strict=True):
        assert_same(one, other)


# ---- 3. partial hits -----------------------------------------------------------------------------


@tight
@pytest.mark.parametrize("selector", ["query", "hkvd"])
def test_a_partial_hit_blends_the_rest(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, selector: str
) -> None:
    ids = prompt([words(5), "a", words(3), "d", "h", words(20)])
    plain = alone(blend, ids, mode="full")
    for ratio in (1.0, 0.3):
        whole = alone(blend, ids, recompute_ratio=ratio, selector=selector)
        assert ask(blend, ids, recompute_ratio=ratio, selector=selector).report.blended
        evict(blend, 4)
        with monkeypatch.context() as patch:
            before = spy_on_shared_blocks(patch)
            part = ask(blend, ids, recompute_ratio=ratio, selector=selector)
        assert part.report.blended
        assert 0 < part.report.tokens_prefix_cached < planned(blend, ids).end
        assert kinds(part)[0] == "prefix_cached"
        assert min(selected(blend, part)) >= part.report.tokens_prefix_cached
        [(blocks, content, blender)] = before
        assert torch.equal(cached(blender, blocks), content), "a shared block was rewritten"
        if ratio == 1.0:
            assert_same(plain, whole)
            assert_same(plain, part)


@tight
def test_the_rest_of_a_partial_hit_fails(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt([words(5), "a", words(3), "d", "h", words(20)])
    plain = alone(blend, ids, mode="full")
    assert ask(blend, ids, recompute_ratio=1.0).report.blended
    evict(blend, 4)
    break_blending(blend, monkeypatch, "middle")
    part = ask(blend, ids, recompute_ratio=1.0)
    assert "blending failed" in part.report.detail
    assert_same(plain, part)


def evict(blend: CacheBlend, blocks: int) -> None:
    """Have another prompt take that many of the cached blocks, the oldest first."""
    pool = core(blend).scheduler.kv_cache_manager.block_pool
    hashed = sum(block.block_hash is not None for block in pool.blocks)
    count = pool.get_num_free_blocks() - hashed + blocks
    ask(blend, words(count * BLOCK - 3), mode="full", max_tokens=1)


def cached(blender: Blender, blocks: Sequence[int]) -> torch.Tensor:
    """Contents of paged blocks, all layers."""
    layers = [layer.kv_cache for layer in blender.handle.layers]
    at = list(layers[0].shape).index(TIGHT_BLOCKS)
    return torch.stack([kv.movedim(at, 0)[list(blocks)].clone() for kv in layers])


def spy_on_shared_blocks(patch: pytest.MonkeyPatch) -> list[tuple[Any, torch.Tensor, Blender]]:
    """Numbers and contents of the blocks below ``write_from``, at the start of each blend."""
    seen: list[tuple[Any, torch.Tensor, Blender]] = []

    def note(blender: Blender, task: BlendTask) -> None:
        shared = task.blocks[: task.write_from // BLOCK]
        assert shared and task.write_from % BLOCK == 0
        seen.append((shared, cached(blender, shared), blender))

    spy_on_tasks(patch, note)
    return seen


# ---- 4. preemption -------------------------------------------------------------------------------


@tight
def test_preempted_blends_answer_as_alone(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [("a", "b"), ("b", "c"), ("a", "e"), ("e", "b")]
    fixed = Words(11)
    prompts = [prompt([fixed(5), x, fixed(3), y, fixed(7)]) for x, y in pairs]
    options: dict[str, Any] = {"max_tokens": 40, "recompute_ratio": 0.3}
    apart = [alone(blend, ids, **options) for ids in prompts]
    scheduler = core(blend).scheduler
    preempt, count = scheduler._preempt_request, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return preempt(*args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    # Chunks come from a disk: where one is late, its request begins behind the others, and all fit.
    for _ in range(5):
        reset(blend)
        together = blend.generate(prompts, **{**SAMPLING, **options})
        for one, other in zip(apart, together, strict=True):
            check_report(other)
            assert other.report.blended
            assert other.report.segments == one.report.segments
            assert_same(one, other)
        if count:
            return
    raise AssertionError("nothing was ever preempted")


@tight
def test_more_blends_than_fit_wait_for_their_turn(blend: CacheBlend) -> None:
    fixed = Words(12)
    names = "abcdefgh"
    prompts = [
        prompt([fixed(5), x, "d", y, fixed(9)]) for x, y in zip(names, "hgfabbca", strict=True)
    ]
    apart = [alone(blend, ids) for ids in prompts]
    reset(blend)
    together = blend.generate(prompts, **SAMPLING)
    for one, other in zip(apart, together, strict=True):
        check_report(other)
        assert other.report.blended
        assert_same(one, other)


# ---- 7. LoRA, and the end ------------------------------------------------------------------------


def adapter(folder: Path) -> Path:
    """A small random LoRA adapter on the query projections."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    weights = {}
    for layer in range(4):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, 256, generator=generator) * 0.1
        weights[f"{name}.lora_B.weight"] = torch.randn(256, 8, generator=generator) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return folder


@lora
def test_chunks_of_the_model_alone_serve_no_adapter(blend: CacheBlend, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    adapted = LoRARequest("test", 1, str(adapter(tmp_path)))
    plain = alone(blend, BLENDS[0], mode="full", lora_request=adapted)
    result = alone(blend, BLENDS[0], lora_request=adapted)
    assert not result.report.blended and result.report.reason is Reason.LORA
    assert_same(plain, result)
    result = alone(blend, BLENDS[0])
    assert result.report.blended is blend.model_check.passed
    assert differs(plain, result), "the adapter must do something"


@lora
def test_use_after_close(blend: CacheBlend) -> None:
    engine, stream = blend._engine, blend.stream(BLENDS[0])
    blend.close()
    blend.close()
    engine.close()
    uses: list[Callable[[], Any]] = [
        lambda: blend.generate(BLENDS[0]),
        lambda: blend.stream(BLENDS[0]),
        lambda: blend.astream(BLENDS[0]),
        lambda: blend.ingest([CHUNKS["a"]]),
        lambda: blend.forget([CHUNKS["a"]]),
        lambda: blend.stats(),
        lambda: engine.rpc("cacheblend_store_stats"),
        lambda: next(stream),
        lambda: blend.__enter__().generate(BLENDS[0]),
    ]
    for use in uses:
        with pytest.raises(ClosedError, match="closed"):
            use()
