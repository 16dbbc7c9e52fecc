"""What the scheduler is told of a blend, request by request; no engine is started."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cacheblend_rag.engine import schedule
from cacheblend_rag.engine.connector import BlendMetadata, CacheBlendHybridConnector
from cacheblend_rag.engine.link import Link
from cacheblend_rag.engine.room import Room, most_rows
from cacheblend_rag.engine.schedule import Claims
from cacheblend_rag.engine.start import graph_sizes
from cacheblend_rag.engine.weights import CHANGED
from cacheblend_rag.engine.worker_state import StepTimer, WorkerState
from cacheblend_rag.plan import PARAMS_KEY, Kind, NoPlan, Plan, Segment
from cacheblend_rag.planner import Limits, Planned
from cacheblend_rag.reason import Reason
from cacheblend_rag.shadow import Drawn

BLOCK = 16
IDS = tuple(range(1000, 1200))
PLAN = Plan(
    segments=(Segment(0, 10), Segment(10, 176, "k" * 64, 0, Kind.REUSE)),
    question_start=180,
    ratio=0.5,
    selector="query",
    selector_options={},
    blend_if="always",
)
# The plan's tokens 10 to 60 stood in an earlier blend for a chunk that is gone.
LATER = (Segment(0, 60), Segment(60, 176, "k" * 64, 0, Kind.REUSE))
COMPUTES = 10 + 83 + 24  # before the chunk, half of it, behind the plan
THERE = len(IDS) - COMPUTES  # tokens that vLLM is told are there


class Blocks(SimpleNamespace):
    def get_block_ids(self) -> tuple[list[int]]:
        return (list(range(1, 14)),)


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Claims:
    monkeypatch.setattr(schedule, "whole_graphs", lambda config: "")
    monkeypatch.setattr(schedule.compat, "longest_blend", lambda config: None)
    monkeypatch.setattr(schedule.compat, "refinement_refusal", lambda config, caches: "")
    config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=BLOCK),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        kv_transfer_config=SimpleNamespace(engine_id="this"),
    )
    claims = Claims(config, SimpleNamespace(kv_cache_groups=[None]))
    monkeypatch.setattr(
        claims.planning, "begin", lambda ids, options, adapter, salt: planned(options["plan"])
    )
    return claims


def planned(plan: Plan | NoPlan) -> Future[Planned]:
    done: Future[Planned] = Future()
    done.set_result(Planned(plan, "blend", {}))
    return done


def request(plan: Plan = PLAN, name: str = "r") -> Any:
    return SimpleNamespace(
        request_id=name,
        kv_transfer_params={PARAMS_KEY: {"plan": plan}},
        prompt_token_ids=list(IDS),
        all_token_ids=list(IDS),
        num_prompt_tokens=len(IDS),
        num_tokens=len(IDS),
        block_hashes=[b"%d" % i for i in range(len(IDS) // BLOCK)],
        lora_request=None,
        cache_salt=None,
        has_encoder_inputs=False,
        sampling_params=SimpleNamespace(prompt_logprobs=None),
        status=SimpleNamespace(name="WAITING"),
        num_computed_tokens=0,
        update_block_hashes=lambda: None,
        prefill_stats=SimpleNamespace(num_cached_tokens=0),
    )


def step(claims: Claims, *, new: dict[str, int], rows: dict[str, int]) -> schedule.Step:
    """A step of these requests: tokens computed before, by name, and rows."""
    cached = SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[])
    first = [SimpleNamespace(req_id=n, num_computed_tokens=c) for n, c in new.items()]
    return claims.step(
        SimpleNamespace(
            num_scheduled_tokens=rows,
            scheduled_spec_decode_tokens={},
            scheduled_new_reqs=first,
            scheduled_cached_reqs=cached,
            preempted_req_ids=None,
        )
    )


def test_as_many_rows_are_scheduled_as_a_blend_computes(claims: Claims) -> None:
    one = request()
    claims.begin(one)
    assert claims.there(one, 0) == len(IDS) - COMPUTES
    claims.allocated(one, Blocks().get_block_ids(), THERE)
    sent = step(claims, new={"r": len(IDS) - COMPUTES}, rows={"r": COMPUTES})
    task = sent.tasks["r"]
    assert (task.rows, task.computes, task.write_from) == (COMPUTES, COMPUTES, 0)
    assert sent.batch["r"].rows == COMPUTES
    assert not step(claims, new={}, rows={"r": 1}).batch, "it decodes"


class Coming:
    """Stands for a worker whose chunks are all in memory: what is on its way to the GPU."""

    def __init__(self) -> None:
        self.blender, self.now, self.told = self, "", list[str]()
        self.is_there, self.considered = True, 0

    def is_fast(self, plan: Plan) -> bool:
        return True

    def consider(self, plan: Plan) -> tuple[None, set[str]]:
        self.considered += 1
        return None, set()

    def stage(self, name: str, plan: Plan) -> bool:
        self.now = name
        self.told.append(name)
        return self.is_there

    def unstage(self) -> None:
        self.now = ""

    def forget(self, name: str) -> None: ...

    def begin_ahead(self, task: Any) -> None:
        self.now = ""


def test_what_a_lone_blend_needs_comes_from_its_arrival_on(claims: Claims) -> None:
    coming = Coming()
    claims.planning._link.rows = cast(Any, coming)
    one, other = request(), request(name="other")
    claims.begin(one)
    assert coming.now == "r", "before vLLM schedules it"
    assert claims.there(one, 0) == THERE and claims.there(one, 0) == THERE, "asked again"
    assert coming.told == ["r"], "once"
    claims.begin(other)
    assert coming.told == ["r"], "another is under way"
    claims.allocated(one, Blocks().get_block_ids(), THERE)
    assert not coming.now
    step(claims, new={"r": THERE}, rows={"r": COMPUTES})
    assert claims.there(other, 0) == THERE and coming.now == "other"
    claims.finished(other)
    assert not coming.now, "it is given up with its request"


def test_what_could_not_be_brought_is_considered_again(claims: Claims) -> None:
    """It was evicted meanwhile: read with the step, a disk would hold up all requests."""
    coming, one = Coming(), request()
    claims.planning._link.rows, coming.is_there = cast(Any, coming), False
    claims.begin(one)
    step(claims, new={}, rows={})
    assert claims.there(one, 0) == THERE
    assert coming.considered == 1 and coming.told == ["r", "r"]


def test_nothing_comes_of_what_vllm_has(claims: Claims) -> None:
    coming, plan = Coming(), replace(PLAN, blend_if="faster")
    claims.planning._link.rows = cast(Any, coming)
    has = set(request().block_hashes[:1])
    pool = SimpleNamespace(get_cached_block=lambda hash, groups: hash in has)
    claims.refinements.pool = pool
    claims.begin(request(plan))
    assert coming.told == ["r"], "of its head only"
    claims.finished(request(plan))
    has.update(request().block_hashes)
    claims.begin(request(plan, "again"))
    assert coming.told == ["r"]
    claims.finished(request(plan, "again"))
    claims.begin(request(PLAN, "always"))
    assert coming.told == ["r", "always"], "which exact KV is no reason not to blend"


def test_no_block_of_a_blend_keeps_an_exact_hash(claims: Claims) -> None:
    """Those that were hidden with the plan stay so, and the ones before them are hidden when its
    blocks are given, each time with other hashes after a preemption.
    """
    for plan in (PLAN, replace(PLAN, blend_if="faster")):
        one, exact = request(plan), request().block_hashes
        claims.begin(one)
        planned = list(one.block_hashes)
        assert claims.there(one, 0) == THERE
        assert not set(exact) & set(one.block_hashes)
        asked = list(one.block_hashes)
        assert claims.there(one, 0) == THERE and one.block_hashes == asked, "nobody has these"
        claims.allocated(one, Blocks().get_block_ids(), THERE)
        step(claims, new={"r": THERE}, rows={"r": COMPUTES})
        assert claims.there(one, 0) == THERE
        assert not set(one.block_hashes) & {*asked, *planned, *exact}, "blocks it never wrote"
        claims.finished(one)


def test_a_step_takes_so_many_rows_of_blends(claims: Claims) -> None:
    """One that has more by itself still begins, and others that are not blended are not kept."""
    claims._room = Room(2 * COMPUTES)
    names = ("a", "b", "c", "d")
    requests = {name: request(name=name) for name in names}
    for one in requests.values():
        claims.begin(one)

    def begins(name: str) -> bool:
        there = claims.there(requests[name], 0)
        if there is not None:
            claims.allocated(requests[name], Blocks().get_block_ids(), there)
        return there is not None

    assert [begins(name) for name in names] == [True, True, False, False]
    plain = request(NoPlan(Reason.NO_CHUNK_FOUND, "none"), "plain")  # type: ignore[arg-type]
    claims.begin(plain)
    assert claims.there(plain, 0) == 0
    # All rows of the one are scheduled, some of the other: it goes on with the next step.
    step(claims, new={"a": THERE, "b": THERE}, rows={"a": COMPUTES, "b": 10})
    assert [begins(name) for name in names[2:]] == [True, False]
    claims.finished(requests["b"])  # it was aborted
    assert not begins("d"), "one before it had no room in this step"
    step(claims, new={}, rows={})
    assert begins("d")
    claims._room = Room(1)
    large = request(name="large")
    claims.begin(large)
    assert claims.there(large, 0) is not None


def test_small_blends_do_not_pass_a_large_one_for_ever(claims: Claims) -> None:
    """Each takes two steps, so that there are always some under way when the large one asks."""
    claims._room = Room(COMPUTES + 41)
    large, under_way = request(name="large"), dict[str, int]()
    claims.begin(large)
    for number in range(9):
        if number and claims.there(large, 0) is not None:
            break
        new = dict[str, int]()
        for name in (f"{number}a", f"{number}b"):
            small = request(replace(PLAN, ratio=0.1), name)
            claims.begin(small)
            if (there := claims.there(small, 0)) is not None:
                claims.allocated(small, Blocks().get_block_ids(), there)
                new[name] = there
        both = {**new, **under_way}
        step(claims, new=both, rows=dict.fromkeys(both, 30))
        under_way = {name: done + 30 for name, done in both.items() if done + 30 < len(IDS)}
        assert number or len(new) == len(under_way) == 2
    assert number == 2


def test_who_has_no_room_costs_little(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks for all that wait in each step."""
    asked = Counter[str]()
    monkeypatch.setattr(claims._ahead, "waits", lambda name, plan: asked.update([name]))
    monkeypatch.setattr(schedule, "_is_written", lambda *given: not asked.update(["written"]))
    claims._room = Room(COMPUTES)
    waiting = [request(name=str(i)) for i in range(20)]
    for one in waiting:
        claims.begin(one)
    there = claims.there(waiting[0], 0)
    assert there is not None
    claims.allocated(waiting[0], Blocks().get_block_ids(), there)
    for _ in range(5):
        step(claims, new={"0": there}, rows={"0": 1})  # it takes many steps
        assert all(claims.there(one, 0) is None for one in waiting[1:])
    assert asked == {"0": 1, "written": 1}


