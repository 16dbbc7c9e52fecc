"""The scheduler's side: how much of a request is there, and which rows of a step are blends'.

vLLM takes it that all but the tokens that a blend computes are there, at positions before those: it
then schedules as many rows as the blend has tokens to compute, in one step or several, whatever
else is in these steps. Which tokens these rows are, the workers say (``rows.py``).
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cacheblend_rag.engine import compat, handover
from cacheblend_rag.engine.ahead import Ahead
from cacheblend_rag.engine.base import adapter_name
from cacheblend_rag.engine.blend import rows_of
from cacheblend_rag.engine.blends import Scheduled
from cacheblend_rag.engine.hashes import (
    BlendedPrefixes,
    Prefix,
    cached,
    hide,
    is_cached,
    tokens_per_hash,
)
from cacheblend_rag.engine.link import Link
from cacheblend_rag.engine.names import is_beam
from cacheblend_rag.engine.outcome import BlendTask, Refine
from cacheblend_rag.engine.params import drop_unwritable
from cacheblend_rag.engine.planning import Planning
from cacheblend_rag.engine.refinement import Refinements
from cacheblend_rag.engine.room import Room, most_rows
from cacheblend_rag.engine.watching import Watch, Watching
from cacheblend_rag.engine.weights import CHANGED, Suspicion
from cacheblend_rag.learn import Span
from cacheblend_rag.plan import PARAMS_KEY, Kind, NoPlan, Plan
from cacheblend_rag.planner import Limits, Planned, Planner
from cacheblend_rag.reason import Reason, RefusedError, Why
from cacheblend_rag.shadow import Drawn, ShadowJob
from cacheblend_rag.shadow.report import waiting

_MOST_ENDED = 1024
_NOT_CHOSEN = Why(Reason.OTHER_CONNECTORS, "another KV connector has the prompt's KV")
_CACHED = Why(Reason.PREFIX_CACHED, "vLLM's prefix cache holds all that would be blended")
_CACHED_MOST = Why(
    Reason.PREFIX_CACHED,
    "a blend would compute no fewer tokens than vLLM's prefix cache leaves",
)


class _Claim(NamedTuple):
    """What is said of a request when it is scheduled first, or again after a preemption."""

    there: int  # tokens that vLLM is told are there, beside those that it found
    write_from: int  # positions below it are in the cache
    total: int  # tokens that the request has
    computes: int  # how many of them a blend computes
    rows: int  # the last ones of them, which vLLM schedules
    found: int | None = None  # by vLLM, where the blend is computed before the step

    @property
    def work(self) -> int:
        """Tokens that are computed with a step."""
        return self.rows if self.found is None else self.computes


class Step(NamedTuple):
    """Scheduler to workers, once a step.

    Attributes:
        tasks: blends that begin, by request; batch: all rows of a step that has some of a blend.
        gone: requests that were preempted.
        plain: reports of requests that are not blended, by the caller's names.
        spans: chunks that were learnt, and are to be computed.
        watch: rows of answers that are shadowed; shadows: answers that ended.
        refines: tokens of answers under way that are computed again before the model runs.
        checks_weights: for which reset of vLLM's caches the workers are to say whether the model's
            weights were changed; 0: for none.
    """

    tasks: dict[str, BlendTask]
    batch: dict[str, Scheduled]
    gone: set[str]
    plain: dict[str, dict[str, Any]]
    spans: Sequence[Span] = ()
    watch: Watch | None = None
    shadows: Sequence[ShadowJob] = ()
    refines: Sequence[Refine] = ()
    checks_weights: int = 0


@dataclass
class _Tracked:
    """What is known of an unfinished request that is planned.

    Attributes:
        name: by which its sender asks for its report.
        planning: the plan to come, until it is taken.
        why_not: why it is not blended (any more).
        exact: the exact hashes of the prompt's blocks.
        per_hash: tokens a hash stands for.
        space: whose it is, see ``Planner.space_id``.
        shared: tokens found in vLLM's prefix cache that others may use too.
        claim: of the blend under way; None before and once all of its rows are scheduled.
        drawn: its answer is to be shadowed, if it is blended.
    """

    request: Any  # vLLM's own
    name: str
    planning: Future[Planned] | None = None
    plan: Plan | None = None
    why_not: Why | None = None
    mode: str = "blend"
    proves: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    exact: Sequence[bytes] = ()
    per_hash: int = 1
    hidden_from: int | None = None  # the first block that nobody else finds, before it begins
    space: str = ""
    shared: int = 0
    claim: _Claim | None = None
    drawn: Drawn | None = None
    begun: bool = False  # its blend went to the workers once
    number: int = 0  # of its latest blend
    complete: bool = False  # all rows of the blend were scheduled
    outcome_known: bool = True  # of the latest blend
    prefix_cached: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)
    prefix: Prefix | None = None  # its blocks, once it ended
    not_refined: str = ""  # why not, where it was asked for

    def planned(self) -> dict[str, Any]:
        """The scheduler's part of the report."""
        plan = self.plan.to_dict() if self.plan is not None and self.begun else None
        drawn = self.drawn if plan is not None else None
        shadow = {} if drawn is None else {"shadow": waiting(drawn.template)}
        return {
            **shadow,
            "mode": self.mode,
            "plan": plan,
            "seconds": dict(self.seconds),
            "space": self.space,
            "tokens": len(self.request.prompt_token_ids or ()),
            "not_refined": self.not_refined,
        }

    def report(self) -> dict[str, Any]:
        """See ``report.make_report``; incomplete before the outcome is there."""
        why_not = self.why_not or (None if self.begun else _CACHED)
        done: Mapping[str, Any] = why_not._asdict() if why_not else self.outcome
        seconds = {**self.seconds, **done.get("seconds", {})}
        return {**self.planned(), **done, "seconds": seconds, "prefix_cached": self.prefix_cached}

    def take(self, outcome: dict[str, Any], number: int, *, is_whole: bool) -> None:
        """What became of blend ``number``; ``is_whole``: all of it was computed by then."""
        # That of a blend before a preemption says nothing of the blocks that it has now.
        is_latest = number == self.number
        self.outcome_known |= is_latest
        self.complete |= is_whole and is_latest
        self.outcome = self.outcome or outcome

    def usable(self, hit: int) -> int:
        """How many of the ``hit`` tokens are in the cache as they should be. After a preemption, a
        request finds blocks of its own that were not all computed.
        """
        return hit if self.complete else min(hit, self.shared)

    def handed_over(self) -> dict[str, Any]:
        """What the report tells an engine that goes on with the request, if one does."""
        first = None
        if self.begun and self.plan is not None and not self.why_not:
            first = _first_approximate(self.plan)
            first = first if first < self.plan.end else None
        sent = handover.sent(self.request, self.exact, self.per_hash, first)
        return {} if sent is None else {handover.KEY: sent}

    def hide(self) -> None:
        """Its own blocks were never written: it must not find them when it resumes."""
        first = self.shared // self.per_hash
        hide(self.request, first, uuid.uuid4().hex)
        self.complete = False

    def nothing_to_refine(self, write_from: int, block_size: int) -> str:
        """Why its blend can't be refined, ``write_from`` tokens of which are in the cache; empty if
        nothing speaks against it.
        """
        assert self.plan is not None
        first = _first_approximate(self.plan)
        if self.plan.ratio == 1 or max(first, write_from) >= self.plan.end:
            return "there was nothing to refine: the blend is exact"
        if self._is_approximate(write_from):
            return "it begins with blocks of an earlier blend, which others may read"
        if self.drawn is not None:  # which tells what a ratio is worth
            return "the answer was drawn to be shadowed, as it is without refinement"
        if self.exact and self.per_hash != block_size:
            return "vLLM hashes a part of a block"
        return ""

    def _is_approximate(self, tokens: int) -> bool:
        """Whether some of the first ``tokens``, which are in the cache, are there under hashes of a
        blend.
        """
        # By the blocks, not by the plan: the earlier blend's may have found another chunk here.
        some = slice(tokens // self.per_hash)
        return bool(self.exact) and self.request.block_hashes[some] != list(self.exact[some])

    def refuse(self, hit: int, why_not: Why) -> None:
        """It is not worth a blend, ``hit`` tokens of which are in the cache."""
        if self.begun:  # its answer is a blend's, of which vLLM found most
            return
        if self._is_approximate(hit):
            detail = f"{why_not.detail}; it begins with {hit} tokens of an earlier blend"
            why_not = Why(why_not.reason, detail)
        self.why_not = why_not

    def share(self, prefixes: BlendedPrefixes) -> None:
        """Its blocks are complete: others may use them."""
        if self.prefix is not None and self.plan is not None:
            prefixes.add(self.prefix, self.plan.settings)


class Claims:
    """The requests that carry a plan, from their arrival to their end.

    Args:
        names: their senders give them names of their own. Else vLLM's count: a name that any client
            may choose could be another's.

    Attributes:
        by_group: layers are in several KV cache groups, see ``groups.py``.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *, names: bool = True) -> None:
        self._names = names
        cache = vllm_config.cache_config
        self._block_size = int(cache.block_size)
        # Both sides of one process find the same link by the engine's id: vLLM makes them apart and
        # gives them nothing else in common.
        link = Link.of(str(vllm_config.kv_transfer_config.engine_id))
        self.planning = Planning(
            link, Planner(self._block_size, compat.longest_blend(kv_cache_config))
        )
        self._hash_block_size = getattr(cache, "hash_block_size", None)
        self.by_group = len(kv_cache_config.kv_cache_groups) > 1
        self._whole_graphs = whole_graphs(vllm_config)
        self._requests: dict[str, _Tracked] = {}
        self.refinements = Refinements(
            compat.refinement_refusal(vllm_config, kv_cache_config),
            self._block_size,
            int(vllm_config.scheduler_config.max_num_batched_tokens),
        )
        self._prefixes = BlendedPrefixes()
        self._ended: OrderedDict[str, _Tracked] = OrderedDict()  # whose outcomes have not come
        self._tasks: dict[str, BlendTask] = {}  # for the step being built
        self._plain: dict[str, dict[str, Any]] = {}  # reports of what is not blended
        self._ahead = Ahead(link)
        self._room = Room(most_rows(vllm_config, is_cpu=compat.is_cpu(), by_group=self.by_group))
        self._watching = Watching(link)
        # Plain requests too: a blend may be given blocks that one of them is still writing.
        self._live: dict[str, Any] = {}  # all requests that did not end, planned or not
        self.weights = Suspicion()

    def begin(self, request: Any) -> None:
        """A request arrived; nothing of it was looked up yet."""
        self._live[request.request_id] = request
        unwritable, given = drop_unwritable(request), request.kv_transfer_params
        options = given.get(PARAMS_KEY) if isinstance(given, Mapping) else None
        arrives = handover.arriving(given)
        plans = self.planning.planner.plans_all
        if options is None and arrives is None and not (unwritable or plans):
            return
        name = _name(request, options) if self._names else str(request.request_id)
        tracked = self._requests[request.request_id] = _Tracked(request, name)
        tracked.space = self.planning.planner.space_id(options)
        if arrives is not None:
            # Its options are the other engine's report, whose spaces have other names.
            tracked.space = tracked.space or self.planning.planner.space_id(None)
            tracked.why_not = Why(Reason.HANDED_OVER, arrives.detail)
            tracked.exact = list(request.block_hashes)
            handover.take(request, arrives, self._per_hash(request))
            return
        tracked.why_not = unwritable or self._refusal(request) or self._forged(options)
        # Begun before vLLM's first look-up: the plan decides by which hashes the request's blocks
        # are looked for.
        if tracked.why_not is None:
            adapter = adapter_name(request.lora_request)
            tracked.planning = self.planning.begin(
                request.prompt_token_ids, options or {}, adapter, request.cache_salt
            )
            self._take_plan(tracked)

    def _refusal(self, request: Any) -> Why | None:
        return Why(Reason.CUDA_GRAPHS, self._whole_graphs) if self._whole_graphs else _why(request)

    def _forged(self, options: object) -> Why | None:
        """A name that a client chose could be that of another's report."""
        if self._names or not isinstance(options, Mapping) or "request_id" not in options:
            return None
        return Why(Reason.MALFORMED_OPTIONS, "request_id is not for clients: leave it out")

    def _take_plan(self, tracked: _Tracked) -> None:
        """If the request is planned by now, its blocks get the hashes to look for."""
        if tracked.planning is None or not tracked.planning.done():
            return
        planned, tracked.planning = tracked.planning.result(), None
        plan, tracked.mode, tracked.seconds, tracked.proves, _, tracked.drawn = planned
        if isinstance(plan, NoPlan):
            tracked.why_not = Why(*plan)
            return
        tracked.plan, request = plan, tracked.request
        # A prompt shorter than a block, or no prefix caching: there is nothing to look up.
        if request.block_hashes:
            tracked.exact, tracked.per_hash = list(request.block_hashes), self._per_hash(request)
        pool = self.refinements.pool
        known = _blended_before(tracked, plan, self._prefixes, pool)
        if known is not None:
            request.block_hashes = known
        hides = known is None and plan.blend_if == "always"  # exact KV is no reason not to
        is_there = not hides and _is_cached(tracked, plan, pool)
        if self._live.keys() == {request.request_id} and not is_there:
            self._ahead.expect(request.request_id, plan)  # it begins with the next step
        if hides and tracked.exact:
            # What comes before the first approximate token is exact, so plain requests may share
            # those blocks.
            tracked.hidden_from = _first_approximate(plan) // tracked.per_hash
            hide(request, tracked.hidden_from, uuid.uuid4().hex)

    def _per_hash(self, request: Any) -> int:
        return tokens_per_hash(request, self._hash_block_size, self._block_size)

    def there(self, request: Any, hit: int) -> int | None:
        """How many tokens behind those that vLLM found need not be scheduled; None: ask again."""
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            return 0
        if tracked.planning is not None:  # what vLLM found, it found by other hashes
            self._take_plan(tracked)
            # vLLM leaves a request out of this step where it gets no number, and asks again with
            # the next one.
            return None
        # After a preemption vLLM asks again, and then finds blocks of this very request. Only what
        # it found at first is known to be written, and of use to others.
        if not tracked.begun:
            tracked.shared = tracked.prefix_cached = hit
        else:
            self.refinements.stop(request.request_id)
        if (why_not := self.weights.fault(self.planning.planner.why_not)) is not None:
            tracked.why_not = tracked.why_not or why_not
            if tracked.usable(hit) < hit:  # it would go on behind blocks that were never written
                tracked.hide()
                return None
        plan, write_from, tracked.claim = tracked.plan, tracked.usable(hit), None
        if plan is None or tracked.why_not or write_from >= plan.end:
            return self._not_blended(tracked)
        # Not the prompt's length: after a preemption, what was generated is prompt as well.
        total = int(request.num_tokens)
        try:
            claim = (_whole if self.by_group else _by_rows)(plan, total, hit, write_from)
            if _waits(tracked, claim.work, hit, self._live.values(), self._ahead, self._room):
                return None
        except RefusedError as refusal:
            tracked.refuse(hit, refusal.why)
            return self._not_blended(tracked)
        tracked.claim = claim
        # vLLM enters blocks into its cache when it allocates them, before a row is written. Under
        # these hashes only this request finds them.
        first, end = hit // tracked.per_hash, None if tracked.begun else tracked.hidden_from
        if end is None or first < end:
            hide(request, first, uuid.uuid4().hex, end)
            tracked.hidden_from = first
        return tracked.claim.there

    def _not_blended(self, tracked: _Tracked) -> int:
        """The workers keep its report: its last output never leaves where the front end ends it."""
        if not tracked.begun:
            self._plain[tracked.name] = tracked.report()
            self._ahead.forget(tracked.request.request_id)  # what was fetched for it
        return 0

    def allocated(self, request: Any, tables: Sequence[Sequence[int]], there: int) -> None:
        """A request is scheduled, and these are its blocks so far, of each KV cache group. So many
        tokens, of those that were claimed, are taken to be ``there``.
        """
        tracked = self._requests.get(request.request_id)
        if tracked is None or tracked.claim is None or tracked.plan is None:
            return
        if there != tracked.claim.there:  # its rows are not those of a blend
            tracked.claim, tracked.why_not = None, _NOT_CHOSEN
            self._not_blended(tracked)
            return
        claim, plan = tracked.claim, tracked.plan
        # Here and not in ``there``: vLLM asks there for requests that then find no room.
        is_first = not tracked.begun
        tracked.begun, tracked.complete, tracked.outcome_known = True, False, False
        tracked.number += 1
        drawn = tracked.drawn
        if drawn and not self._watching.begin(request, tracked.name, plan.ratio, drawn):
            tracked.drawn = None
        if is_first:
            _begin_refinement(self.refinements, tracked, claim.write_from, tables[0])
            compat.count_as_cached(request, _found(request, plan, claim.write_from))
        else:
            self.refinements.stop(request.request_id, is_blended_anew=True)
        if claim.found is not None:  # no row is a blend's, and what vLLM found is computed again
            tracked.claim, tracked.prefix_cached = None, 0
        task = _task(tracked, claim, tables)
        self._tasks[request.request_id] = task
        self._room.take(request.request_id, claim.work)
        self._ahead.begin(task)

    def step(self, scheduled: Any) -> Step:
        """What the workers have to know of the step that was built."""
        tasks, self._tasks = self._tasks, {}
        plain, self._plain = self._plain, {}
        checks = self.weights.ask(has_rows=bool(scheduled.num_scheduled_tokens))
        self._ahead.end_of_step()
        self._room.end_of_step(tasks if self.by_group else ())
        gone = set(scheduled.preempted_req_ids or ())
        _drop_without_outcome(self._requests[name] for name in gone & self._requests.keys())
        for name in gone:
            self.refinements.stop(name)
            self._room.free(name)
        self.refinements.take_blocks(scheduled)
        names = scheduled.num_scheduled_tokens
        watches = self._watching.has_any(names)
        watch = self._watching.step(_batch(scheduled)) if watches else None
        more = self.planning.observer.take(), watch, self._watching.take()
        if not any(t.claim for name in names if (t := self._requests.get(name))):
            return Step(tasks, {}, gone, plain, *more, self._refines(scheduled), checks)
        # Where the rows of a claim stand in the step depends on the rows of all other requests.
        # All requests of the step, not only blends: so workers need no lengths from their runner,
        # which keeps them in other places in each of vLLM's versions.
        batch = _batch(scheduled)
        for name, part in batch.items():
            tracked = self._requests.get(name)
            claim = tracked.claim if tracked is not None else None
            # With asynchronous scheduling the rows have not run yet. Complete means that all were
            # scheduled: the request's own next look-up comes after them.
            if tracked is None or not claim:
                continue
            left = claim.total - part.computed - part.known
            if left > 0:
                self._room.take(name, left)
            else:
                tracked.claim, tracked.complete = None, True
                self._room.free(name)
        return Step(tasks, batch, gone, plain, *more, checks_weights=checks)

    def take_weights(self, number: int, *, changed: bool) -> None:
        """The workers have said whether the model's weights were changed."""
        self.weights.take(number, changed=changed)
        if changed:
            self.planning.deliver(0, [Limits(why_not=CHANGED)])

    def _refines(self, scheduled: Any) -> Sequence[Refine]:
        """What is computed again with a step that has no rows of a blend. Nothing, where a request
        waits, or another one has rows in the step: nobody is to be later for it.
        """
        name = next(iter(scheduled.num_scheduled_tokens), "")
        if not self.refinements.has(name) or self._live.keys() != {name}:
            return ()
        tracked = self._requests.get(name)
        if tracked is None or not tracked.complete or not tracked.outcome or tracked.why_not:
            return ()
        return self.refinements.next(name, tracked.name, _batch(scheduled)[name].computed)

    def results(self, outcomes: Mapping[str, dict[str, Any]], failed: Mapping[str, Why]) -> None:
        """What the workers did."""
        for name, result in outcomes.items():
            outcome = dict(result)
            number = outcome.pop("number")
            tracked = self._requests.get(name)
            if tracked is not None:
                tracked.take(outcome, number, is_whole=self.by_group)
            # Only what the store knows to be gone. What it could not be asked for stays in the
            # index, or a short outage of a remote store would end all reuse.
            self.planning.lose(outcome.get("lost", ()))
            # A short answer may end before its outcome comes: until then nobody may share its
            # blocks.
            ended = self._ended.get(name)
            if ended is not None and number == ended.number:
                self._ended.pop(name).share(self._prefixes)
        for name, why_not in failed.items():
            if name in self._requests:
                self._requests[name].why_not, self._requests[name].outcome_known = why_not, True

    def lose(self, names: Iterable[str]) -> None:
        """These requests have blocks that were never written. vLLM ends those that still run. One
        that was preempted meanwhile must not find its blocks when it resumes.
        """
        for name in names:
            tracked = self._requests.get(name)
            if tracked is not None:
                tracked.hide()

    def finished(self, request: Any) -> dict[str, Any] | None:
        """A request ended; its report's engine part."""
        self._live.pop(request.request_id, None)
        tracked = self._requests.pop(request.request_id, None)
        self._tasks.pop(request.request_id, None)
        self._ahead.forget(request.request_id)
        self._room.free(request.request_id)
        if tracked is None:
            return None
        self._watching.ended(request, blended=tracked.complete and not tracked.why_not)
        refined = self.refinements.report(request.request_id)
        self.refinements.forget(request.request_id)
        is_whole = tracked.complete and not tracked.why_not and tracked.plan is not None
        if is_whole and not self.by_group:  # several groups' hits were not tested
            # Not before the end: with the answer's blocks, the next turn of a chat finds this one
            # whole.
            tracked.prefix = Prefix.of(request, tracked.exact, tracked.per_hash)
            if tracked.outcome_known:  # not that of an earlier blend, before a preemption
                tracked.share(self._prefixes)
            else:  # it ended in the very step of its blend
                self._ended[request.request_id] = tracked
                while len(self._ended) > _MOST_ENDED:
                    self._ended.popitem(last=False)
        # vLLM hands this on with the request's last output, as ``kv_transfer_params``.
        return {PARAMS_KEY: {**tracked.report(), **tracked.handed_over(), "refined": refined}}


def _waits(
    tracked: _Tracked, rows: int, hit: int, live: Iterable[Any], ahead: Ahead, room: Room
) -> bool:
    """Whether a blend of so many ``rows`` should not begin with this step. vLLM leaves the request
    out of it then, and asks again with the next one.

    Raises:
        RefusedError: it is not worth it.
    """
    request, plan = tracked.request, tracked.plan
    assert plan is not None
    # After a preemption the chunks are in memory, or were seen to be missing: no waiting for them
    # again.
    is_first = not tracked.begun
    # What costs least comes first: whoever waits is asked again with every step.
    if is_first and ahead.is_fetching(request.request_id):
        return True
    if not room.has(rows):
        if is_first:
            ahead.look_ahead(request.request_id, plan)
        return True
    if not _is_written(request, live, hit // tracked.per_hash, tracked.per_hash):
        return True
    return is_first and ahead.waits(request.request_id, plan)


def _drop_without_outcome(preempted: Iterable[_Tracked]) -> None:
    """vLLM ends a request whose blocks were lost with an error only while it runs. One that was
    preempted before that was known would keep the token that was sampled from such blocks.
    """
    for tracked in preempted:
        if not tracked.outcome_known:
            compat.drop_output_in_flight(tracked.request)


def _by_rows(plan: Plan, total: int, hit: int, write_from: int) -> _Claim:
    """To vLLM, a claim is tokens that are there already: it schedules rows for the others only.
    Which tokens these rows compute is decided by the worker.
    """
    computes = rows_of(plan, total, write_from)
    rows = min(computes, total - hit)
    return _Claim(total - rows - hit, write_from, total, computes, rows)


def _whole(plan: Plan, total: int, hit: int, write_from: int) -> _Claim:
    """All but the last token is there once the worker has computed it, from the first one on: of
    layers with a window, vLLM hands on nothing of its hit that lies before the last window.

    Raises:
        RefusedError: there is no less to compute than behind the hit.
    """
    computes = rows_of(plan, total, 0)
    if hit and computes >= total - hit:
        raise RefusedError(*_CACHED_MOST)
    return _Claim(total - 1 - hit, 0, total, computes, 1, hit)


def _task(tracked: _Tracked, claim: _Claim, tables: Sequence[Sequence[int]]) -> BlendTask:
    """What the workers do for a claim."""
    request, plan = tracked.request, tracked.plan
    assert plan is not None
    return BlendTask(
        request_id=request.request_id,
        name=tracked.name,
        # Of this moment: the request goes on to grow while its task is on the way.
        token_ids=tuple(request.all_token_ids[: claim.total]),
        question=plan.question_ids(request.prompt_token_ids),
        plan=plan,
        blocks=() if claim.found is not None else tuple(tables[0]),
        write_from=claim.write_from,
        computes=claim.computes,
        rows=claim.rows,
        prefix_cached=tracked.prefix_cached,
        planned=tracked.planned(),
        proves=tracked.proves,
        number=tracked.number,
        adapter=request.lora_request,
        tables=() if claim.found is None else tuple(map(tuple, tables)),
        found=claim.found or 0,
    )


def _found(request: Any, plan: Plan, write_from: int) -> int:
    """Tokens of a prompt that were in chunks, or in vLLM's prefix cache; never its last one."""
    return min(write_from + plan.found_from(write_from), int(request.num_prompt_tokens) - 1)


def _blended_before(
    tracked: _Tracked, plan: Plan, prefixes: BlendedPrefixes, pool: Any
) -> list[bytes] | None:
    """The hashes by which vLLM finds blocks of an earlier blend with this beginning; None where
    there are none, or where it has as many exact ones.
    """
    # The blocks of an earlier blend with this beginning are as good as those of a new one, and vLLM
    # finds them by itself.
    exact, prompt = tracked.exact, tracked.request.prompt_token_ids
    known = prefixes.find(exact, prompt, plan.settings, tracked.per_hash)
    is_choosy = known is not None and plan.blend_if == "faster"
    if is_choosy and 0 < cached(pool, exact) >= cached(pool, known or ()):
        return None
    return known


def _is_cached(tracked: _Tracked, plan: Plan, pool: Any) -> bool:
    """Whether vLLM has blocks of what would be blended."""
    first = -(-_first_approximate(plan) // tracked.per_hash)
    return is_cached(pool, tracked.request.block_hashes, first)


def _is_written(request: Any, live: Iterable[Any], found: int, per_hash: int) -> bool:
    """Whether the blocks that vLLM found are written when the step begins. It hands on blocks as
    soon as they are allocated, which may be for another request of this very step, whose own rows
    come in time then. A blend, or what stands in for one, reads them before the step.

    ``live``: all requests that did not end.
    """
    # ``num_computed_tokens`` counts a running request's tokens before this step's rows, so the
    # blocks after it are being written now or later.
    wanted = set(request.block_hashes[:found])
    return not wanted or not any(
        wanted.intersection(other.block_hashes[other.num_computed_tokens // per_hash :])
        for other in live
        if other is not request and other.status.name == "RUNNING"
    )


def _begin_refinement(
    refinements: Refinements, tracked: _Tracked, write_from: int, blocks: Sequence[int]
) -> None:
    """Note from where on a blend is to be computed again, if that is wanted and can be had."""
    request, plan = tracked.request, tracked.plan
    if plan is None or plan.refine == "off":
        return
    why_not = tracked.nothing_to_refine(write_from, refinements.block_size)
    tracked.not_refined = why_not or refinements.refusal(request)
    if not tracked.not_refined:
        start = max(_first_approximate(plan), write_from)
        refinements.begin(request, plan.refine, start, blocks, tracked.exact)


def _name(request: Any, options: object) -> str:
    """By what name the sender of a request asks for its report."""
    name = options.get("request_id") if isinstance(options, Mapping) else None
    return str(name or request.request_id)


def _why(request: Any) -> Why | None:
    """Why a request can't be blended, whatever is in its prompt."""
    sampling = request.sampling_params
    if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
        return Why(Reason.PROMPT_EMBEDS, "the prompt is given as embeddings")
    if sampling is None:
        return Why(Reason.NOT_GENERATIVE, "the request generates no text")
    # Its name and number stay, its weights change: chunks computed before would be another
    # adapter's.
    if request.lora_request is not None and request.lora_request.load_inplace:
        return Why(Reason.LORA, "the request loads its LoRA adapter anew, in another one's place")
    if request.has_encoder_inputs:
        return Why(Reason.ENCODER_INPUTS, "the prompt contains images or other encoder inputs")
    # Its options and its tenant's space do not come with it: neither mode="off" nor a namespace
    # would hold.
    if is_beam(request.request_id):
        return Why(Reason.BEAM_SEARCH, "vLLM hands on no options to the beams of a beam search")
    # Newer vLLMs do not let a connector claim anything for such a request; older ones ask.
    if sampling.prompt_logprobs is not None:
        return Why(Reason.PROMPT_LOGPROBS, "prompt_logprobs needs every prompt token computed")
    # vLLM then takes nothing of what a connector has, either.
    if getattr(request, "skip_reading_prefix_cache", False):
        return Why(Reason.SKIPS_CACHE, "skip_reading_prefix_cache has every prompt token computed")
    return None


def _first_approximate(plan: Plan) -> int:
    """The first position whose KV may differ from a full prefill's."""
    near = (s.start for s in plan.segments if s.kind not in (Kind.FRESH, Kind.EXACT))
    return next(near, plan.end)


def _batch(scheduled: Any) -> dict[str, Scheduled]:
    """All rows of a step."""
    cached = scheduled.scheduled_cached_reqs
    computed = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
    computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    # Of one KV cache group: models with several are refused.
    blocks = dict(zip(cached.req_ids, cached.new_block_ids, strict=True))
    new = {name: tuple(b[0]) for name, b in blocks.items() if b}
    drafts = scheduled.scheduled_spec_decode_tokens
    return {
        name: Scheduled(computed[name], rows, new.get(name, ()), len(drafts.get(name, ())))
        for name, rows in scheduled.num_scheduled_tokens.items()
    }


def whole_graphs(vllm_config: Any) -> str:
    """Why steps with prefills can't be changed layer by layer; empty if they can: those that are
    one CUDA graph call no hook of ours, nor does a cache update inside a piece of one.
    """
    from vllm.config import CUDAGraphMode

    compiling = vllm_config.compilation_config
    mode = compiling.cudagraph_mode or CUDAGraphMode.NONE
    if mode.mixed_mode() == CUDAGraphMode.FULL:
        return f"cudagraph_mode is {mode.name}: steps with prefills are one CUDA graph"
    if compiling.use_inductor_graph_partition:
        return "use_inductor_graph_partition is on: a layer's cache update is no call of its own"
    if any("kvcache" in name and on is True for name, on in vars(compiling.pass_config).items()):
        return "a compiler pass fuses a layer's cache update with its rotation"
    if vllm_config.parallel_config.use_ubatching:
        return "dual batch overlap is on: a step is run in two halves"
    kind = "mla_" if vllm_config.model_config.use_mla else ""
    update = f"vllm::unified_{kind}kv_cache_update"
    if mode.has_piecewise_cudagraphs() and update not in (compiling.splitting_ops or []):
        return f"{update} is not among compilation_config.splitting_ops"
    return ""
