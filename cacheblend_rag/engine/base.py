"""The contract between the front door and an embedded vLLM engine.

Driver side only: these types say what goes in and comes out. The worker side lives in
``connector.py`` and ``worker.py``; what crosses is a plan as plain data, and RPCs by name.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cacheblend_rag.errors import CacheBlendError, EngineError
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.tools import ToolCallPiece, ToolUse

WORKER_ERROR = "cacheblend_error"  # key of an RPC result that is an error of ours: its class name
TICKET = "cacheblend_ticket"  # key of an RPC result that is to come: its number
_LONGEST_WAIT_S = 0.05  # until it is asked again whether a result is there


def adapter_name(lora_request: Any) -> str:
    """What a request's LoRA adapter is called, here and in vLLM; empty for the model alone."""
    if lora_request is None:
        return ""
    return f"{lora_request.lora_int_id}/{lora_request.lora_name}/{lora_request.lora_path}"


def plain_adapter(lora_request: Any) -> list[Any]:
    """Name, number and path of an adapter, for an RPC."""
    return [lora_request.lora_name, lora_request.lora_int_id, lora_request.lora_path]


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One prompt for the engine.

    Attributes:
        token_ids: the prompt, exactly as it is computed.
        sampling: vLLM's sampling parameters by name.
        params: ``kv_transfer_params``: a plan, or None for a plain prefill.
        cache_salt: keeps blocks apart in vLLM's prefix cache; None shares the exact one.
        lora_request: vLLM's LoRARequest, of the adapter that the space's chunks have too.
        reasoning: what vLLM is told of the model's reasoning, see ``ChatTurn``.
    """

    token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    params: Mapping[str, Any] | None = None
    cache_salt: str | None = None
    lora_request: Any = None
    reasoning: Mapping[str, Any] = field(default_factory=dict)


class EngineOutput(NamedTuple):
    """A piece of an answer: what is new since the piece before.

    ``text`` is all that the model wrote where nothing reads it. Where a parser does, ``text`` is
    what is meant for the user, and ``reasoning`` and ``tool_calls`` are the rest.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None  # not None: this is the last piece
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None  # a dict a new token: token id -> log-probability
    engine: Mapping[str, Any]  # of the last piece: see report.make_report
    at: float  # time.perf_counter() when it came
    reasoning: str = ""
    tool_calls: tuple[ToolCallPiece, ...] = ()


