"""The worker's side of the shadow: answers that were given are computed again, exactly.

While a watched answer is generated, what the model hands to its output layer is kept for each of
its tokens, some kilobytes a token. Afterwards one forward of our own runs over prompt and answer,
outside of the paged cache, in slices between the engine's steps. Both sides then go through the
model's output layer, so whole distributions are compared, and no logits had to be kept.

Shape legend: A tokens of the answer, R some of them, E hidden size, V vocabulary, T prompt and A.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.answers import compare
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.engine.isolated import IsolatedPass
from cacheblend_rag.engine.outcome import BlendOutcome
from cacheblend_rag.engine.runner import StepTensors
from cacheblend_rag.engine.slices import BudgetedPass, SlicedWork
from cacheblend_rag.engine.upload import upload
from cacheblend_rag.engine.watching import Watch
from cacheblend_rag.shadow import Figures, ShadowJob
from cacheblend_rag.shadow import report as reports
from cacheblend_rag.undo import logging_failures

_MOST_KEPT = 96  # answers: those that are generated, and the most that may wait
_ROWS = 8  # that go through the output layer at once: their logits are large

logger = init_logger("vllm.cacheblend_rag")

Recent = OrderedDict[str, BlendOutcome | dict[str, Any]]


class HiddenStates:
    """What the model handed to its output layer for each token of the watched answers."""

    def __init__(self, model: Any, tensors: StepTensors) -> None:
        self._model, self._tensors = model, tensors
        self._kept: OrderedDict[str, dict[int, torch.Tensor]] = OrderedDict()
        self._rows: list[tuple[str, int, int]] = []  # request, number of its token, row
        self._count = 0  # rows of the step that is under way
        self._is_looking = False

    def watch(self, watch: Watch | None) -> None:
        """A step begins. Called before the model runs, when its requests are in order."""
        self._rows = []
        if watch is None:
            return
        self._look()
        order = self._tensors.order(watch.rows)
        self._count = len(order)
        numbered = [(name, watch.tokens.get(name), row) for row, name in enumerate(order)]
        self._rows = [(name, number, row) for name, number, row in numbered if number is not None]

    def take(self, request_id: str) -> dict[int, torch.Tensor]:
        """[E] of each token of an answer, by its number; then they are gone."""
        return self._kept.pop(request_id, {})

    def _look(self) -> None:
        """Have the output layer's input go by here. vLLM calls it once a step for what it samples
        from, outside of any graph, with one row for each request.
        """
        if self._is_looking:
            return
        output_layer = self._model.compute_logits

        def compute_logits(hidden_RE: torch.Tensor, *args: Any, **options: Any) -> Any:
            self._keep(hidden_RE)
            return output_layer(hidden_RE, *args, **options)

        self._model.compute_logits, self._is_looking = compute_logits, True
        self.output_layer: Callable[..., Any] = output_layer

    def _keep(self, hidden_RE: torch.Tensor) -> None:
        rows, self._rows = self._rows, []  # a second call of the step has other rows
        if not rows or len(hidden_RE) != self._count:
            return
        for name, number, row in rows:
            self._kept.setdefault(name, {})[number] = hidden_RE[row].clone()
        while len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)


class ShadowWorker:
    """Computes the shadows of one rank. All ranks do it together, slice by slice.

    Args:
        longest: tokens that prompt and answer may have together.
        recent: what was done for the last requests, by name; gets what was found.
    """

    def __init__(
        self, handle: ModelHandle, tensors: StepTensors, longest: int, recent: Recent
    ) -> None:
        self._handle, self._longest, self._recent = handle, longest, recent
        self.hidden = HiddenStates(handle.model, tensors)
        self._work = SlicedWork[Figures | None](handle.device, "cacheblend-shadow")
        self._waiting: deque[ShadowJob] = deque()
        self._job: ShadowJob | None = None
        self._dropped: Counter[str] = Counter()

    @property
    def seconds(self) -> float:
        """What the last slice took."""
        return self._work.seconds

    def add(self, jobs: Iterable[ShadowJob]) -> None:
        """Answers ended. The oldest goes where too many wait."""
        for job in jobs:
            self._waiting.append(job)
            while len(self._waiting) > job.drawn.most_waiting:
                self._drop(self._waiting.popleft(), "others_came")

    def go_on(self, parts: int) -> tuple[ShadowJob, Figures | None] | None:
        """Compute so many parts; the answer that is done with, and what was found on this rank."""
        if self._job is None and not self._begin():
            return None
        assert self._job is not None
        if not self._work.go_on(parts):
            return None
        job, self._job = self._job, None
        # Memory that ran out, or whatever it was: nobody waits for it.
        with logging_failures(logger, "an answer could not be computed again"):
            figures = self._work.take()
            if figures is not None:
                self._note(job, reports.done(job.drawn.template, figures))
            return job, figures
        self._drop(job, "failed")
        return None

    def news(self) -> dict[str, Any]:
        """How many wait, how many tokens the next slice is of, and how many were dropped for which
        reason since the call before.
        """
        dropped, self._dropped = dict(self._dropped), Counter()
        jobs = [] if self._job is None else [self._job]
        following = [*jobs, *self._waiting]
        tokens = len(following[0].token_ids) if following else 0
        return {"waiting": len(following), "tokens": tokens, "dropped": dropped}

    def _begin(self) -> bool:
        while self._waiting:
            job = self._waiting.popleft()
            kept = self.hidden.take(job.request_id)
            refusal = self._refusal(job, kept)
            # A blend may have failed on one rank alone, and the forward is for all of them.
            if self._handle.ranks.any([bool(refusal)])[0]:
                self._drop(job, refusal or "not_blended")
            else:
                self._start(job, torch.stack([kept[number] for number in range(len(kept))]))
                return True
        return False

    def _refusal(self, job: ShadowJob, kept: dict[int, torch.Tensor]) -> str:
        """Why an answer is not computed again; empty if it is. Cuts ``kept`` to the answer."""
        answer = len(job.token_ids) - job.prompt_tokens
        for number in [number for number in kept if number >= answer]:
            del kept[number]  # of a token that was sampled behind the end
        if not isinstance(self._recent.get(job.name), BlendOutcome):
            return "not_blended"
        if len(job.token_ids) > self._longest:
            return "too_long"
        return "" if len(kept) == answer else "not_kept"

    def _start(self, job: ShadowJob, blended_AE: torch.Tensor) -> None:
        self._job = job
        self._work.begin(lambda: self._computed(job, blended_AE))

    def _computed(self, job: ShadowJob, blended_AE: torch.Tensor) -> Figures | None:
        handle, total = self._handle, len(job.token_ids)
        # All but the last token: what comes behind that was never asked.
        ids = upload(torch.tensor(job.token_ids[:-1]), handle.device)
        step = IsolatedPass([(0, total - 1)], handle.num_layers, keep=lambda index, kv: None)
        step.last = handle.num_layers  # it is not to stop: the output is what is wanted
        positions = torch.arange(total - 1, device=handle.device)
        hidden_TE = handle.run(
            BudgetedPass(step, self._work.budget, handle.adapters.renew), ids, positions
        )
        assert hidden_TE is not None
        exact_AE = hidden_TE[job.prompt_tokens - 1 :]
        answer = job.token_ids[job.prompt_tokens :]
        rows: list[tuple[float, bool, bool]] = []
        for start in range(0, len(answer), _ROWS):
            self._work.budget.spend()
            some = slice(start, start + _ROWS)
            compared = partial(self._compared, exact_AE[some], blended_AE[some], answer[some])
            rows += handle.ranks.all_or_none(compared)  # or others would wait for one that failed
        return Figures.of(rows) if rows else None

    def _compared(
        self, exact_RE: torch.Tensor, blended_RE: torch.Tensor, answer: Sequence[int]
    ) -> list[tuple[float, bool, bool]]:
        """See ``Figures.of``; empty on ranks that get no logits."""
        exact_RV = self.hidden.output_layer(exact_RE)
        blended_RV = self.hidden.output_layer(blended_RE)
        if exact_RV is None:
            return []
        both = torch.stack([compare(a, b) for a, b in zip(exact_RV, blended_RV, strict=True)])
        likeliest = exact_RV.argmax(-1).tolist()
        return [
            (float(kl), chosen == token, bool(same))
            for (kl, same), chosen, token in zip(both.tolist(), likeliest, answer, strict=True)
        ]

    def _drop(self, job: ShadowJob, reason: str) -> None:
        self._dropped[reason] += 1
        self.hidden.take(job.request_id)
        self._note(job, reports.dropped(job.drawn.template, reason))

    def _note(self, job: ShadowJob, found: Mapping[str, Any]) -> None:
        """Have the request's report say so, if it is still kept."""
        done = self._recent.get(job.name)
        planned = done.planned if isinstance(done, BlendOutcome) else done
        if isinstance(planned, dict):
            planned["shadow"] = dict(found)


def why_not(handle: ModelHandle) -> str:
    """Why answers of this engine can't be computed again; empty if they can."""
    config = handle.config
    if config.lora_config is not None:
        return "the engine serves LoRA adapters"
    if config.speculative_config is not None:
        return "speculative decoding is on: a step samples from several rows of a request"
    if handle.groups > 1:
        return "there are several KV cache groups, with which it was not tested"
    if handle.sharing:
        return "layers of the model share KV, and a forward of ours does not reach them"
    return compat.sampling_refusal(config)


def longest(config: Any, device: torch.device) -> int:
    """Tokens of a forward that vLLM has reserved the memory for; on a CPU none is reserved."""
    most = int(config.model_config.max_model_len)
    on_cpu = device.type == "cpu"
    return most if on_cpu else min(most, int(config.scheduler_config.max_num_batched_tokens))
