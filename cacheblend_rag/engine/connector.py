"""vLLM's KV connector hooks, turned into our calls. No policy: the plan in the request decides.

Scheduler side: claims the plan's region as external tokens and hands the blend to the workers.
Worker side: runs it before (sync) or between (async, in pieces) the engine's own forwards.
Whatever goes wrong is reported as blocks that failed to load, and vLLM computes them itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.logger import init_logger

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.outcome import WAITS, BlendOutcome, BlendTask
from cacheblend_rag.plan import MAX_QUESTION_TOKENS, PARAMS_KEY, SALT_PREFIX, Kind, Plan
from cacheblend_rag.reason import Reason, RefusedError, Why

if TYPE_CHECKING:
    from cacheblend_rag.engine.blend import Blender

logger = init_logger("vllm.cacheblend_rag")
_IDENTICAL = Why(Reason.IDENTICAL_PLAN, "an identical plan was blended before: vLLM's prefix cache")
_KEEP_OUTCOMES = 1024
_MOST_WAITING = 8  # background blends that hasten one another
_AHEAD = 1  # background blends whose KV may come while another one computes: it takes GPU memory


@dataclass
class BlendMetadata(KVConnectorMetadata):
    """Scheduler to workers, once a step."""

    sync: list[BlendTask] = field(default_factory=list)
    background: list[BlendTask] = field(default_factory=list)
    plain: dict[str, dict[str, Any]] = field(default_factory=dict)  # reports of what is not blended
    idle: bool = False  # the engine computes nothing in this step


@dataclass
class BlendResults(KVConnectorWorkerMetadata):
    """Workers to scheduler: outcomes by request, as plain data, and why blends failed."""

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, Why] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> BlendResults:
        """Rank 0's outcomes; any rank's failures."""
        assert isinstance(other, BlendResults)
        return BlendResults(other.outcomes | self.outcomes, other.failed | self.failed)


@dataclass
class _Tracked:
    """What the scheduler side knows of an unfinished request that carries a plan."""

    plan: Plan | None
    refusal: Why | None = None  # why it is not blended (any more)
    end: int = 0  # positions below it are the blend's, once it is asked for
    background: bool = False
    cached_whole: bool = False  # an identical plan's blocks were all found
    prefix_cached: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """See ``report.make_report``; not whole before the outcome is there."""
        if self.refusal:
            done: Mapping[str, Any] = self.refusal._asdict()
        else:
            done = _IDENTICAL._asdict() if self.cached_whole else self.outcome
        return {**done, "prefix_cached": self.prefix_cached}


@dataclass(eq=False)
class _Job:
    """A background blend under way, on one worker."""

    task: BlendTask
    steps: Iterator[str | None]
    waits: bool = True  # its KV is on the way


class CacheBlendConnector(KVConnectorBase_V1):
    """Loaded by name (``kv_connector_module_path``); one instance a side.

    Attributes:
        beside: the blender of the only worker where that lives in the scheduler's process, as
            vLLM has it for one GPU. What it refuses is then never asked for, which saves a step.
    """

    beside: ClassVar[Blender | None] = None

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = int(vllm_config.cache_config.block_size)
        self._longest = compat.longest_blend(kv_cache_config)
        self._requests: dict[str, _Tracked] = {}  # scheduler
        self._metadata = BlendMetadata()  # scheduler: for the step being built
        self._running: set[str] = set()  # scheduler: served by the step before, not finished
        self._expects = False  # scheduler: a blend of the step being built was announced
        self.blender: Blender | None = None  # worker: set by WorkerExtension
        # worker: what was done, by the caller's name of the request
        self.recent: OrderedDict[str, BlendOutcome | dict[str, Any]] = OrderedDict()
        self._jobs: list[_Job] = []  # worker: the first one computes
        self._done: list[tuple[str, BlendOutcome]] = []  # worker: not yet reported
        self._failed: dict[str, Why] = {}  # worker
        self._failed_blocks: set[int] = set()  # worker
        self._loaded: set[str] = set()  # worker: background blends that ended

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing waits for our saves: there are none."""
        return False

    # ---- scheduler side ------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens past the local hit we bring, and whether between steps."""
        tracked = self._track(request)
        if tracked is None:
            return 0, False
        if tracked.plan is None:
            return self._not_blended(request, tracked)
        if not tracked.outcome:  # else it resumes after a preemption: its report stays
            tracked.prefix_cached = num_computed_tokens
            tracked.cached_whole = num_computed_tokens >= tracked.plan.end
        if tracked.refusal or num_computed_tokens >= tracked.plan.end:
            return self._not_blended(request, tracked)
        if self.beside is not None and not tracked.end:  # once: vLLM asks again while it waits
            tracked.refusal, _ = self.beside.consider(tracked.plan)
            if tracked.refusal:
                return self._not_blended(request, tracked)
        schedule = tracked.plan.schedule
        tracked.background = schedule == "async" or (schedule == "auto" and bool(self._running))
        if not tracked.end and not tracked.background:
            self._expect(request.request_id, tracked.plan)
        tracked.end = _claimed(tracked.plan, request.num_prompt_tokens, self._longest)
        return tracked.end - num_computed_tokens, tracked.background

    def _not_blended(self, request: Any, tracked: _Tracked) -> tuple[int, bool]:
        """The workers keep its report: its last output never leaves where the front end ends it."""
        self._metadata.plain[_name(request)] = tracked.report()
        return 0, False

    def _expect(self, request_id: str, plan: Plan) -> None:
        """Have the KV of a step's first blend come while the rest of the step is prepared."""
        if self.beside is None or self._expects:
            return
        self._expects = True
        try:
            self.beside.expect(request_id, plan)
        except Exception:  # it comes later then; what is wrong shows where the worker reports it
            logger.exception("the KV of %s was not brought ahead", request_id)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks were given: the blend goes to the workers with this step."""
        tracked = self._requests.get(request.request_id)
        if num_external_tokens == 0 or tracked is None or tracked.plan is None:
            return
        plan, ids, end = tracked.plan, request.prompt_token_ids, tracked.end
        num_blocks = -(-end // self._block_size)
        task = BlendTask(
            request_id=request.request_id,
            name=_name(request),
            end=end,
            token_ids=tuple(ids[:end]),
            question=plan.question_ids(ids),
            plan=plan,
            blocks=tuple(blocks.get_block_ids()[0][:num_blocks]),
            write_from=end - num_external_tokens,
            background=tracked.background,
        )
        (self._metadata.background if tracked.background else self._metadata.sync).append(task)

    def build_connector_meta(self, scheduler_output: Any) -> BlendMetadata:
        """This step's blends; also notes whom the engine is serving."""
        metadata, self._metadata = self._metadata, BlendMetadata()
        self._expects = False
        self._running = set(scheduler_output.num_scheduled_tokens)
        metadata.idle = not self._running
        self._running |= {task.request_id for task in metadata.background}
        return metadata

    def update_connector_output(self, connector_output: Any) -> None:
        """The workers' results. A failed blend must not be asked for again."""
        results = connector_output.kv_connector_worker_meta
        if results is None:
            return
        for request_id, outcome in results.outcomes.items():
            tracked = self._requests.get(request_id)
            if tracked is not None and not tracked.outcome:
                tracked.outcome = outcome
        for request_id, refusal in results.failed.items():
            if request_id in self._requests:
                self._requests[request_id].refusal = refusal

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The report's engine part leaves with the last output."""
        self._running.discard(request.request_id)
        tracked = self._requests.pop(request.request_id, None)
        if tracked is None:
            return False, None
        return False, {PARAMS_KEY: tracked.report()}

    def _track(self, request: Any) -> _Tracked | None:
        if request.request_id not in self._requests:
            if PARAMS_KEY not in (request.kv_transfer_params or {}):
                return None
            self._requests[request.request_id] = self._admit(request)
        return self._requests[request.request_id]

    def _admit(self, request: Any) -> _Tracked:
        """Read a request's plan; refuse what is not exact or would poison the prefix cache."""
        try:
            plan = Plan.from_params(request.kv_transfer_params)
        except ValueError as error:
            return _refused(None, Reason.MALFORMED_PLAN, str(error))
        assert plan is not None
        sampling = request.sampling_params
        if plan.end >= request.num_prompt_tokens:
            return _refused(plan, Reason.NO_TOKEN_LEFT, "the plan leaves vLLM no token to compute")
        if request.cache_salt != plan.salt(request.prompt_token_ids):
            detail = f"cache_salt is not the plan's own ({SALT_PREFIX}...)"
            return _refused(plan, Reason.WRONG_SALT, detail)
        if self._longest is not None and plan.end > self._longest:
            detail = f"vLLM keeps {self._longest} tokens for this model's sliding window"
            return _refused(plan, Reason.SLIDING_WINDOW, f"{detail}, the plan covers {plan.end}")
        if request.lora_request is not None:
            return _refused(plan, Reason.LORA, "the request uses a LoRA adapter")
        if request.has_encoder_inputs:
            detail = "the prompt contains images or other encoder inputs"
            return _refused(plan, Reason.ENCODER_INPUTS, detail)
        if sampling is not None and sampling.prompt_logprobs is not None:
            detail = "prompt_logprobs needs every prompt token computed"
            return _refused(plan, Reason.PROMPT_LOGPROBS, detail)
        return _Tracked(plan)

    # ---- worker side ---------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Run this step's sync blends to their end, and of the background blends as many pieces as
        fit beside one step, for each blend that waits: one alone hardly delays who decodes, many
        must not pile up. Where nobody decodes, as if many waited. The KV of the next one comes
        meanwhile.

        Every tensor parallel rank sees the same metadata in the same steps, so all advance alike.
        """
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, BlendMetadata)
        for name, report in metadata.plain.items():
            if name not in self.recent:
                self._remember(name, report)
        for task in metadata.sync:
            for _ in self._blend(task):
                pass
        self._jobs += [_Job(task, self._blend(task)) for task in metadata.background]
        waiting = _MOST_WAITING if metadata.idle else min(len(self._jobs), _MOST_WAITING)
        for _ in range(waiting * (self.blender.pieces if self.blender else 1)):
            if not self._jobs or self._advance(self._jobs[0]):
                break
        for job in self._jobs[1 : 1 + _AHEAD]:
            if job.waits:
                self._advance(job)

    def _advance(self, job: _Job) -> bool:
        """Take a blend's next step; whether it has to wait for its KV."""
        state = next(job.steps, self)
        job.waits = state is WAITS
        if state is self:
            self._loaded.add(job.task.request_id)
            self._jobs.remove(job)
        return job.waits

    def _blend(self, task: BlendTask) -> Iterator[str | None]:
        try:
            if self.blender is None:
                raise RuntimeError("the worker was not bound (collective_rpc 'cacheblend_bind')")
            outcome = self.blender.start(task)
            yield from self.blender.steps(task, outcome)
        except RefusedError as refusal:
            self._leave_to_vllm(task, refusal.why)
            return
        except Exception as error:  # any failure here costs time only: vLLM recomputes the blocks
            logger.exception("blend of %s failed; its blocks are recomputed", task.request_id)
            detail = f"blending failed, computed exactly: {type(error).__name__}: {error}"
            self._leave_to_vllm(task, Why(Reason.BLEND_FAILED, detail))
            return
        self._done.append((task.request_id, outcome))
        self._remember(task.name, outcome)

    def _leave_to_vllm(self, task: BlendTask, why: Why) -> None:
        self._failed_blocks |= set(task.blocks[task.write_from // self._block_size :])
        self._failed[task.request_id] = why
        self._remember(task.name, {**why._asdict(), "prefix_cached": task.write_from})

    def _remember(self, name: str, done: BlendOutcome | dict[str, Any]) -> None:
        self.recent[name] = done
        while len(self.recent) > _KEEP_OUTCOMES:
            self.recent.popitem(last=False)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Background blends that ended, well or not."""
        loaded, self._loaded = self._loaded, set()
        return None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks vLLM has to compute itself."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def build_connector_worker_meta(self) -> BlendResults | None:
        """Results since the step before; of a blend that the GPU is still at, a step later."""
        ready = [(name, outcome) for name, outcome in self._done if outcome.ready]
        self._done = [(name, outcome) for name, outcome in self._done if not outcome.ready]
        failed, self._failed = self._failed, {}
        outcomes = {name: outcome.to_dict() for name, outcome in ready}
        return BlendResults(outcomes, failed) if outcomes or failed else None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: blends are complete before the forward."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing to save: chunks are ingested by RPC."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""


def _name(request: Any) -> str:
    """The caller's name of a request that carries a plan, which may be malformed."""
    data = request.kv_transfer_params[PARAMS_KEY]
    name = data.get("request_id") if isinstance(data, Mapping) else None
    return str(name or request.request_id)


def _refused(plan: Plan | None, reason: Reason, detail: str) -> _Tracked:
    return _Tracked(plan, Why(reason, detail))


def _claimed(plan: Plan, num_prompt_tokens: int, longest: int | None) -> int:
    """The end of what a blend computes: all but the prompt's last token, so that vLLM's own step is
    one of decoding, by its CUDA graphs and beside others that decode. Tokens behind the plan's end
    join a pass that runs anyway; where none does, or they are many, they are left to vLLM.
    """
    runs = any(
        s.kind is Kind.FRESH or (plan.ratio and s.kind is not Kind.EXACT) for s in plan.segments
    )
    last = num_prompt_tokens - 1
    fits = longest is None or last <= longest
    return last if runs and fits and last - plan.end <= MAX_QUESTION_TOKENS else plan.end