def allocated(claims: Claims, one: Any) -> int:
    there = claims.there(one, 0)
    assert there is not None
    claims.allocated(one, Blocks().get_block_ids(), there)
    return there


def test_an_empty_step_says_nothing_of_weights(claims: Claims) -> None:
    """vLLM makes them while an engine is paused, before the change, or has none as it sleeps."""
    claims.weights.begin()
    assert step(claims, new={}, rows={}).checks_weights == 0
    one = request()
    claims.begin(one)
    assert claims.there(one, 0) == 0
    assert step(claims, new={"r": 0}, rows={"r": 64}).checks_weights == 1
    assert step(claims, new={}, rows={"r": 1}).checks_weights == 0


@pytest.mark.parametrize("changed", [True, False])
def test_an_answer_to_an_earlier_reset_ends_no_later_suspicion(
    claims: Claims, *, changed: bool
) -> None:
    claims.weights.begin()
    assert step(claims, new={"p": 0}, rows={"p": 1}).checks_weights == 1
    claims.weights.begin()
    claims.take_weights(1, changed=False)
    assert claims.weights.fault(None) is not None
    assert step(claims, new={"p": 0}, rows={"p": 1}).checks_weights == 2
    claims.take_weights(2, changed=changed)
    assert (claims.weights.fault(None) is None) is not changed


