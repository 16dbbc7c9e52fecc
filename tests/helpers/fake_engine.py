"""An engine that computes nothing: it notes the requests and answers with given words.

All of the front door runs over it: templates, token ids, keys, index, plans and reports.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.costs import Costs
from cacheblend_rag.engine import Engine, EngineInfo, EngineOutput, EngineRequest
from cacheblend_rag.engine.chat import VllmChat
from cacheblend_rag.engine.start import _parsers, _template, sampling_names, sampling_params
from cacheblend_rag.errors import ClosedError, ModelError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import News, chunks_of
from cacheblend_rag.locate import ChunkIndex
from cacheblend_rag.models import MODEL_NAME, cache_home, embedded_model
from cacheblend_rag.plan import PARAMS_KEY, Plan, PromptPrefix
from cacheblend_rag.planner import Limits, Planner, Space
from cacheblend_rag.store.base import document_id
from cacheblend_rag.store.registry import DocumentRegistry


def _embedded() -> Path:
    """Made here where it is not there yet: nothing says which test of a fresh machine comes first.
    What needs it says that it is missing, where it can't be had.
    """
    with suppress(ModelError):
        return embedded_model(progress=False)
    return cache_home() / "models" / MODEL_NAME


MODEL = _embedded()
ANSWER = ("A", " short", " answer", ".")


@cache
def renderer(model: str, tokenizer_mode: str = "auto") -> Any:
    """vLLM's own, of the model in this folder, without an engine."""
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.renderers import renderer_from_config

    config: Any = SimpleNamespace(
        model_config=ModelConfig(model=model, tokenizer_mode=tokenizer_mode),
        parallel_config=ParallelConfig(),
    )
    return renderer_from_config(config)


