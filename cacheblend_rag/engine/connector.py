"""vLLM's KV connector: its hooks, turned into calls of the two sides. No policy of its own.

The scheduler's side says how much of a request is there; the worker's makes the rest rows of
vLLM's own step. See ``schedule.py`` and ``rows.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from cacheblend_rag.engine import binding, compat
from cacheblend_rag.engine.binding import RankMessages
from cacheblend_rag.engine.blend import Blender
from cacheblend_rag.engine.blends import Blends, Finished
from cacheblend_rag.engine.heap import Heap
from cacheblend_rag.engine.link import Link
from cacheblend_rag.engine.outcome import BlendOutcome, Refine, Refined
from cacheblend_rag.engine.refiner import Refiner
from cacheblend_rag.engine.schedule import Claims, Step
from cacheblend_rag.engine.start import BY_FRONT_DOOR
from cacheblend_rag.engine.weights import CHANGED
from cacheblend_rag.engine.worker_state import StepTimer, WorkerState
from cacheblend_rag.planner import Limits, Message
from cacheblend_rag.reason import Why

_KEEP_OUTCOMES = 1024


@dataclass
class BlendMetadata(KVConnectorMetadata):
    """Scheduler to workers, once a step."""

    step: Step


@dataclass
class BlendResults(KVConnectorWorkerMetadata):
    """Workers to scheduler: outcomes by request, as plain data, why blends failed, which requests
    could not even be computed, what each rank reports besides, what was refined, a handshake that
    had to wait for a step, and for which reset of vLLM's caches, if that was asked, whether weights
    were changed.
    """

    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, Why] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    messages: dict[int, list[Message]] = field(default_factory=dict)
    refined: list[tuple[str, Refined]] = field(default_factory=list)
    bound: dict[int, RankMessages] = field(default_factory=dict)
    weights_changed: tuple[int, bool] | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> BlendResults:
        """Rank 0's outcomes; any rank's failures."""
        assert isinstance(other, BlendResults)
        return BlendResults(
            other.outcomes | self.outcomes,
            other.failed | self.failed,
            other.lost | self.lost,
            other.messages | self.messages,
            self.refined,  # by one rank only
            other.bound | self.bound,
            self.weights_changed,  # all ranks have agreed
        )


class CacheBlendConnector(KVConnectorBase_V1):
    """Loaded by name (``kv_connector_module_path``); one instance a side. Beside it, vLLM turns its
    hybrid KV cache manager off.

    Attributes:
        claims: the scheduler's side.
        rows, refiner: the worker's side; None until the worker is bound.
        link: to the other side.
        worker_state, step_timer: of the worker's side.
        recent: what was done for the last requests, by the caller's names, for ``rpc``.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        scheduling = role == KVConnectorRole.SCHEDULER
        # Our front door starts engines with a fixed mark here, and binds the worker by RPC
        # afterwards. Anybody else's configuration has to be read, and the worker bound, while the
        # engine starts.
        self._binds = vllm_config.kv_transfer_config.kv_connector_extra_config != BY_FRONT_DOOR
        self.claims = (
            Claims(vllm_config, kv_cache_config, names=not self._binds) if scheduling else None
        )
        self.rows: Blends | None = None
        self.refiner: Refiner | None = None
        self.recent: OrderedDict[str, BlendOutcome | dict[str, Any]] = OrderedDict()
        self.worker_state, self.step_timer = WorkerState(), StepTimer()
        self.closing: Callable[[], None] | None = None  # closes the worker's store
        self._done: list[Finished] = []  # not yet reported
        self._lost: dict[str, set[int]] = {}  # requests and their blocks, not yet reported
        self._held_back = set[str]()  # requests of which nothing could be loaded, not yet reported
        self._block_size = int(vllm_config.cache_config.block_size)
        given = vllm_config.kv_transfer_config
        self.link = Link.of(str(given.engine_id))
        self._config = vllm_config
        self._runner: Any = None
        self._heap = Heap.of(vllm_config.device_config.device_type)
        self._bound: RankMessages | None = None  # a handshake that leaves with the next step
        self._weights_changed: tuple[int, bool] | None = None  # not yet reported
        if self._binds:  # what cannot be written must not be read, whatever vLLM's default is
            given.kv_load_failure_policy = "fail"

    @property
    def blender(self) -> Blender | None:
        """What decides on the worker's side; None until it is bound."""
        return self.rows.blender if self.rows is not None else None

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing waits for our saves: there are none."""
        # Newer vLLMs ask. Their default for a connector that reads and writes would throw away what
        # preempted requests have sampled.
        return False

    # ---- scheduler side ------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Before anything of a request is looked up."""
        assert self.claims is not None
        self.claims.begin(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens past the local hit vLLM need not schedule; None: ask again."""
        assert self.claims is not None
        # Asynchronous: vLLM holds the request back until all is loaded. Rows of the step need no
        # such wait.
        there = self.claims.there(request, num_computed_tokens)
        return there, bool(there) and self.claims.by_group

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Blocks were given: the blend goes to the workers with this step."""
        assert self.claims is not None
        self.claims.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> BlendMetadata:
        """What the workers have to know of this step."""
        assert self.claims is not None
        return BlendMetadata(self.claims.step(scheduler_output))

    def update_connector_output(self, connector_output: Any) -> None:
        """The workers' results."""
        results = connector_output.kv_connector_worker_meta
        if isinstance(results, BlendResults):
            assert self.claims is not None
            # News first: a plan made in this step should know what the same step's results say of
            # chunks.
            for rank, bound in sorted(results.bound.items()):
                self._bound_on(rank, bound)
            for rank, messages in sorted(results.messages.items()):
                self.claims.planning.deliver(rank, messages)
            if results.weights_changed is not None:
                number, changed = results.weights_changed
                self.claims.take_weights(number, changed=changed)
            self.claims.lose(results.lost)
            self.claims.results(results.outcomes, results.failed)
            self.claims.refinements.take(results.refined)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The report's engine part leaves with the last output."""
        assert self.claims is not None
        return False, self.claims.finished(request)

    def reset_cache(self) -> bool | None:
        """vLLM's caches are dropped, as they have to be where weights are changed in place."""
        # The stores keep what they have: it is of a model by its fingerprint.
        if self.claims is not None:
            self.claims.weights.begin()
        return True

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Where the names of blocks are kept, before the first step."""
        assert self.claims is not None
        self.claims.refinements.pool = gpu_block_pool

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """What the workers sent when they were bound."""
        assert self.claims is not None
        for rank, messages in sorted(metadata.items()):
            if isinstance(messages, RankMessages):  # others are of connectors beside ours
                self._bound_on(rank, messages)

    def _bound_on(self, rank: int, messages: RankMessages) -> None:
        assert self.claims is not None
        self.claims.planning.deliver(rank, messages.messages)
        if messages.store is not None and self.closing is None:
            list_anew, self.closing = binding.follow(self.link, *messages.store)
            self.claims.planning.opened = list_anew

    # ---- worker side ---------------------------------------------------------------------------

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins: the only hook that both runners call before every forward."""
        # Not in ``start_load_kv``, which is the documented place: newer vLLMs call that after the
        # forward, unless a load was scheduled in this very step.
        super().bind_connector_metadata(connector_metadata)
        self.step_timer.step_begins()
        if self._runner is not None:  # nobody asked for our handshake
            self._bind_unasked()
        step: Step = connector_metadata.step
        # of a scheduler's side in another process
        if step.spans:
            self.link.add_spans(step.spans)
        for job in step.shadows:
            self.link.add_shadow(job)
        if self.worker_state.shadow is not None:
            self.worker_state.shadow.hidden.watch(step.watch)
        for name, report in step.plain.items():
            self._remember(name, report)
        if step.checks_weights:
            self._check_weights(step.checks_weights)
        if self.rows is not None:
            self.rows.forget(step.gone)
            self.rows.begin_step(step.tasks, step.batch)
            for refine in step.refines:
                self._refine(refine)
        else:
            # The scheduler has claimed tokens for it: blocks that nobody writes must not be read.
            for name, task in step.tasks.items():  # a worker that does not know its model
                self._lost[name] = set(task.own_blocks(self._block_size))
                if task.tables:  # vLLM waits for word of these, and refuses it of others
                    self._held_back.add(name)

    def _check_weights(self, number: int) -> None:
        weights = self.worker_state.weights
        # Where the model is not known nothing is blended anyway.
        changed = weights is not None and weights.are_changed()
        self._weights_changed = number, changed
        if changed:
            self.worker_state.limits = Limits(why_not=CHANGED)

    def _refine(self, refine: Refine) -> None:
        assert self.refiner is not None  # there as long as the rows are
        outcome = self.recent.get(refine.name)
        self.refiner.run(refine, outcome if isinstance(outcome, BlendOutcome) else None)

    def register_kv_caches(self, kv_caches: Any) -> None:
        """The worker has its model now."""
        if self._binds:
            # Only remembered: vLLM warms up and captures its graphs between this and the handshake.
            # What is checked and measured then is the engine as it will run.
            self._runner = binding.model_runner()

    def get_handshake_metadata(self) -> RankMessages | None:
        """The engine is about to start."""
        if self._runner is None:
            return None
        is_alone = get_kv_transfer_group() is self
        if is_alone:
            return self._bind()
        self._bind_unasked()
        return None

    def _bind(self) -> RankMessages:
        runner, self._runner = self._runner, None
        with torch.inference_mode():
            return binding.bind(self, runner, self._config, linked=self.link.has_scheduler)

    def _bind_unasked(self) -> None:
        """Within vLLM's MultiConnector, which hands the first handshake that any connector has to
        all of them, and asks no further: ours leaves with the first step.
        """
        bound = self._bind()
        if self.link.has_scheduler:
            for message in bound.messages:
                self.link.send(message)
        else:
            self._bound = bound

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing to do: see ``bind_connector_metadata``."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Nothing is loaded between steps; requests that ended are forgotten."""
        if finished_req_ids:
            self._heap.request_ended()
        if self.rows is not None:
            # vLLM calls this after every forward. The last layer's K and V are known then.
            self.rows.prove()
            # An aborted request is not among the preempted ones, and its executor may hold a
            # transfer.
            self.rows.forget(finished_req_ids)
        if self.refiner is not None:
            self.refiner.forget(finished_req_ids)
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be written in any way: vLLM ends the requests that use them with an
        error (``kv_load_failure_policy="fail"``).
        """
        if self.rows is not None:
            self._lost |= self.rows.lost()
        return {block for blocks in self._lost.values() for block in blocks}

    def build_connector_worker_meta(self) -> BlendResults | None:
        """Results since the step before; of a blend that the GPU is still at, a step later."""
        for done in self.rows.finished() if self.rows is not None else ():
            self._done.append(done)
            self._remember(done.name, done.report() if done.why_not else done.outcome)
        waiting: list[Finished] = []
        # To ask a GPU for its times would wait for it. An outcome that is not there yet is sent
        # with a later step; until then no request may share the blend's blocks.
        ready: list[Finished] = []
        for done in self._done:
            (ready if done.why_not or done.outcome.ready else waiting).append(done)
        self._done = waiting
        outcomes = {d.request_id: d.result() for d in ready if d.why_not is None}
        failed = {d.request_id: d.why_not for d in ready if d.why_not is not None}
        lost, self._lost = set(self._lost), {}
        # In one process the scheduler's side has them already, by the link.
        messages = {} if self.link.has_scheduler else self._messages()
        refined = self.refiner.done() if self.refiner is not None else []
        bound, self._bound = self._bound, None
        changed, self._weights_changed = self._weights_changed, None
        if not (ready or lost or messages or refined or bound) and changed is None:
            return None
        own = {get_tensor_model_parallel_rank(): bound} if bound else {}
        return BlendResults(outcomes, failed, lost, messages, refined, own, changed)

    def _messages(self) -> dict[int, list[Message]]:
        messages = self.link.take()
        return {get_tensor_model_parallel_rank(): messages} if messages else {}

    def _remember(self, name: str, done: BlendOutcome | dict[str, Any]) -> None:
        self.recent.pop(name, None)  # the latest comes last
        self.recent[name] = done
        while len(self.recent) > _KEEP_OUTCOMES:
            self.recent.popitem(last=False)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: each layer is placed when its cache is updated."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing to save: chunks are ingested by RPC."""

    def wait_for_save(self) -> None:
        """Nothing to wait for."""

    def shutdown(self) -> None:
        """This side ends."""
        if self.closing is not None:
            self.closing()
        if self.claims is not None:
            self.claims.planning.close()


class CacheBlendHybridConnector(CacheBlendConnector, SupportsHMA):
    """Beside vLLM's hybrid KV cache manager: each kind of layers may have a group of blocks.
    Another class, since vLLM decides by a connector's class whether the manager is on.
    """

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See ``request_finished``."""
        return self.request_finished(request, [])

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The same, and which requests that vLLM held back have their KV."""
        super().get_finished(finished_req_ids)
        loaded, failed = self._loaded()
        assert not failed or compat.tells_failed_loads()
        return None, loaded or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """The same, and of which requests it could not be had: newer vLLMs ask. They end these with
        an error (``kv_load_failure_policy="fail"``).
        """
        super().get_finished(finished_req_ids)
        return compat.transfer_results(*self._loaded())

    def _loaded(self) -> tuple[set[str], set[str]]:
        # A worker that does not know its model has loaded nothing.
        unknown, self._held_back = self._held_back, set()
        loaded, failed = self.rows.loaded() if self.rows is not None else (set(), set())
        return loaded | unknown, failed | unknown