class LayerCheck(NamedTuple):
    """One layer of the check: relative error of keys and values moved by ``shift``."""

    layer: int
    shift: int
    key_error: float
    value_error: float
    ok: bool


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """Whether this engine may blend, and what was measured to decide it.

    Attributes:
        passed: blending is on.
        reason: why not, if it is off; ``detail``: the same as a sentence.
        layers: the self-check of every layer (empty where the model was refused before).
        prefill_error: total variation distance between the next-token distributions of ratio 1
            and of a plain prefill, as a share of what the likeliest tokens have; None where it was
            not measured.
        tolerance: what the layer errors and the prefill error were held against.
        max_tokens: how many of a prompt's first tokens a blend may cover; None: all. A sliding
            window that all layers have bounds it, or one that is too long to be checked here.
    """

    passed: bool
    reason: Reason | None = None
    detail: str = ""
    layers: Sequence[LayerCheck] = ()
    prefill_error: float | None = None
    tolerance: tuple[float, float] = (0.0, 0.0)
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts about a started engine."""

    model: str
    vllm_version: str
    dtype: str
    device: str
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    vocab_size: int
    fingerprint: str = ""
    positions: int = 0  # of the model's RoPE table: as far as chunks can be moved
    refusal: Why | None = None  # why this model can't be blended; None: it can, so far
    kv_bytes_per_token: int = 0  # of all heads
    window: int | None = None  # the largest of a layer, or chunk that it attends within
    longest_blend: int | None = None  # tokens; None: no limit
    extra: Mapping[str, Any] = field(default_factory=dict)


Read = Callable[[EngineOutput], EngineOutput]  # a raw piece to what it says; called in order


class ParserNames(NamedTuple):
    """vLLM's parsers of this model's answers, by vLLM's names; empty for none.

    Attributes:
        tool: reads calls of tools; ``reasoning``: what the model thinks before it answers.
    """

    tool: str = ""
    reasoning: str = ""


NO_PARSERS = ParserNames()


class ChatTurn(NamedTuple):
    """A chat prompt whose answer is read by vLLM's parsers.

    Attributes:
        token_ids: the prompt.
        sampling: the request's, as the parsers need it.
        read: for the pieces of this one answer.
        reasoning: for ``EngineRequest``: whether the reasoning has ended in the prompt, and the
            arguments of the engine's own parser.
    """

    token_ids: tuple[int, ...]
    sampling: Mapping[str, Any]
    read: Read
    reasoning: Mapping[str, Any]


class ChatRenderer(ABC):
    """Turns chat messages into the token ids that the engine's own chat computes for them.

    Attributes:
        parsers: what answers are read by.
    """

    parsers: ParserNames = NO_PARSERS

    @property
    @abstractmethod
    def available(self) -> bool:
        """Whether the model has a chat template, or a way of its own."""

    @abstractmethod
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        tools: ToolUse | None = None,
        timeless: bool = False,
    ) -> tuple[int, ...]:
        """Token ids of messages of text, up to where the answer starts.

        Args:
            messages: each a role and a content.
            arguments: more arguments of the template, by name.
            tools: that the template describes to the model.
            timeless: with a date that never changes, where the template writes today's.

        Raises:
            PromptError: no template, or messages or tools that it refuses.
            ConfigError: an argument that it does not have.
        """

    @abstractmethod
    def turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        tools: ToolUse | None,
        sampling: Mapping[str, Any],
    ) -> ChatTurn:
        """A prompt whose answer is read by ``parsers``.

        Args:
            messages, arguments, tools: as for ``render``.
            sampling: vLLM's sampling parameters by name.

        Raises:
            PromptError, ConfigError: as ``render`` does.
            ConfigError: no parser reads what the tools would be called by.
        """


class Engine(ABC):
    """An embedded vLLM engine with our connector inside.

    Promises: ids go in unchanged; pieces come out in order; leaving an iterator early aborts its
    request; after ``close`` every call raises ClosedError; vLLM's exceptions come out as ours.
    """

    info: EngineInfo
    tokenizer: Any
    chat: ChatRenderer
    sampling_names: frozenset[str]  # vLLM's sampling parameters that a caller may set
    serves_many: bool = False  # calls of several threads run side by side

    @abstractmethod
    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call ``method`` of the worker extension on every rank; plain data in and out. Returns
        when it is done. What is done on the store holds up no step of the engine: see ``awaited``.
        """

    @abstractmethod
    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        """Run all requests together; all pieces of each."""

    @abstractmethod
    def stream(self, request: EngineRequest) -> Iterator[EngineOutput]:
        """Run one request and yield its pieces."""

    @abstractmethod
    def astream(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """``stream`` for any running event loop."""

    @abstractmethod
    def close(self) -> None:
        """Stop the engine and free its memory; does nothing on the second call."""


def as_result(error: BaseException, failed: str) -> dict[str, str]:
    """What an RPC returns in place of a result: an error by name, which the caller raises. One that
    is not ours becomes an EngineError that says what ``failed``.
    """
    if isinstance(error, CacheBlendError):
        return {WORKER_ERROR: type(error).__name__, "message": str(error)}
    message = f"{failed}: {type(error).__name__}: {error}"
    return {WORKER_ERROR: EngineError.__name__, "message": message}


def from_answering_ranks(results: Iterable[Any]) -> list[Any]:
    """Of an RPC's results, one a rank, those of ranks that answer for a store: of ranks that share
    one, only the first does.
    """
    return [result for result in results if result is not None]


def awaited(call: Callable[..., list[Any]], method: str, *args: Any) -> list[Any]:
    """The results of ``method``, one a rank. A rank may answer with a ticket, whose result is asked
    for until it is there: meanwhile the engine goes on.

    Args:
        call: an RPC, by name.
    """
    results = call(method, *args)
    tickets = [r[TICKET] if isinstance(r, dict) and TICKET in r else None for r in results]
    wait_s = 0.001
    while any(ticket is not None for ticket in tickets):
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        for rank, taken in enumerate(call("cacheblend_taken", tickets)):
            if taken:
                results[rank], tickets[rank] = taken[0], None
    return results