def test_a_blend_before_weights_were_changed_is_not_repeated(claims: Claims) -> None:
    """It was planned, begun and preempted; its first step afterwards comes late."""
    one = request()
    claims.begin(one)
    there = allocated(claims, one)
    step(claims, new={"r": there}, rows={"r": COMPUTES})
    claims.weights.begin()
    claims.take_weights(1, changed=True)
    assert claims.there(one, 0) == 0
    assert not step(claims, new={"r": 0}, rows={"r": 1}).tasks


def test_blocks_that_were_never_written_are_not_read_for_suspicion(claims: Claims) -> None:
    one = request()
    claims.begin(one)
    there = allocated(claims, one)
    step(claims, new={"r": there}, rows={"r": 40})  # it is preempted in the middle of its blend
    before = list(one.block_hashes)
    claims.weights.begin()
    assert claims.there(one, 112) is None
    assert not set(before[:7]) & set(one.block_hashes)
    assert claims.there(one, 0) == 0


def test_an_ingestion_finds_weights_changed_behind_a_plan(claims: Claims) -> None:
    one = request()
    claims.begin(one)
    planner = claims.planning.planner
    planner.learn(0, Limits(why_not=CHANGED))
    planner.learn(0, Limits())  # of a proof that passed
    assert planner.why_not == CHANGED
    assert claims.there(one, 0) == 0


