"""Blends where each kind of layers has a KV cache group: the worker's side.

vLLM's hybrid KV cache manager keeps of a layer with a window the last window only. So rows of its
own step could not read what stands before. Here a blend's tokens are computed before: vLLM holds
the request back, as for KV that comes from another machine. It takes all tokens but the prompt's
last one for loaded once that is told, and then computes that one.

So no token is sampled from what could not be computed. Such a request ends with an error; where
vLLM can't be told that of a single request, the engine does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.logger import init_logger

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.attention import PagedCache
from cacheblend_rag.engine.blends import Blends, Finished, Scheduled, why_failed
from cacheblend_rag.engine.forward import UnsupportedModelError
from cacheblend_rag.engine.outcome import BlendOutcome, BlendTask, Clock
from cacheblend_rag.engine.proof import Proof
from cacheblend_rag.engine.rows import StepRows
from cacheblend_rag.engine.runner import StepTensors
from cacheblend_rag.engine.scratch import LastRow, PromptForward, Scratch
from cacheblend_rag.engine.torch_executor import TorchExecutor
from cacheblend_rag.errors import EngineError
from cacheblend_rag.model_check import tolerance
from cacheblend_rag.reason import Reason, RefusedError, Why
from cacheblend_rag.undo import logging_failures

logger = init_logger("vllm.cacheblend_rag")


def refuse_groups(config: Any, kv_cache_config: Any) -> None:
    """Raises:
    UnsupportedModelError: the engine has several KV cache groups, and can't blend with them.
    """
    refused = compat.groups_refusal(config, kv_cache_config)
    if refused:
        count = len(kv_cache_config.kv_cache_groups)
        detail = f"{count} KV cache groups {refused}, which was not tested"
        raise UnsupportedModelError(Reason.KV_GROUPS, detail)


def open_blends(cache: PagedCache, tensors: StepTensors, kv_cache_config: Any) -> Blends:
    """How this rank's blends are computed.

    Raises:
        UnsupportedModelError: there are several KV cache groups, of another kind than was tested.
    """
    handle = cache.handle
    handle.groups = len(kv_cache_config.kv_cache_groups)
    if handle.groups == 1:
        return StepRows(handle, cache, tensors)
    longest = int(handle.config.model_config.max_model_len)
    return GroupedBlends(Scratch(cache, int(kv_cache_config.num_blocks), longest))


class _DisprovedError(Exception):
    """A blend was not what a plain prefill says, so nothing computed that way is to be trusted."""


class GroupedBlends(Blends):
    """Each is computed as a whole, before the step in which it is told."""

    def __init__(self, scratch: Scratch) -> None:
        super().__init__(scratch.cache.handle)
        self._scratch, config = scratch, self.handle.config
        self._most_rows = int(config.scheduler_config.max_num_batched_tokens)
        self._dtype = str(config.model_config.dtype).removeprefix("torch.")
        self._finished: list[Finished] = []
        self._loaded, self._failed = set[str](), set[str]()

    def begin_ahead(self, task: BlendTask) -> None:
        """Nothing: a blend takes the model as long as it takes, before the step or in it."""

    def begin_step(self, tasks: Mapping[str, BlendTask], batch: Mapping[str, Scheduled]) -> None:
        for task in tasks.values():
            self._run(task)

    def loaded(self) -> tuple[set[str], set[str]]:
        loaded, failed = self._loaded, self._failed
        self._loaded, self._failed = set(), set()
        return loaded, failed

    def finished(self) -> list[Finished]:
        finished, self._finished = self._finished, []
        return finished

    def lost(self) -> dict[str, set[int]]:
        return {}

    def prove(self) -> None:
        """Nothing: that was done as the blend was computed."""

    def forget(self, names: Iterable[str]) -> None:
        """Nothing is under way between two steps."""

    def _run(self, task: BlendTask) -> None:
        outcome = BlendOutcome(
            Clock(self.handle.device), task.plan.segments, task.prefix_cached, task.planned
        )
        why_not: Why | None = None
        try:
            self._blend(task, outcome)
        except RefusedError as refusal:
            why_not = refusal.why
        except _DisprovedError as error:
            why_not = Why(Reason.ROWS_DIFFER, str(error))
            self._lose(task, error)
        # As in ``rows.py``: a request is answered exactly whatever it was.
        except Exception as error:
            logger.exception("the blend of %s failed; it is computed exactly", task.request_id)
            why_not = why_failed(task, error)
        if why_not is not None and task.request_id not in self._failed:
            self._compute_exactly(task, why_not)
        self._loaded.add(task.request_id)
        outcome.clock.mark("recompute")
        done = Finished(task.request_id, task.name, outcome, why_not, task.number)
        self._finished.append(done)

    def _blend(self, task: BlendTask, outcome: BlendOutcome) -> None:
        if self.blender is None:
            raise RuntimeError("the worker was not bound")
        executor, positions, proof = self.blender.choose(task, outcome)
        assert isinstance(executor, TorchExecutor), "no other one knows several block tables"
        forward = PromptForward(self._scratch, task, self._most_rows, executor, proof)
        forward.run(positions.device[:-1])  # the last one is vLLM's
        if proof is not None:
            self._judge(task, proof)

    def _judge(self, task: BlendTask, proof: Proof) -> None:
        """See that the rows, and the last one over what vLLM keeps, are what a plain prefill gives.

        Raises:
            _DisprovedError: they are not. No further blend begins.
        """
        # vLLM allocates as far as what is loaded. The last token's block may come later.
        size = self._scratch.cache.block_size
        is_whole = all(len(table) * size >= task.end for table in task.tables)
        if is_whole:
            last = torch.tensor([task.end - 1], device=self.handle.device)
            ids = torch.tensor(task.token_ids[-1:], device=self.handle.device)
            self.handle.run(LastRow(self._scratch.cache, task, proof), ids, last)
        error, bound = proof.error() or 0.0, tolerance(self._dtype)[0]
        if not error <= bound:  # true of NaN
            detail = f"the blended tokens differ by {error:.3g} ({bound:g} allowed)"
            self.proved(Why(Reason.ROWS_DIFFER, detail))
            raise _DisprovedError(detail)
        if is_whole:  # else another blend shows it
            self.proved(None)

    def _compute_exactly(self, task: BlendTask, why_not: Why) -> None:
        """All that vLLM takes for loaded. From its first token on: what the prefix cache has of
        layers with a window lies before what is kept for this request.
        """
        all_but_last = torch.arange(task.end - 1, device=self.handle.device)
        try:
            PromptForward(self._scratch, task, self._most_rows).run(all_but_last)
        except Exception as error:
            self._lose(task, error, f" (before that: {why_not.detail})")

    def _lose(self, task: BlendTask, error: Exception, because: str = "") -> None:
        """Not even an exact answer can be had.

        Raises:
            EngineError: where vLLM can't end that request alone.
        """
        cause = f"{type(error).__name__}: {error}{because}"
        logger.error("%s can't be computed: %s", task.request_id, cause, exc_info=error)
        self._remember(task.name, cause)
        # Others are given these blocks, and attention multiplies what lies behind a sequence's end
        # by zero: zero times NaN is NaN.
        with logging_failures(logger, "the blocks of %s can't be cleared", task.request_id):
            self._clear(task)
        if not compat.tells_failed_loads():
            raise EngineError(
                f"{task.request_id} can't be computed: {cause}. This vLLM can't end one request "
                "for that where there are several KV cache groups, so the engine ends"
            ) from error
        self._failed.add(task.request_id)

    def _clear(self, task: BlendTask) -> None:
        cache = self._scratch.cache
        tables = [torch.tensor(table) for table in task.tables]
        for index, group in enumerate(cache.groups):
            self._scratch.drop(index, tables[group], task.found // cache.block_size)
