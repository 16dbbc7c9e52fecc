"""The tensors of the step that vLLM's model runner is about to run, in both of its runners.

V1 keeps a batch in its own order; V2 sorts the requests of a step anew. A wrong order would be
silently wrong, so the self-check at start blends together with other requests.

Shape legend: T rows of the step.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cacheblend_rag.engine.forward import ModelHandle, UnsupportedModelError
from cacheblend_rag.reason import Reason


class StepTensors(ABC):
    """What a step gives the model, by request and row."""

    def __init__(self, runner: Any, handle: ModelHandle) -> None:
        self._runner, self._handle = runner, handle

    @property
    def zeroes_blocks(self) -> bool:
        """Whether vLLM zeroes a step's new blocks as it prepares the step."""
        # A version that does not say so may do it.
        caches = self._runner.kv_cache_config
        return bool(getattr(caches, "needs_kv_cache_zeroing", True))

    @abstractmethod
    def order(self, counts: Mapping[str, int]) -> list[str]:
        """The requests in the order of their rows; ``counts`` has the rows of each."""

    @abstractmethod
    def table(self, count: int) -> torch.Tensor:
        """int32 block table of the first ``count`` requests, on the device."""

    @abstractmethod
    def positions(self, count: int) -> torch.Tensor:
        """int64 positions of the first ``count`` rows, on the device."""

    @property
    @abstractmethod
    def _ids(self) -> torch.Tensor: ...

    @property
    @abstractmethod
    def _block_size(self) -> int:
        """Tokens a block of ``table``."""

    @property
    @abstractmethod
    def _graph_slots(self) -> torch.Tensor:
        """int64 slots as CUDA graphs read them."""

    def write(
        self, place: slice, number: int, ids: torch.Tensor, positions: torch.Tensor, context: Any
    ) -> None:
        """Make the rows ``place`` of request ``number`` these tokens at these positions."""
        self._ids[place] = ids.to(self._ids.dtype)
        self.positions(place.stop)[place] = positions
        self._place(place, positions)
        self._embed(place, ids)
        size = self._block_size
        blocks = self.table(number + 1)[number][positions // size].long()
        slots = blocks * size + positions % size
        # vLLM names a mapping for each layer, and layers share few tensors: each is written once.
        for tensor in {id(s): s for s in context.slot_mapping.values()}.values():
            tensor[place] = slots

    def write_nothing(self, rows: slice) -> None:
        """Have ``rows`` of a step that is one CUDA graph put their K and V nowhere."""
        self._graph_slots[rows] = -1

    def _embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Of tokens of the request whose adapter is in use: an adapter may change embeddings, and
        vLLM's layer takes these tokens for the first ones of the step.
        """
        self._handle.ranks.agree()  # each has a part of the vocabulary
        with self._handle.adapters.during(len(ids)):
            embeddings: torch.Tensor = self._handle.model.embed_input_ids(ids)
        return embeddings

    def _place(self, place: slice, positions: torch.Tensor) -> None:  # noqa: B027 - few need it
        """For models whose positions have several dimensions: of text, all are alike."""

    def _embed(self, place: slice, ids: torch.Tensor) -> None:  # noqa: B027 - few need it
        """For models that get embeddings in place of ids."""


class _V1(StepTensors):
    def order(self, counts: Mapping[str, int]) -> list[str]:
        names = list(self._runner.input_batch.req_ids)
        assert set(names) == set(counts), "the step has other requests than it was scheduled with"
        return names

    def table(self, count: int) -> torch.Tensor:
        table: torch.Tensor = self._runner.input_batch.block_table[0].get_device_tensor(count)
        return table

    def positions(self, count: int) -> torch.Tensor:
        positions = self._runner.positions
        here: torch.Tensor = getattr(positions, "gpu", positions)[:count]
        return here

    @property
    def _ids(self) -> torch.Tensor:
        ids: torch.Tensor = self._runner.input_ids.gpu
        return ids

    @property
    def _block_size(self) -> int:
        return int(self._runner.input_batch.block_table[0].block_size)

    @property
    def _graph_slots(self) -> torch.Tensor:
        slots: torch.Tensor = self._runner.input_batch.block_table[0].slot_mapping.gpu
        return slots

    def _place(self, place: slice, positions: torch.Tensor) -> None:
        # Text has the same position in all of its dimensions.
        if self._runner.uses_mrope:
            self._runner.mrope_positions.gpu[:, place] = positions

    def _embed(self, place: slice, ids: torch.Tensor) -> None:
        # vLLM embeds the ids of such a model before the forward, so ids that are changed now come
        # too late.
        # The same where prompts may be given as embeddings, if this one is or not.
        if self._runner.supports_mm_inputs or self._runner.enable_prompt_embeds:
            self._runner.inputs_embeds.gpu[place] = self._embeddings(ids)


class _V2(StepTensors):
    def __init__(self, runner: Any, handle: ModelHandle) -> None:
        super().__init__(runner, handle)
        if getattr(runner, "uses_inputs_embeds", False) and not runner.supports_mm_inputs:
            detail = "prompts may be given as embeddings (enable_prompt_embeds), which was not run"
            detail = f"{detail} with vLLM's V2 model runner; set VLLM_USE_V2_MODEL_RUNNER=0"
            raise UnsupportedModelError(Reason.PROMPT_EMBEDS, detail)

    def order(self, counts: Mapping[str, int]) -> list[str]:
        # The V2 runner keeps no batch that could be asked. It sorts by this function before each
        # step, so the same function on the same numbers gives its order.
        from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

        known = {
            "num_tokens_per_req": dict(counts),
            "draft_tokens": {},
            "decode_query_len": self._runner.decode_query_len,
        }
        # Its arguments differ by version. One that is not known raises here, and is not guessed.
        return list(sort_batch_req_ids(*(known[name] for name in _arguments(sort_batch_req_ids))))

    def table(self, count: int) -> torch.Tensor:
        table: torch.Tensor = self._runner.block_tables.input_block_tables[0][:count]
        return table

    def positions(self, count: int) -> torch.Tensor:
        positions: torch.Tensor = self._runner.input_buffers.positions[:count]
        return positions

    @property
    def _ids(self) -> torch.Tensor:
        ids: torch.Tensor = self._runner.input_buffers.input_ids
        return ids

    @property
    def _block_size(self) -> int:
        return int(self._runner.block_tables.kernel_block_sizes[0])

    @property
    def _graph_slots(self) -> torch.Tensor:
        slots: torch.Tensor = self._runner.block_tables.slot_mappings[0]
        return slots

    def _place(self, place: slice, positions: torch.Tensor) -> None:
        rope = getattr(self._runner.model_state, "rope_state", None)
        if rope is not None:  # several dimensions, which are the same for text
            rope.positions[:, place] = positions

    def _embed(self, place: slice, ids: torch.Tensor) -> None:
        if self._runner.supports_mm_inputs:
            embeds = self._runner.model_state.encoder_runner.inputs_embeds
            embeds[place] = self._embeddings(ids)


@functools.cache
def _arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def step_tensors(runner: Any, handle: ModelHandle) -> StepTensors:
    """Those of vLLM's V1 or V2 model runner."""
    return (_V1 if hasattr(runner, "input_batch") else _V2)(runner, handle)