def test_what_was_fetched_for_a_plain_request_is_let_go(claims: Claims) -> None:
    """Not at its end: as many as are fetched ahead would keep all others waiting until then."""
    forgotten = list[str]()
    claims._ahead.forget = forgotten.append  # type: ignore[method-assign]
    one = request()
    claims.begin(one)
    assert claims.there(one, 176) == 0 and forgotten == ["r"]


def test_a_refused_blend_that_begins_with_an_earlier_one_says_so(claims: Claims) -> None:
    tracked = schedule._Tracked(request(), "r", plan=PLAN, exact=[b"x", b"1"], per_hash=BLOCK)
    tracked.refuse(0, schedule.Why(Reason.PREFILL_AS_QUICK, "quick"))
    assert tracked.why_not == (Reason.PREFILL_AS_QUICK, "quick")
    tracked.refuse(16, schedule.Why(Reason.PREFILL_AS_QUICK, "quick"))
    assert tracked.why_not is not None and "16 tokens of an earlier blend" in tracked.why_not.detail


def test_rows_of_a_step_by_the_engine() -> None:
    config = SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 512]))
    assert most_rows(config, is_cpu=True) is None
    assert most_rows(config, is_cpu=False) == max(graph_sizes()) == 2048
    config.compilation_config.cudagraph_capture_sizes = [1, 4096]
    assert most_rows(config, is_cpu=False) == 4096
    config.compilation_config.cudagraph_capture_sizes = None
    assert most_rows(config, is_cpu=False) == 2048


@pytest.mark.parametrize("when", ["before", "after"], ids=["", "ended"])
@pytest.mark.parametrize("come", [[1], [2], [1, 2], []], ids=str)
def test_blocks_of_a_second_blend_are_shared_by_its_own_outcome(
    claims: Claims, monkeypatch: pytest.MonkeyPatch, come: list[int], when: str
) -> None:
    """That of the first one, before a preemption, says nothing of them, however late it comes."""
    shared: list[Any] = []
    monkeypatch.setattr(claims._prefixes, "add", lambda *given: shared.append(given))
    one = request()
    claims.begin(one)
    for number in (1, 2):
        there = claims.there(one, 0)
        assert there is not None
        claims.allocated(one, Blocks().get_block_ids(), there)
        task = step(claims, new={"r": there}, rows={"r": COMPUTES}).tasks["r"]
        assert task.number == number
    for number in come if when == "before" else ():
        claims.results({"r": {"recomputed": [], "number": number}}, {})
    claims.finished(one)
    for number in come if when == "after" else ():
        claims.results({"r": {"recomputed": [], "number": number}}, {})
    assert len(shared) == (2 in come)


def test_clients_are_told_what_was_found(claims: Claims) -> None:
    """In chunks, recomputed or not, and in vLLM's own cache; once, whatever is done later."""
    one = request()
    claims.begin(one)
    claims.there(one, 0)
    claims.allocated(one, Blocks().get_block_ids(), THERE)
    assert one.prefill_stats.num_cached_tokens == 180 - 10
    other = request(name="other")
    claims.begin(other)
    there = claims.there(other, 32)
    assert there is not None
    claims.allocated(other, Blocks().get_block_ids(), there)
    assert other.prefill_stats.num_cached_tokens == 180
    late = request(name="late")
    late.prefill_stats = None  # vLLM has sent them with the first token
    claims.begin(late)
    claims.there(late, 0)
    claims.allocated(late, Blocks().get_block_ids(), THERE)


def test_beams_are_computed_exactly(claims: Claims) -> None:
    """vLLM's server makes requests of its own for them, and leaves the client's options out."""
    beam = request(name="cmpl-a-0123456789abcdef-beam-0-b1b2b3b4")
    before = list(beam.block_hashes)
    claims.begin(beam)
    assert claims.there(beam, 0) == 0
    assert beam.block_hashes == before