class FakeEngine(Engine):
    """Its chunk store is a set of keys."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        parsers, self.options = _parsers(options)
        template, self.options = _template(self.options)
        self.answer: Sequence[str] = ANSWER
        self.answers: list[str] = []  # of the next requests, before `answer`
        # of requests, token by token as the model's tokenizer has them, before `answers`
        self.script: Callable[[EngineRequest], str | None] = lambda request: None
        self.requests: list[EngineRequest] = []
        self.ingested: list[str] = []
        self.behind: dict[str, tuple[int, ...]] = {}  # by key, what it was computed behind
        self.prefetched: list[str] = []
        self.stored: set[str] = set()
        self.rows: dict[str, Any] = {}  # by key, what the index has to know
        self.planner = Planner(block_size=16)
        self.plans: list[Plan | None] = []  # of the requests
        self.notes = DocumentRegistry()
        self.outcomes: dict[str, dict[str, Any]] = {}  # of requests that a stop string ended
        self.closed = False
        self.aborted = 0
        self.sampling_names = sampling_names()
        vllm = renderer(model, options.get("tokenizer_mode", "auto"))
        self.chat = VllmChat(vllm, parsers, template)
        self.tokenizer = self.chat._renderer.tokenizer
        self.info = EngineInfo(
            model=model,
            vllm_version="0",
            dtype="float32",
            device="cpu",
            block_size=16,
            max_model_len=int(options.get("max_model_len", 8192)),
            max_num_batched_tokens=2048,
            vocab_size=len(self.tokenizer),
            fingerprint="fake",
            extra={"checks": [[0, 37, 0.0, 0.0]]},
        )

    def rpc(self, method: str, *args: Any) -> list[Any]:
        self._open()
        match method.removeprefix("cacheblend_"), args:
            case "bind", _:
                return [True]
            case "unbind", _:
                return [None]
            case "open", [space, *known]:
                self.planner.learn(0, Space.from_plain(space))
                for rows in known:
                    self.planner.learn(0, News(rows))
                return [None]
            case "list", _:
                self.planner.learn(0, News(self._rows(), whole=True))
                return [None]
            case "limit", [longest, costs]:
                self.planner.learn(0, Limits(longest=longest, costs=costs and Costs(**costs)))
                return [None]
            case "missing", [keys]:
                return [[key for key in keys if key not in self.stored]]
            case "ingest", [keys, chunks, prefix, contexts]:
                self._ingest(keys, chunks, prefix, contexts)
                return [(sum(map(len, chunks)), {})]
            case "page", [space, after, limit, None, _]:
                of_space = chunks_of(KeySpace.from_plain(space), self._rows())
                return [sorted(key for key, _ in of_space if key > after)[:limit]]
            case "forget", [keys]:
                self.stored.difference_update(keys)
                self.planner.learn(0, News([], keys))
                return [None]
            case "costs", _:
                return [{}]  # not measured
            case "outcome", [_, True]:
                return [{"selected": [3, 4]}]
            case "outcome", [name]:
                return [self.outcomes.get(name, {})]
            case _:
                return self._notes_rpc(method, *args)

    def _notes_rpc(self, method: str, *args: Any) -> list[Any]:
        match method.removeprefix("cacheblend_"), args:
            case "prefetch", [keys]:
                self.prefetched += keys
                return [None]
            case "register", [documents]:
                for document, keys in documents:
                    self.notes.register(document, keys)
                return [None]
            case "registered", [documents]:
                noted = self.notes.documents()
                return [[name for name in documents if document_id(name) in noted]]
            case "unregister", [documents, only, forgotten]:
                return [self.notes.unregister(map(document_id, documents), only, forgotten)]
            case "compared", [prompts]:
                return [[[(0.25, True), (0.5, False)] for _ in prompts]]
            case "drop_answers", _:
                return [None]
            case "store_stats", _:
                return [{"chunks": len(self.stored)}]
        raise AssertionError(f"no such call: {method}")

    def _ingest(self, keys: Any, chunks: Any, prefix: Any, contexts: Any) -> None:
        for key, ids, context in zip(keys, chunks, contexts, strict=True):
            self.behind[key] = (*prefix, *context)
            self.rows[key] = (key, array("i", ids).tobytes(), len(prefix) + len(context))
        self.stored.update(keys)
        self.ingested += keys
        self.planner.learn(0, News([self.rows[key] for key in keys]))

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        return [list(self.stream(request)) for request in requests]

    def stream(self, request: EngineRequest) -> Iterator[EngineOutput]:
        pieces = self._answer(request)
        try:
            yield from pieces
        except GeneratorExit:
            self.aborted += 1
            raise

    async def astream(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        try:
            for piece in self._answer(request):
                yield piece
        except GeneratorExit:
            self.aborted += 1
            raise

    def close(self) -> None:
        self.closed = True

    def _answer(self, request: EngineRequest) -> list[EngineOutput]:
        self._open()
        sampling_params(request.sampling, request.params)  # refuses what vLLM would refuse
        self.requests.append(request)
        answer = [self.answers.pop(0)] if self.answers else self.answer
        ids = [100 + i for i in range(len(answer))]
        if (told := self.script(request)) is not None:
            ids = self.tokenizer.encode(told, add_special_tokens=False)
            answer = self._detokenized(ids, request.sampling.get("skip_special_tokens", True))
        words = list(answer)[: request.sampling.get("max_tokens") or 16]
        stop = request.sampling.get("stop") or []
        cut = next((i for i, w in enumerate(words) if any(s in w for s in stop)), len(words))
        reason = "stop" if cut < len(words) or len(words) == len(answer) else "length"
        words = words[:cut] or [""]
        wanted = request.sampling.get("logprobs") is not None
        engine = self._planned(request)
        if request.params is not None and stop:  # vLLM finds these in its front end
            self.outcomes[request.params[PARAMS_KEY]["request_id"]] = engine
            engine = {"prefix_cached": len(request.token_ids) - 1}
        return [
            EngineOutput(
                text=word,
                token_ids=(ids[i],) if i < len(ids) else (),
                finish_reason=reason if i == len(words) - 1 else None,
                stop_reason=None,
                logprobs=[{ids[i]: -0.5, 200 + i: -2.0}] if wanted else None,
                engine=engine if i == len(words) - 1 else {},
                at=time.perf_counter(),
            )
            for i, word in enumerate(words)
        ]

    def _detokenized(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        """What each token adds; where one is a part of a character, the one that ends it."""
        texts, whole = list[str](), ""
        for count in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:count], skip_special_tokens=skip_special_tokens)
            text = whole if text.endswith("\ufffd") else text
            texts.append(text[len(whole) :])
            whole = text
        return texts

    def _planned(self, request: EngineRequest) -> dict[str, Any]:
        """The report of a request."""
        if request.params is None:
            self.plans.append(None)
            return {}
        planned = self.planner.plan(request.token_ids, request.params[PARAMS_KEY])
        plan = planned.plan
        self.plans.append(plan if isinstance(plan, Plan) else None)
        done = _outcome(plan) if isinstance(plan, Plan) else plan._asdict()
        return {"mode": planned.mode, **done, "seconds": dict(planned.seconds)}

    def _rows(self) -> list[Any]:
        return [row for key, row in self.rows.items() if key in self.stored]

    def _open(self) -> None:
        if self.closed:
            raise ClosedError("this engine was closed; make a new CacheBlend")


def _outcome(plan: Plan) -> dict[str, Any]:
    recomputed = [round(plan.ratio * len(s)) if s.key else 0 for s in plan.segments]
    return {"plan": plan.to_dict(), "recomputed": recomputed, "missing": [], "bytes": 1}


def install(patch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """From here on every CacheBlend runs over a fake engine; the list grows with each start."""
    started: list[FakeEngine] = []

    def create(kind: str, model: str, options: Mapping[str, Any]) -> FakeEngine:
        started.append(FakeEngine(model, options))
        return started[-1]

    patch.setattr("cacheblend_rag.blend.create_engine", create)
    return started


def fake_blend(patch: pytest.MonkeyPatch, **options: Any) -> CacheBlend:
    """A CacheBlend over a fake engine."""
    install(patch)
    config = options.pop("config", None) or BlendConfig()
    return CacheBlend(options.pop("model", MODEL), config=config, **options)


def sent(blend: CacheBlend) -> list[EngineRequest]:
    """The requests that reached the fake engine, those of the model check left out."""
    engine: Any = blend._engine
    return [r for r in engine.requests if not _of_gate(r)]


def head_of(blend: CacheBlend) -> PromptPrefix | None:
    """The stored head that prompts of this front may begin with."""
    engine: Any = blend._engine
    return engine.planner._spaces[blend._name].prompt_prefix  # type: ignore[no-any-return]


def index_of(blend: CacheBlend) -> ChunkIndex:
    """What prompts of this front are searched for."""
    engine: Any = blend._engine
    return engine.planner.known.index(blend._name)  # type: ignore[no-any-return]


def plans(blend: CacheBlend) -> list[Plan | None]:
    """The plans of the requests that ``sent`` returns."""
    engine: Any = blend._engine
    both = zip(engine.requests, engine.plans, strict=True)
    return [plan for request, plan in both if not _of_gate(request)]


def _of_gate(request: EngineRequest) -> bool:
    return (request.sampling.get("logprobs"), request.sampling.get("max_tokens")) == (20, 1)
