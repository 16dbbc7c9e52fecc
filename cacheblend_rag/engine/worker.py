"""``worker_extension_cls``: vLLM mixes it into its worker, and we reach it by ``collective_rpc``.

Arguments and results are plain lists, strings, numbers and bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from cacheblend_rag.costs import Costs
from cacheblend_rag.engine import answers, compat, shadow
from cacheblend_rag.engine.adapters import Adapters, request_of
from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.base import as_result
from cacheblend_rag.engine.blend import Blender
from cacheblend_rag.engine.blends import Blends
from cacheblend_rag.engine.executors import open_executors
from cacheblend_rag.engine.fingerprint import fingerprint
from cacheblend_rag.engine.forward import ModelHandle, UnsupportedModelError
from cacheblend_rag.engine.groups import open_blends, refuse_groups
from cacheblend_rag.engine.heads import heads_of
from cacheblend_rag.engine.ingest import Ingestor
from cacheblend_rag.engine.queries import Queries
from cacheblend_rag.engine.refiner import Refiner
from cacheblend_rag.engine.rope import context_length, tables_of
from cacheblend_rag.engine.runner import step_tensors
from cacheblend_rag.engine.selfcheck import measured
from cacheblend_rag.engine.shadow import ShadowWorker
from cacheblend_rag.engine.slices import SlicedIngestor
from cacheblend_rag.engine.stored import RankStore
from cacheblend_rag.engine.weights import CHANGED, Weights
from cacheblend_rag.errors import CacheBlendError, EngineError
from cacheblend_rag.known import News, Row
from cacheblend_rag.plan import PromptPrefix
from cacheblend_rag.planner import Learning, Limits, Message, Space
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.store import open_store
from cacheblend_rag.store.base import ChunkInfo, ChunkKV
from cacheblend_rag.store.follow import row_of
from cacheblend_rag.store.learnt import LearningStore
from cacheblend_rag.store.memory import MemoryStore
from cacheblend_rag.store.url import parse_url

if TYPE_CHECKING:
    from vllm.config import VllmConfig


logger = init_logger("vllm.cacheblend_rag")


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    """Hand an error to the caller as a result. Raised here, ours would arrive nameless, and of
    several ranks' answers vLLM would leave all behind the first error for the call that comes next.
    """

    @functools.wraps(method)
    def run(*args: Any) -> Any:
        try:
            return method(*args)
        # Errors of vLLM, torch and the store alike: the caller's process knows no more than what is
        # returned.
        except Exception as error:  # whatever it is, the caller raises it
            if not isinstance(error, CacheBlendError):
                logger.exception("%s failed", method.__name__)
            return as_result(error, "the engine's worker failed")

    return run


class WorkerExtension(Queries):
    """Binds the model to the connector, and ingests. Prefixed names: the worker has its own."""

    if TYPE_CHECKING:
        device: torch.device
        vllm_config: VllmConfig
        model_runner: Any
        get_model: Any

    def cacheblend_inspect(self) -> dict[str, Any]:
        """Fingerprint of what was loaded on this rank, or why it can't be blended."""
        model, facts = self.get_model(), dict[str, Any](fingerprint="")
        try:
            others = compat.draft_layers(self.model_runner)
            handle = ModelHandle(model, self.vllm_config, self.device, others)
            handle.adapters = Adapters(self.model_runner)
            chosen = self.vllm_config.model_config
            max_len = int(chosen.max_model_len)
            # Not only what this engine serves: chunks are named by the tables, and another engine
            # of the same model may serve more.
            longest = max(max_len, context_length(chosen))
            sizes = sorted({int(layer.head_size) for layer in handle.layers})
            tables = tables_of(model, longest, *sizes)
            self._state().heads = heads_of(handle)
            caches = self.model_runner.kv_cache_config
            refuse_groups(self.vllm_config, caches)
            cache = PagedCache(handle, self.model_runner.attn_groups)
            tensors = step_tensors(self.model_runner, handle)
            rope, facts["checks"], facts["attention"] = measured(handle, cache, tables, max_len)
            rope.check_reaches(max_len)
            self._state().parts = handle, rope, cache
            self._state().weights = Weights(model, handle.ranks, **compat.moves(self.vllm_config))
            self._connector().rows = open_blends(cache, tensors, caches)
            most, recent = shadow.longest(self.vllm_config, self.device), self._connector().recent
            self._state().shadow = ShadowWorker(handle, tensors, most, recent)
            self._connector().refiner = Refiner(cache, self._connector().step_timer)
            a_layer = handle.layout.numbers * chosen.dtype.itemsize
            facts["kv_bytes_per_token"] = handle.num_layers * a_layer
            windows = [w for layer in handle.layers if (w := compat.sight(layer).least())]
            facts["window"] = max(windows, default=None)
            facts["longest_blend"] = compat.longest_blend(caches)
            facts["positions"] = rope.positions
            ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
            facts["fingerprint"] = fingerprint(model, self.vllm_config, rope, *ranks)
        except UnsupportedModelError as error:
            # No failure: the model is served without blending, and all reports say why.
            facts["refusal"] = list(error.why)
        self._state().facts = facts
        return facts

    @_reporting
    def cacheblend_bind(
        self, store_url: str, fingerprint: str, gpu_cache: int = 0, tenant: str = ""
    ) -> bool:
        """Open the store. Blends begin with ``cacheblend_limit``. Returns whether the scheduler's
        side learns at once what this rank does.

        ``gpu_cache``: bytes of GPU memory for chunks that are used often. ``tenant``: whose chunks
        they are.
        """
        self._open_store(store_url, fingerprint, gpu_cache, tenant)
        return self._connector().link.has_scheduler

    def _open_store(
        self,
        url: str,
        fingerprint: str,
        gpu_cache: int,
        tenant: str,
        *,
        follows: bool = True,
        learning: Learning | None = None,
    ) -> None:
        """``follows``: the scheduler's side learns from this rank what becomes of the store."""
        handle, rope, cache = self._state().parts
        heads = self._state().heads
        # On each rank: files and remotes hold whole chunks, of which a rank reads its own heads.
        store = open_store(url, namespace=fingerprint[:32], tenant=tenant, heads=heads)
        if learning is not None:
            memory = MemoryStore(learning.options.capacity_bytes, heads=heads)
            store = LearningStore(store, memory, learning.options.ttl_s)
            self._send(learning)
        # of ranks that share a store, one answers for it
        # In memory, each rank has what it has put, and all must be asked. On a shared store they
        # would give the same answer several times, and take as many look-ups.
        is_shared = parse_url(url).scheme != "memory"
        self._state().is_replica = heads is not None and is_shared and not heads.leads
        self._state().executors = open_executors(handle, rope, cache, gpu_cache)
        blender = Blender(handle, rope, store, self._state().executors)
        self._rows().blender = blender
        self._state().ingestor = Ingestor(handle, heads)
        self._state().sliced = SlicedIngestor(handle, heads)
        self._state().is_open = True
        leads = not get_tensor_model_parallel_rank()
        self._state().store = RankStore(store, self._state().executors.forget, leads=leads)
        self._connector().closing = self._state().store.close
        link = self._connector().link
        # Of several ranks, none may fetch ahead or refuse by itself: all of them have to agree
        # first.
        link.rows = self._rows() if heads is None else None
        link.has_worker = True
        self._state().sends_changes = not follows
        if self._state().is_replica or not follows:
            # It drops what others forgot from this rank's memory and GPU. News is another rank's to
            # tell.
            self._state().store.follower.start(None)
        else:
            link.follow(self._state().store.follower)

    def cacheblend_open(self, space: dict[str, Any], known: Sequence[Row] = ()) -> None:
        """Have requests of a space planned: by what comes to be known from here on, and by all that
        is stored with the next ``cacheblend_list``.

        Args:
            space: as ``planner.Space.to_plain`` writes it.
            known: rows of chunks that are taken for stored.
        """
        self._send(Space.from_plain(space))
        if known:
            self._send(News(known))

    def cacheblend_limit(self, longest: int | None, costs: dict[str, float] | None) -> None:
        """Blend from now on, ``longest`` tokens of a prompt at most, where it is worth these
        ``costs``.
        """
        self._limit(Limits(longest=longest, costs=Costs(**costs) if costs else None))

    def _limit(self, limits: Limits) -> None:
        # The worker's first, and the scheduler's with the message: a plan may not be judged by
        # costs that the worker does not know.
        self._blender().costs = limits.costs
        self._send(limits)

    def cacheblend_waits(self) -> bool:
        """Whether the scheduler's side has something to learn, which the next step tells it."""
        return self._connector().link.waits

    def cacheblend_costs(self) -> dict[str, float]:
        """What blending and prefilling cost here, in seconds; empty where it was not measured."""
        return self._state().executors.costs()

    def cacheblend_unbind(self) -> None:
        """Turn blending off and close the store: every request is then a plain prefill."""
        rows = self._rows()
        # May be called twice: by the front door as it closes, and by whoever closes the engine.
        if rows.blender is not None:
            self._send(Limits(why_not=Why(Reason.NOT_READY, "blending was turned off")))
            self._state().store.close()
            rows.blender = None
            self._connector().link.end()

    def cacheblend_missing(self, keys: list[str]) -> Any:
        """Which of ``keys`` this rank's store does not hold, as far as it can be asked; None where
        another rank speaks for it.
        """
        return self._from_answering_rank(lambda store: store.missing(keys))

    @_reporting
    def cacheblend_ingest(
        self,
        keys: list[str],
        chunks: list[list[int]],
        prefix_ids: list[int],
        contexts: list[list[int]],
        adapter: list[Any] | None = None,
    ) -> Any:
        """Compute chunks, each behind ``prefix_ids`` and its own context, with a LoRA adapter
        (name, number, path) if there is one, and store them under ``keys``; returns the bytes
        stored, of all heads where this rank leads, and why what key was not stored.
        """
        self._check_weights()
        state = self._state()
        with state.parts[0].adapters.using(request_of(adapter)):
            # Between two steps, as all RPCs: nothing else runs on the model meanwhile.
            computed = state.ingestor.compute(
                chunks, prefix_ids, contexts, adapter[1] if adapter else 0
            )
        return self._later(lambda store: self._put(store, keys, computed))

    @_reporting
    def cacheblend_ingest_begin(
        self,
        name: str,
        keys: list[str],
        chunks: list[list[int]],
        prefix_ids: list[int],
        contexts: list[list[int]],
        learnt: bool = False,
    ) -> None:
        """``cacheblend_ingest`` that computes nothing by itself: see ``cacheblend_ingest_go_on``.
        One that was begun before and did not end is dropped. What is ``learnt`` stays in the memory
        of the engine.
        """
        self._check_weights()
        self._state().sliced.begin(name, keys, chunks, prefix_ids, contexts, learnt=learnt)

    @_reporting
    def cacheblend_ingest_go_on(self, name: str, parts: int) -> Any:
        """Compute so many parts, the same number on every rank; returns how far it is (see
        ``pacing.Progress``), or what ``cacheblend_ingest`` returns.
        """
        sliced = self._state().sliced
        done = sliced.go_on(name, parts)
        # Or the pace of slices would be measured by steps that it made longer itself.
        self._connector().step_timer.exclude(sliced.seconds)
        if not done:
            return {"seconds": sliced.seconds, **self._connector().step_timer.to_plain()}
        keys, computed = sliced.take()
        self._check_weights()  # again: they may have been changed between two slices
        learnt = sliced.learnt
        return self._later(lambda store: self._put(store, keys, computed, learnt=learnt))

    def _check_weights(self) -> None:
        """Chunks computed with other weights would be stored under this model's name.

        Raises:
            EngineError: they are others than at the start. Nothing is blended from here on.
        """
        weights = self._state().weights
        if weights is not None and weights.are_changed():
            self._send(Limits(why_not=CHANGED))
            raise EngineError(CHANGED.detail)

    @_reporting
    def cacheblend_adapter(self, adapter: list[Any]) -> str:
        """Load a LoRA adapter (name, number, path); returns the digest of its content."""
        return self._state().parts[0].adapters.open(request_of(adapter))

    def cacheblend_prefetch(self, keys: list[str]) -> None:
        """Start bringing ``keys`` nearer, where the store has tiers."""
        self._blender().store.prefetch(keys)

    def cacheblend_forget(self, keys: list[str]) -> Any:
        """Drop ``keys`` from the store, and the copies of them outside it."""
        return self._later(lambda store: self._forget(store, keys))

    def cacheblend_cause(self, name: str) -> str:
        """Why a request that ended with an error could not be computed; empty if none is known."""
        return self._rows().causes.get(name, "")

    def cacheblend_compared(self, prompts: list[str]) -> list[list[tuple[float, bool]]]:
        """See ``answers.take_compared``; of use where the engine has that logits processor."""
        return answers.take_compared(prompts)

    def cacheblend_drop_answers(self, prompts: list[str]) -> None:
        """See ``answers.drop``."""
        answers.drop(prompts)

    def _store_prompt_prefix(self, prompt_prefix: PromptPrefix) -> None:
        """Store the prompts' usual first tokens, unless all ranks have them."""
        missing = bool(self._state().store.missing([prompt_prefix.key]))
        if self._state().parts[0].ranks.any([missing])[0]:
            computed = self._state().ingestor.compute([prompt_prefix.token_ids], [], [[]])
            self._state().store.put([prompt_prefix.key], computed)

    def _list_store(self) -> None:
        if not self._state().is_replica:
            self._state().store.follower.list()

    def _put(
        self, store: RankStore, keys: list[str], computed: list[ChunkKV], *, learnt: bool = False
    ) -> tuple[int, dict[str, str]]:
        """Store chunks; a scheduler's side that follows the store itself need not wait to see."""
        done = store.put(keys, computed, learnt=learnt)
        if self._state().sends_changes:
            both = zip(keys, computed, strict=True)
            rows = [row_of(ChunkInfo.of(key, kv)) for key, kv in both if key not in done[1]]
            self._send(News(rows))
        return done

    def _forget(self, store: RankStore, keys: list[str]) -> None:
        # Before the store: a plan that still counts on these chunks would find them gone, which
        # costs more than a chunk that is forgotten a moment too early.
        if self._state().sends_changes:
            self._send(News([], keys))
        store.forget(keys)

    def _send(self, message: Message) -> None:
        """Tell the scheduler's side what all ranks know."""
        state = self._state()
        if isinstance(message, Limits):
            state.limits = message.behind(state.limits)
        elif isinstance(message, Space) and message.default:
            state.space = message
        # All ranks have it; one tells.
        if not get_tensor_model_parallel_rank():
            self._connector().link.send(message)

    def _rows(self) -> Blends:
        rows = self._connector().rows
        assert rows is not None
        return rows

    def _blender(self) -> Blender:
        blender = self._rows().blender
        assert blender is not None
        return blender