def test_a_request_that_takes_nothing_from_caches_says_so(claims: Claims) -> None:
    """vLLM asks for it too, and throws the number away."""
    one = request()
    one.skip_reading_prefix_cache = True
    claims.begin(one)
    assert claims.there(one, 0) == 0
    report = claims.finished(one)
    assert report is not None and report[PARAMS_KEY]["reason"] == "skips_cache"


@pytest.mark.parametrize("plans_all", [False, True])
@pytest.mark.parametrize("given", [json.loads("[" * 900 + "]" * 900), {PARAMS_KEY: ["\ud800"]}, 5])
def test_what_no_worker_could_be_sent_is_taken_off_a_request(
    claims: Claims, given: Any, plans_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own server checks nothing, and the engine ended where it wrote this to its workers."""
    monkeypatch.setattr(type(claims.planning.planner), "plans_all", plans_all)
    sampling = SimpleNamespace(
        prompt_logprobs=None, extra_args={"kv_transfer_params": given, "x": 1}
    )
    asked = request()
    asked.kv_transfer_params, asked.sampling_params = given, sampling
    before = list(asked.block_hashes)
    claims.begin(asked)
    assert claims.there(asked, 0) == 0 and asked.block_hashes == before
    assert asked.kv_transfer_params is None and sampling.extra_args == {"x": 1}
    asked.status.name = "FINISHED_STOPPED"
    report = claims.finished(asked)
    assert report is not None
    assert report[PARAMS_KEY]["reason"] == "malformed_options", report


def test_another_engine_of_this_process_is_not_asked(claims: Claims) -> None:
    class Others:
        """Its chunks are far, and it never gets them."""

        def consider(self, plan: Plan) -> Any:
            return None, set()

        def is_fast(self, plan: Plan) -> bool:
            return False

        def fetch(self, *args: Any) -> None:
            raise AssertionError

        def forget(self, request_id: str) -> None:
            raise AssertionError

    others: Any = Others()
    elsewhere = Link.of("another")
    elsewhere.blender = others
    one = request()
    claims.begin(one)
    assert claims.there(one, 0) == len(IDS) - COMPUTES
    claims.finished(one)
    assert Link.of("another") is elsewhere is not Link.of("this")


def test_a_hit_is_not_claimed_again(claims: Claims) -> None:
    one = request()
    claims.begin(one)
    found = claims.there(one, 64)
    claims.allocated(one, Blocks().get_block_ids(), found or 0)
    task = step(claims, new={"r": 64 + (found or 0)}, rows={"r": 1}).tasks["r"]
    assert task.write_from == 64 and task.computes == -(-(176 - 64) // 2) + 24
    assert found == len(IDS) - task.rows - 64


def test_what_others_compute_in_this_step_is_not_read_before_it(claims: Claims) -> None:
    """vLLM hands on blocks when they are allocated; a blend reads them before the step."""
    plan = replace(PLAN, blend_if="faster")
    other, one, later = (request(plan, name) for name in ("other", "one", "later"))
    for each in (other, one, later):
        claims.begin(each)
    other.status.name, other.num_computed_tokens = "RUNNING", 40
    assert claims.there(one, 64) is None
    assert claims.there(one, 32) is not None, "these are written"
    other.num_computed_tokens = 64
    assert claims.there(later, 64) is not None


def test_what_a_preempted_blend_left_is_computed_again(claims: Claims) -> None:
    """It finds blocks of its own that were not all computed: no row may be left out for them."""
    one = request()
    claims.begin(one)
    claims.there(one, 0)
    claims.allocated(one, Blocks().get_block_ids(), THERE)
    step(claims, new={"r": len(IDS) - COMPUTES}, rows={"r": 40})
    assert claims.there(one, 112) == 0  # more than a blend leaves alone
    claims.allocated(one, Blocks().get_block_ids(), 0)
    task = step(claims, new={"r": 112}, rows={"r": len(IDS) - 112}).tasks["r"]
    assert (task.write_from, task.computes, task.rows) == (0, COMPUTES, len(IDS) - 112)
    assert task.first_row == 112
    # whole now: what it finds of its own after another preemption is as it should be
    assert claims.there(one, 176) == 0
    assert step(claims, new={"r": 176}, rows={"r": 24}).tasks == {}


def test_a_blends_blocks_get_hashes_of_their_own(claims: Claims) -> None:
    one, other = request(name="one"), request(name="other")
    exact = list(one.block_hashes)
    for each in (one, other):
        claims.begin(each)
        claims.there(each, 0)
    assert not set(one.block_hashes) & (set(other.block_hashes) | set(exact))


def test_its_blocks_are_shared_once_the_outcome_came(claims: Claims) -> None:
    def asked(name: str) -> Any:
        later = request(name=name)
        claims.begin(later)
        return later

    first = asked("first")
    claims.there(first, 0)
    claims.allocated(first, Blocks().get_block_ids(), THERE)
    step(claims, new={"first": len(IDS) - COMPUTES}, rows={"first": COMPUTES})
    assert not set(asked("too early").block_hashes) & set(first.block_hashes)
    claims.finished(first)
    assert not set(asked("early").block_hashes) & set(first.block_hashes)
    claims.results({"first": {"recomputed": [], "number": 1}}, {})
    again = asked("again")
    assert again.block_hashes == first.block_hashes
    assert claims.there(again, 176) == 0
    report = claims.finished(again)
    assert report is not None and report[PARAMS_KEY]["reason"] is Reason.PREFIX_CACHED


@pytest.mark.parametrize("early", ["aborted", "failed"])
def test_blocks_of_a_blend_that_was_not_whole_are_never_shared(claims: Claims, early: str) -> None:
    one = request()
    claims.begin(one)
    claims.there(one, 0)
    claims.allocated(one, Blocks().get_block_ids(), THERE)
    part = 40 if early == "aborted" else COMPUTES
    step(claims, new={"r": len(IDS) - COMPUTES}, rows={"r": part})
    if early == "failed":
        why_not = schedule.Why(Reason.BLEND_FAILED, "broken")
        claims.results({}, {"r": why_not})
    claims.finished(one)
    claims.results({"r": {"recomputed": [], "number": 1}} if early == "aborted" else {}, {})
    retry = request(name="retry")
    claims.begin(retry)
    assert not set(retry.block_hashes) & set(one.block_hashes)


def test_only_passes_that_are_on_keep_layers_from_being_changed() -> None:
    from vllm.config import CompilationConfig, ParallelConfig

    config = SimpleNamespace(
        compilation_config=CompilationConfig(),
        parallel_config=ParallelConfig(),
        model_config=SimpleNamespace(use_mla=False),
    )
    assert schedule.whole_graphs(config) == ""
    passes = config.compilation_config.pass_config
    if not hasattr(passes, "fuse_rope_kvcache"):
        pytest.skip("this vLLM has no such pass")
    passes.fuse_rope_kvcache = True
    assert "fuses" in schedule.whole_graphs(config)


def compiled(**changes: Any) -> Any:
    """A configuration of vLLM's, of the parts that are looked at."""
    from vllm.config import CUDAGraphMode

    passes = {"fuse_rope_kvcache": False, "rope_kvcache_fusion_max_token_num": 256}
    compiling: dict[str, Any] = {
        "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
        "splitting_ops": ["vllm::unified_attention", "vllm::unified_kv_cache_update"],
        "use_inductor_graph_partition": False,
        "pass_config": SimpleNamespace(**passes),
        **changes,
    }
    ubatching = compiling.pop("use_ubatching", False)
    return SimpleNamespace(
        model_config=SimpleNamespace(use_mla=compiling.pop("use_mla", False)),
        compilation_config=SimpleNamespace(**compiling),
        parallel_config=SimpleNamespace(use_ubatching=ubatching),
    )


def test_steps_that_cannot_be_changed_are_known() -> None:
    from vllm.config import CUDAGraphMode

    assert schedule.whole_graphs(compiled()) == ""
    assert schedule.whole_graphs(compiled(cudagraph_mode=None, splitting_ops=[])) == ""
    for changes, word in [
        ({"cudagraph_mode": CUDAGraphMode.FULL}, "FULL"),
        ({"splitting_ops": ["vllm::unified_attention"]}, "splitting_ops"),
        ({"use_inductor_graph_partition": True}, "use_inductor_graph_partition"),
        ({"pass_config": SimpleNamespace(fuse_rope_kvcache=True)}, "pass"),
        ({"use_ubatching": True}, "dual batch overlap"),
        ({"use_mla": True}, "unified_mla_kv_cache_update"),
    ]:
        assert word in schedule.whole_graphs(compiled(**changes))


@pytest.mark.parametrize(
    ("plan", "changes", "write_from", "why_not"),
    [
        ({}, {}, 0, ""),
        ({"ratio": 1.0}, {}, 0, "the blend is exact"),
        ({}, {}, 176, "the blend is exact"),
        ({}, {"exact": [b"0", b"1", b"2"], "per_hash": BLOCK}, 48, ""),
        ({}, {"exact": [b"0", b"x", b"y"], "per_hash": BLOCK}, 16, ""),
        ({}, {"exact": [b"0", b"x", b"y"], "per_hash": BLOCK}, 32, "an earlier blend"),
        ({"segments": LATER}, {"exact": [b"x", b"y"], "per_hash": BLOCK}, 32, "an earlier blend"),
        ({}, {"drawn": Drawn("n", "t", "", 9, 9)}, 0, "shadow"),
        ({}, {"exact": [b"a"], "per_hash": BLOCK // 2}, 0, "a part of a block"),
        ({}, {"exact": [b"a"], "per_hash": BLOCK}, 0, ""),
    ],
)
def test_what_is_not_refined(
    plan: dict[str, Any], changes: dict[str, Any], write_from: int, why_not: str
) -> None:
    tracked = schedule._Tracked(request(), "r", plan=replace(PLAN, **plan), **changes)
    found = tracked.nothing_to_refine(write_from, BLOCK)
    assert bool(found) == bool(why_not) and why_not in found


def arriving(params: dict[str, Any], name: str = "r") -> Any:
    one = request(name=name)
    one.kv_transfer_params = {"do_remote_prefill": True, **params}
    return one


def test_kv_of_another_engine_is_not_blended_and_its_blended_blocks_are_hidden(
    claims: Claims,
) -> None:
    told = {"handed_over": {"start": 32, "tag": "x"}, "mode": "blend", "plan": {}, "space": "s"}
    one, same, other, exact, silent = (
        arriving(params, name)
        for name, params in (
            ("one", {PARAMS_KEY: told}),
            ("same", {PARAMS_KEY: told}),
            ("other", {PARAMS_KEY: {"handed_over": {"start": 32, "tag": "y"}}}),
            ("exact", {PARAMS_KEY: {"handed_over": {"start": None, "tag": ""}}}),
            ("silent", {}),
        )
    )
    plain = list(one.block_hashes)
    for each in (one, same, other, exact, silent):
        claims.begin(each)
        assert claims.there(each, 0) == 0
    assert one.block_hashes == same.block_hashes and exact.block_hashes == plain
    assert one.block_hashes[:2] == other.block_hashes[:2] == plain[:2]
    hidden = [set(each.block_hashes[2:]) for each in (one, other, exact, silent)]
    assert len(set().union(*hidden)) == sum(map(len, hidden)), "none finds another's"
    assert not set(silent.block_hashes) & set(plain)
    report = claims.finished(one)
    assert report is not None and report[PARAMS_KEY]["reason"] is Reason.HANDED_OVER
    assert "handed_over" not in report[PARAMS_KEY], "it goes no further"


def test_an_engine_that_prefills_says_what_it_blended(claims: Claims) -> None:
    blended, plain = request(name="blended"), request(name="plain")
    for each in (blended, plain):
        each.kv_transfer_params["do_remote_decode"] = True
    plain.kv_transfer_params[PARAMS_KEY]["plan"] = NoPlan(Reason.NO_CHUNK_FOUND, "none")
    found = []
    for each in (blended, plain):
        claims.begin(each)
        claims.there(each, 0)
        claims.allocated(each, Blocks().get_block_ids(), THERE)
        step(claims, new={each.request_id: THERE}, rows={each.request_id: COMPUTES})
        report = claims.finished(each)
        assert report is not None
        found.append(report[PARAMS_KEY]["handed_over"])
    assert found[0]["start"] == 0 and found[0]["tag"]
    assert found[1] == {"start": None, "tag": ""}


def test_where_another_connector_has_the_kv_nothing_is_blended(claims: Claims) -> None:
    one = request()
    claims.begin(one)
    assert claims.there(one, 0) == THERE > 0
    claims.allocated(one, Blocks().get_block_ids(), 0)
    assert step(claims, new={"r": 0}, rows={"r": len(IDS)}).tasks == {}
    report = claims.finished(one)
    assert report is not None and report[PARAMS_KEY]["reason"] is Reason.OTHER_CONNECTORS


@pytest.fixture
def grouped(claims: Claims) -> Claims:
    """The same where layers are in two KV cache groups."""
    claims.by_group = True
    return claims


TABLES = ([0] * 10 + [7, 8, 9], list(range(20, 33)))


def test_where_there_are_groups_all_but_the_last_token_is_claimed(grouped: Claims) -> None:
    one = request()
    grouped.begin(one)
    hashes = request().block_hashes
    found = list(one.block_hashes[:2])
    assert grouped.there(one, 2 * BLOCK) == len(IDS) - 1 - 2 * BLOCK
    assert one.block_hashes[:2] == found and not set(hashes[2:]) & set(one.block_hashes)
    grouped.allocated(one, TABLES, len(IDS) - 1 - 2 * BLOCK)
    # vLLM allocates again for the last token
    grouped.allocated(one, TABLES, 0)
    made = step(grouped, new={}, rows={})
    [task] = made.tasks.values()
    assert not made.batch and task.tables == tuple(map(tuple, TABLES)) and not task.blocks
    # from the first token on, but the hit's blocks stay as they are
    assert (task.found, task.write_from, task.rows, task.computes) == (32, 0, 1, COMPUTES)
    assert task.first_row == len(IDS) - 1 and task.prefix_cached == 0
    assert not step(grouped, new={"r": len(IDS) - 1}, rows={"r": 1}).batch
    grouped.results({"r": {"number": 1, "recomputed": []}}, {})
    report = grouped.finished(one)
    assert report is not None and report[PARAMS_KEY]["recomputed"] == []
    later = request(name="later")
    grouped.begin(later)
    assert not set(later.block_hashes) & set(one.block_hashes), "they are the blend's own"


def test_where_there_are_groups_no_more_is_computed_than_behind_the_hit(grouped: Claims) -> None:
    for hit, is_blended in ((80, True), (96, False)):
        one = request(name=str(hit))
        grouped.begin(one)
        assert bool(grouped.there(one, hit)) is is_blended
        assert (len(IDS) - hit > COMPUTES) is is_blended
    whole = request(replace(PLAN, ratio=1.0), "whole")
    grouped.begin(whole)
    assert grouped.there(whole, 0) == len(IDS) - 1


def test_where_there_are_groups_a_step_takes_few_blends(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other answers wait for them, on a CPU too."""
    monkeypatch.setattr(schedule.compat, "is_cpu", lambda: True)
    most = {}
    for count in (1, 2):
        config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=BLOCK),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
            kv_transfer_config=SimpleNamespace(engine_id="this"),
        )
        most[count] = Claims(config, SimpleNamespace(kv_cache_groups=[None] * count))._room
        most[count].take("a", 40)
    assert most[1].has(1 << 20)
    assert most[2].has(24) and not most[2].has(25)


def test_where_there_are_groups_a_begun_blend_that_is_not_worth_it_stays_one(
    grouped: Claims,
) -> None:
    """It was preempted, and vLLM finds most of it."""
    one = request()
    grouped.begin(one)
    grouped.allocated(one, TABLES, grouped.there(one, 0) or 0)
    step(grouped, new={}, rows={})
    grouped.results({"r": {"number": 1, "recomputed": [3]}}, {})
    assert grouped.there(one, 96) == 0
    report = grouped.finished(one)
    assert report is not None and "reason" not in report[PARAMS_KEY]
    assert report[PARAMS_KEY]["recomputed"] == [3]


def test_only_who_was_held_back_is_told_to_be_loaded(claims: Claims) -> None:
    """By a worker that does not know its model: it has loaded nothing."""
    worker: Any = object.__new__(CacheBlendHybridConnector)
    worker.step_timer, worker.worker_state, worker.rows = StepTimer(), WorkerState(), None
    worker._runner, worker._lost, worker._held_back = None, {}, set()
    worker._block_size = BLOCK
    one = request()
    for grouped in (False, True):
        claims.by_group = grouped
        claims.begin(one)
        there = claims.there(one, 0) or 0
        claims.allocated(one, TABLES if grouped else TABLES[1:], there)
        worker.bind_connector_metadata(BlendMetadata(step(claims, new={}, rows={})))
        held_back = {"r"} if grouped else set()
        assert worker._loaded() == (held_back, held_back)
        assert worker._loaded() == (set(), set()), "once"
        assert worker._lost.pop("r") == (set() if grouped else set(TABLES[1]))
