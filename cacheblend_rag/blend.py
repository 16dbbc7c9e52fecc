"""The front door: ``CacheBlend`` over an embedded engine and a chunk store."""

from __future__ import annotations

import asyncio
import copy
import itertools
import statistics
import time
import uuid
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, overload

from tqdm import tqdm

from cacheblend_rag import calibration, ingest, metrics, model_check
from cacheblend_rag.config import PER_CALL, PER_REQUEST, BlendConfig, unknown_option
from cacheblend_rag.costs import Costs
from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine import Engine, EngineOutput, EngineRequest, ModelCheck, create_engine
from cacheblend_rag.engine.base import from_speaking_ranks
from cacheblend_rag.errors import (
    CacheBlendError,
    ClosedError,
    ConfigError,
    EmptyTextError,
    EngineError,
    PromptError,
    UnavailableError,
)
from cacheblend_rag.ingest import Chunk, IngestReport, LeftContext, Owners
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import chunks_of
from cacheblend_rag.models import resolve_model
from cacheblend_rag.plan import PARAMS_KEY, Plan, PromptPrefix
from cacheblend_rag.planner import Space
from cacheblend_rag.prefix import document_context, ingest_prefix, prompt_prefix_ids
from cacheblend_rag.process import Home
from cacheblend_rag.prompt import Prompt, is_prompt, owned, tokenize, tokenize_chunk
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.report import make_report
from cacheblend_rag.result import AsyncBlendStream, Begun, BlendResult, BlendStream, make_result
from cacheblend_rag.store.url import parse_size

_TIMING_ROUNDS = 7
_SYNC_EVERY_S = 0.5
# Threads that prepare prompts for event loops. With two, a loop waits for its turn behind both.
_PREPARING = 1
_ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
_PROBE_SAMPLING = {**_ONE_TOKEN, "logprobs": 20}


class _PreparedRequest(NamedTuple):
    """A request ready for the engine, and what its report will need.

    Attributes:
        why_not: why the engine is not asked to blend.
    """

    request: EngineRequest
    why_not: Why | None
    mode: str
    tokenize_s: float
    request_id: str


class _Options(NamedTuple):
    """Those of one call: ours, vLLM's sampling parameters, and a LoRA request."""

    config: BlendConfig
    sampling: Mapping[str, Any]
    lora_request: Any


class CacheBlend:
    """RAG prompts several times sooner to their first token.

    Chunks are computed once by ``ingest``. Any later prompt that contains them, in any order, is
    served from their stored KV: keys are re-rotated, a small share of tokens is recomputed, and
    vLLM computes the rest. Prompts, ids and sampling stay what they are.

    Args:
        model: a hub name or a folder.
        config: how to blend; see ``BlendConfig``.
        engine: ``serving`` (vLLM's AsyncLLM: all methods, streams side by side) or ``batch``
            (vLLM's LLM: in the caller's thread, one call at a time).
        **engine_args: vLLM's engine arguments by their own names.

    Raises:
        EngineMissingError, ConfigError, ModelError, StoreError, EngineError.

    Safe to use from several threads and event loops.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: BlendConfig | None = None,
        engine: str = "serving",
        **engine_args: Any,
    ) -> None:
        config = config or BlendConfig()
        self._take(create_engine(engine, resolve_model(str(model)), engine_args), config)
        try:
            self.calibration = calibration.find(self.info.fingerprint, self.config.calibration)
            self.model_check: ModelCheck = self._check_model()
            if self.model_check.passed:
                self._limit(self._measure_costs())
        except BaseException:
            self._engine.close()
            raise

    @staticmethod
    def connect(
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        config: BlendConfig | None = None,
    ) -> CacheBlend:
        """The same front door to an engine in another process: that of ``cacheblend serve``.

        Args:
            url: of the server, for instance ``http://localhost:8000``.
            api_key: one of those that the server was started with.
            timeout: seconds without a word from the server until a call fails.
            config: what requests ask for where a call says nothing; None: what the server's
                configuration says. Fields that only the server can set must be left out, or equal
                the server's.

        Raises:
            ServerError: no server answers there, or one that is not ours.
            ConfigError: a refused ``url``, key or ``config``.
        """
        from cacheblend_rag.client import RemoteCacheBlend

        return RemoteCacheBlend(url, api_key=api_key, timeout=timeout, config=config)

    @classmethod
    def around(
        cls,
        engine: Engine,
        config: BlendConfig,
        model_check: ModelCheck,
        space: Space | None,
        *,
        has_scheduler: bool = True,
    ) -> Self:
        """A front to an engine that others started and bound: nothing is checked or opened.

        Args:
            gate: what was found when it was started.
            space: of the requests that it plans; None where it plans none.
            is_heard: its scheduler's side hears at once what its workers do.
        """
        front = object.__new__(cls)
        front._take(engine, config)
        front.calibration = space.calibration if space is not None else None
        front.model_check, front._is_heard, front._longest = (
            model_check,
            has_scheduler,
            model_check.max_tokens,
        )
        if space is not None:
            front._name, front._space = space.name, space.keys
        return front

    def _take(self, engine: Engine, config: BlendConfig) -> None:
        self.config, self._engine, self.info = config, engine, engine.info
        self._numbers, self._session = itertools.count(), uuid.uuid4().hex[:8]
        self._closed, self._home = False, Home()
        self._preparing = DaemonPool(_PREPARING, "cacheblend-prepare")
        self._namespaces = {config.namespace}  # of all fronts to this engine
        self._name = uuid.uuid4().hex  # of the space that this front's requests are planned in
        self._is_heard, self._synced_at = True, 0.0
        self._tokenizer: Any = engine.tokenizer  # never handed out
        self._space = KeySpace(self.info.fingerprint, (), config.namespace)

    # ---- ingestion -----------------------------------------------------------------------------

    def ingest(
        self,
        texts: str | Sequence[str | Sequence[int]],
        *,
        left_context: str | Sequence[LeftContext] | None = None,
        documents: str | Sequence[str | None] | None = None,
        progress: bool = True,
    ) -> IngestReport:
        """Compute and store the KV of chunks. What is stored already is skipped, so an interrupted
        or repeated ingestion costs only look-ups. Texts that are too short or too long for their KV
        to be used are passed over, and counted.

        Args:
            texts: the chunks, or their token ids.
            before: of each, what stands before it in its own document (text or token ids, the last
                of which are taken), or None; for ``ingest_prefix="document"``. It is no part of a
                chunk's key: of equal chunks, the KV of the first that was stored stays.
            documents: of each, the document (any text) that it belongs to, or None; noted as
                ``register_documents`` does, as soon as it is stored.
            progress: a bar while KV is computed.

        Raises:
            ConfigError: ``left_context`` with another ingest prefix.
            PromptError: something that is no text, named by its number; ``left_context`` or
                ``documents`` not one for each text. Nothing was computed then.
            EmptyTextError: a text of white space only; as above.
            StoreError: the store can't be written; what was stored so far stays, and is used.
        """
        self._check_open()
        start = time.perf_counter()
        given = ingest.as_list(texts)
        known = ingest.for_each(given, left_context, self.config.ingest_prefix)
        names = ingest.one_for_each(given, documents, "documents")
        if not self.model_check.passed:
            return IngestReport(
                chunks=len(given), reason=self.model_check.reason, detail=self.model_check.detail
            )
        chunks = self._numbered(given)
        most = min(self.info.max_model_len, self._positions - len(self._space.prefix_ids))
        sorted_out = ingest.by_length(chunks, self.config.min_chunk_tokens, most)
        new = ingest.distinct(sorted_out.useful)
        todo = self._missing(new)
        if left_context is not None:
            todo = self._in_context(todo, chunks, known)
        owners = ingest.owners(chunks, names)
        absent = {c.key for c in todo}
        self._note([c for c in new if c.key not in absent], owners)
        stored, not_stored = self._compute(todo, owners, progress)
        useful = {c.key for c in new}
        return IngestReport(
            chunks=len(given),
            computed=len(todo),
            present=len(new) - len(todo),
            repeated=len(sorted_out.useful) - len(new),
            too_short=sorted_out.too_short,
            too_long=sorted_out.too_long,
            not_stored=not_stored,
            tokens=sum(len(c.token_ids) for c in todo),
            bytes=stored,
            seconds=time.perf_counter() - start,
            keys=[c.key if c.key in useful else "" for c in chunks],
        )

    def prefetch(self, texts: str | Sequence[str | Sequence[int]]) -> None:
        """Start bringing chunks from a slow tier of the store nearer, ahead of the prompt that will
        contain them. Texts that are not stored are passed over.
        """
        self._check_open()
        keys = [c.key for c in self._numbered(ingest.as_list(texts))]
        if self.model_check.passed and keys:
            self._engine.rpc("cacheblend_prefetch", keys)

    def forget(self, texts: str | Sequence[str | Sequence[int]]) -> None:
        """Drop chunks from the store and the index; absent ones are ignored."""
        self._check_open()
        self.forget_keys(c.key for c in self._numbered(ingest.as_list(texts)))

    def forget_keys(self, keys: Iterable[str]) -> int:
        """``forget`` chunks by the keys that ``IngestReport`` and reports name; returns how many
        of them were there.
        """
        self._check_open()
        keys = list(dict.fromkeys(keys))
        if not (self.model_check.passed and keys):
            return 0
        absent = set.union(*map(set, self._ask_stores("cacheblend_missing", keys)))
        self._engine.rpc("cacheblend_forget", keys)
        self._sync()
        return len(keys) - len(absent)

    def key(self, text: str | Sequence[int]) -> str:
        """The key that ``ingest`` stores a chunk under.

        Raises:
            PromptError, EmptyTextError: as ``ingest`` does.
        """
        return self._chunk(text).key

    def register_documents(self, documents: Mapping[str, Iterable[str]]) -> None:
        """Note which chunks each document (any text) consists of, by their keys, beside those noted
        before; for ``forget_documents``. A store on disk keeps this for later engines too, as a
        hash of the document's name; a store that is all remote keeps it until this one is closed.
        """
        self._check_open()
        rows = [(name, list(keys)) for name, keys in documents.items()]
        if self.model_check.passed and rows:
            self._engine.rpc("cacheblend_register", rows)

    def registered_documents(self, documents: Iterable[str]) -> set[str]:
        """Those of ``documents`` that chunks are noted for."""
        self._check_open()
        names = list(documents)
        if not (self.model_check.passed and names):
            return set()
        found = self._engine.rpc("cacheblend_registered", names)
        return set(itertools.chain.from_iterable(found))

    def forget_documents(self, documents: Iterable[str], only: Iterable[str] | None = None) -> int:
        """Forget the chunks that these documents consist of, or those of them whose keys are in
        ``only``, but for what other documents consist of; returns how many were there.
        """
        self._check_open()
        names = list(documents)
        if not (self.model_check.passed and names):
            return 0
        keys = None if only is None else list(only)
        dropped = self._engine.rpc("cacheblend_unregister", names, keys)
        return self.forget_keys(itertools.chain.from_iterable(dropped))

    def delete_except(self, texts: Iterable[str | Sequence[int]]) -> int:
        """Forget every chunk of this model and namespace that is not among ``texts``; returns how
        many were forgotten, those that other processes stored among them.
        """
        self._check_open()
        kept = {c.key for c in self._numbered(ingest.as_list(texts))}
        return self.forget_keys(self.stored() - kept)

    def stored(self) -> set[str]:
        """The keys of all chunks of this model, namespace and ingest prefix that are stored, by
        whichever process.

        Raises:
            StoreError: the store cannot be asked.
        """
        self._check_open()
        if not self.model_check.passed:
            return set()
        ranks = self._ask_stores("cacheblend_list")
        return set.intersection(
            *({key for key, _ in chunks_of(self._space, rows)} for rows in ranks)
        )

    def with_config(self, config: BlendConfig, *, space: str | None = None) -> Self:
        """A second front to the same engine and store, with a configuration of its own: another
        ingest prefix, say. Each knows what is stored by its own configuration, through whichever
        front or process. Where ``config`` names another store, that is passed over; close only the
        first front. One of another namespace is another tenant's: it reads none of the KV of the
        first, vLLM's prefix cache included.

        Args:
            space: by which name its requests are known to the engine; one of its own where None.
        """
        self._check_open()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.config, other._name = config, space or uuid.uuid4().hex
        other.__dict__.pop("tokenizer", None)  # each has a copy of its own
        other._namespaces.add(config.namespace)
        other._space = other._key_space(config)
        if self.model_check.passed:
            other._open_space()
        return other

    @cached_property
    def tokenizer(self) -> Any:
        """A copy of the model's tokenizer, None where the engine has none. What is set on it, such
        as truncation, does not reach the prompts.
        """
        return copy.deepcopy(self._tokenizer)

    @property
    def engine(self) -> Engine:
        """The engine below, for what measures it."""
        return self._engine

    @property
    def key_space(self) -> KeySpace:
        """What the keys of this engine's chunks depend on, beside their tokens."""
        return self._space

    # ---- answers -------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: Prompt, **options: Any) -> BlendResult: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Any) -> list[BlendResult]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], **options: Any
    ) -> BlendResult | list[BlendResult]:
        """Answer one prompt, or several together.

        Args:
            prompt: text, chat messages (the model's own template is applied) or token ids; a list
                of these is several prompts.
            **options: vLLM's sampling parameters by their own names; ``mode``,
                ``recompute_ratio``, ``selector``, ``selector_options``, ``propagation_length``, ``blend_if`` and
                ``chat_template_kwargs`` of ``BlendConfig``; ``lora_request`` (served without
                blending).

        Raises:
            PromptError: an empty, too long or malformed prompt.
            ConfigError: an unknown option or a refused value.
            EngineError: the engine failed.
        """
        prompts: list[Prompt] = [prompt] if is_prompt(prompt) else as_prompts(prompt)
        prepared = [self._prepare(p, options) for p in prompts]
        start = time.perf_counter()
        answers = self._engine.generate([p.request for p in prepared])
        results = [self._finish(p, a, start) for p, a in zip(prepared, answers, strict=True)]
        return results[0] if is_prompt(prompt) else results

    def stream(self, prompt: Prompt, **options: Any) -> BlendStream:
        """Answer one prompt piece by piece: iterate over the text; ``.result`` is there at the end.

        Leaving the iteration early (``close()``, or a ``with`` block) aborts the request.
        Arguments and errors are those of ``generate``.
        """
        prepared = self._prepare(prompt, options)
        pieces = self._engine.stream(prepared.request)
        return BlendStream(pieces, partial(self._finish, prepared))

    async def agenerate(self, prompt: Prompt, **options: Any) -> BlendResult:
        """``generate`` of one prompt for an event loop; cancelling aborts the request."""
        stream = self.astream(prompt, **options)
        async for _ in stream:
            pass
        return stream.result

    def astream(self, prompt: Prompt, **options: Any) -> AsyncBlendStream:
        """``stream`` for an event loop: ``async for piece in blend.astream(prompt)``."""
        self._check_open()
        asked = self._split(options)  # what is wrong with them is said here
        return AsyncBlendStream(partial(self._begin, owned(prompt), asked))

    async def _begin(self, prompt: Prompt, asked: _Options) -> Begun:
        """Prepare a request beside the event loop: long prompts take a while to tokenise."""
        try:
            preparing = self._preparing.submit(self._prepare_split, prompt, asked)
        except RuntimeError as error:
            raise ClosedError("this engine was closed; make a new CacheBlend") from error
        prepared = await asyncio.wrap_future(preparing)
        return Begun(
            self._engine.astream(prepared.request),
            partial(self._finish, prepared),
            prepared.tokenize_s,
        )

    def tokenize(
        self, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """The token ids that are computed for ``prompt``, with the cache on or off."""
        config = self.config.for_call({"chat_template_kwargs": chat_template_kwargs or {}})
        return self._ids(prompt, config)

    @property
    def takes_messages(self) -> bool:
        """Whether prompts may be chat messages: the model has a chat template."""
        return self._engine.chat.available

    # ---- the path of one request ---------------------------------------------------------------

    def _prepare(self, prompt: Prompt, options: Mapping[str, Any]) -> _PreparedRequest:
        self._check_open()
        return self._prepare_split(prompt, self._split(options))

    def _prepare_split(self, prompt: Prompt, asked: _Options) -> _PreparedRequest:
        config, sampling, lora = asked
        start = time.perf_counter()
        ids = self._ids(prompt, config)
        tokenize_s = time.perf_counter() - start
        why_not = self._why_not(config)
        if why_not is None:
            self._sync_if_due()
        request_id = f"{self._session}-{next(self._numbers)}"
        request = EngineRequest(
            token_ids=ids,
            sampling=sampling,
            params=None if why_not else self._params(config, request_id),
            cache_salt=_salt(config, request_id),
            lora_request=lora,
        )
        return _PreparedRequest(request, why_not, config.mode, tokenize_s, request_id)

    def _why_not(self, config: BlendConfig) -> Why | None:
        """Why the engine is not asked to blend."""
        if config.mode in ("off", "full"):
            return Why(Reason.MODE, f"mode is {config.mode!r}")
        if self.model_check.passed:
            return None
        assert self.model_check.reason is not None
        return Why(self.model_check.reason, self.model_check.detail)

    def _params(self, config: BlendConfig, request_id: str, space: str = "") -> dict[str, Any]:
        options = {n: v for n, v in config.request_defaults().items() if n in PER_REQUEST}
        names = {"space": space or self._name, "request_id": request_id}
        return {PARAMS_KEY: {**options, **names}}

    def _ids(self, prompt: Prompt, config: BlendConfig) -> tuple[int, ...]:
        ids = tokenize(
            prompt,
            self._tokenizer,
            self._engine.chat,
            config.chat_template_kwargs,
            max_model_len=self.info.max_model_len,
        )
        self._check_vocabulary(ids)
        return ids

    def _finish(
        self, prepared: _PreparedRequest, pieces: Sequence[EngineOutput], start: float
    ) -> BlendResult:
        last, waited = pieces[-1], prepared.tokenize_s
        report = make_report(
            prepared.why_not,
            self._engine_part(prepared, pieces),
            mode=prepared.mode,
            tokens_total=len(prepared.request.token_ids),
            ttft_s=pieces[0].at - start + waited,
            total_s=last.at - start + waited,
            tokenize_s=waited,
        )
        metrics.observe(report)
        return make_result(prepared.request.token_ids, pieces, report, prepared.request_id)

    def _engine_part(
        self, prepared: _PreparedRequest, pieces: Sequence[EngineOutput]
    ) -> Mapping[str, Any]:
        """What the engine says it did. The last piece does not tell where the request ended in the
        very step of its blend, and where the front end ended it, as at a stop string.
        """
        engine = pieces[-1].engine
        if prepared.why_not or "recomputed" in engine or "reason" in engine:
            return engine
        outcome: Mapping[str, Any] = self._engine.rpc("cacheblend_outcome", prepared.request_id)[0]
        return outcome

    # ---- options -------------------------------------------------------------------------------

    def _split(self, options: Mapping[str, Any]) -> _Options:
        """One call's options: ours, the sampling parameters, and a LoRA request."""
        chunks_of = {k: v for k, v in options.items() if k in PER_CALL}
        sampling = {k: v for k, v in options.items() if k not in PER_CALL and k != "lora_request"}
        known = self._engine.sampling_names
        for name in sampling:
            if name not in known:
                raise unknown_option(name, {*known, *PER_CALL}, "generate")
        if sampling.get("n", 1) != 1:
            raise ConfigError("n must be 1: for several answers pass the prompt several times")
        if self._tokenizer is None:
            sampling.setdefault("detokenize", False)
        config = calibration.resolved(self.config.for_call(chunks_of), self.calibration)
        return _Options(config, sampling, options.get("lora_request"))

    # ---- store and gate ------------------------------------------------------------------------

    def _chunk(self, text: str | Sequence[int]) -> Chunk:
        ids = tokenize_chunk(text, self._tokenizer)
        self._check_vocabulary(ids)
        return Chunk(self._space.key(ids), ids)

    def _numbered(self, texts: Sequence[str | Sequence[int]]) -> list[Chunk]:
        """The chunks of all texts; what is wrong with one is said with its number."""
        chunks = []
        for number, text in enumerate(texts, 1):
            with ingest.naming(f"text {number} of {len(texts)}"):
                chunks.append(self._chunk(text))
        return chunks

    def _in_context(
        self, todo: Sequence[Chunk], chunks: Sequence[Chunk], left_context: Sequence[LeftContext]
    ) -> list[Chunk]:
        """Those to do among ``chunks``, each with what stands before it in its document."""
        prompt_prefix = self._prompt_prefix_ids(timeless=True)
        neutral = self._space.prefix_ids[len(prompt_prefix) :]
        first = {chunk.key: i for i, chunk in reversed(list(enumerate(chunks)))}
        placed = []
        for chunk in todo:
            number = first[chunk.key]
            with ingest.naming(f"before, text {number + 1} of {len(left_context)}"):
                context = document_context(left_context[number], neutral, self._tokenizer)
                if context:
                    self._check_vocabulary(context)
            placed.append(chunk._replace(context=context))
        return placed

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        """A token id without an embedding would end the engine."""
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.info.vocab_size:
            wrong = low if low < 0 else high
            raise PromptError(
                f"token id {wrong} is not in the model's vocabulary of {self.info.vocab_size}; "
                "tokenise with this model's own tokenizer"
            )

    def _missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Chunks that are not stored: of ranks with memory of their own, in that of any."""
        absent, present = set[str](), set[str]()
        keys = [c.key for c in chunks]
        for i in range(0, len(keys), 1000):
            for of_rank in self._ask_stores("cacheblend_missing", keys[i : i + 1000]):
                absent.update(of_rank)
                present.update(set(keys[i : i + 1000]).difference(of_rank))
        if self._space.by_document and (parts := absent & present):
            # what is left of them may have been computed behind another document
            self._engine.rpc("cacheblend_forget", list(parts))
        return [c for c in chunks if c.key in absent]

    def _ask_stores(self, method: str, *args: Any) -> list[Any]:
        return from_speaking_ranks(self._engine.rpc(method, *args))

    def _compute(
        self, chunks: Sequence[Chunk], owners: Owners, progress: bool
    ) -> tuple[int, dict[str, str]]:
        """Prefill and store; the bytes stored, and why what key was not stored."""
        prefix, stored, not_stored = self._space.prefix_ids, 0, dict[str, str]()
        with tqdm(
            total=len(chunks), desc="ingest", unit="chunk", disable=not (progress and chunks)
        ) as bar:
            for batch in ingest.batches(chunks, self.info.max_num_batched_tokens):
                try:
                    ranks = self._ingest(batch, prefix)
                except BaseException:
                    self._note_stored(batch, owners)
                    raise
                self._note(batch, owners)
                for nbytes, refused in ranks:
                    stored += nbytes
                    not_stored |= refused
                bar.update(len(batch))
        return stored, not_stored

    def _note(self, chunks: Sequence[Chunk], owners: Owners) -> None:
        """From here on these chunks are found in prompts, and forgotten with their documents."""
        self._sync()
        self.register_documents(ingest.by_document(chunks, owners))

    def _note_stored(self, batch: Sequence[Chunk], owners: Owners) -> None:
        """``_note`` those of a batch that were stored before it failed."""
        with suppress(CacheBlendError):  # what failed may fail here too, and is raised in any case
            ranks = self._ask_stores("cacheblend_missing", [c.key for c in batch])
            absent = set(itertools.chain.from_iterable(ranks))
            self._note([c for c in batch if c.key not in absent], owners)

    def _ingest(
        self, chunks: Sequence[Chunk], prefix_ids: tuple[int, ...]
    ) -> list[tuple[int, dict[str, str]]]:
        """Of each rank: the bytes stored, and why what key was not stored."""
        keys, ids = [c.key for c in chunks], [list(c.token_ids) for c in chunks]
        contexts = [list(c.context) for c in chunks]
        shared = list(prefix_ids[: len(prefix_ids) - len(contexts[0])])
        return self._engine.rpc("cacheblend_ingest", keys, ids, shared, contexts)

    @property
    def _positions(self) -> int:
        """Those of the model; a model that was refused was not asked."""
        return self.info.positions or self.info.max_model_len

    def _key_space(self, config: BlendConfig) -> KeySpace:
        prefix = ingest_prefix(
            config, self._tokenizer, self._engine.chat, positions=self._positions
        )
        by_document = config.ingest_prefix == "document"
        return KeySpace(self.info.fingerprint, prefix, config.namespace, by_document)

    def _check_model(self) -> ModelCheck:
        """Check the model, open the store, and prove ratio 1 on a probe prompt."""
        report = model_check.check_layers(self.info)
        if not report.passed:
            return report
        self._space = self._key_space(self.config)
        heard = self._engine.rpc(
            "cacheblend_bind",
            self.config.store,
            self.info.fingerprint,
            parse_size(self.config.gpu_cache) if self.config.gpu_cache else 0,
            self.config.namespace,
        )
        self._is_heard = all(heard)
        self._longest = report.max_tokens
        self._limit(None)
        report = self._probe(report)
        if report.passed:
            self._longest = report.max_tokens
            self._open_space()
        else:
            self._engine.rpc("cacheblend_unbind")
        return report

    def _limit(self, costs: Costs | None) -> None:
        self._engine.rpc("cacheblend_limit", self._longest, costs and costs._asdict())
        self._sync()

    def _open_space(self) -> None:
        """Have this front's requests planned by its own configuration."""
        options = calibration.resolved(self.config, self.calibration).request_defaults()
        prompt_prefix = self._store_prompt_prefix()
        space = Space(
            name=self._name, keys=self._space, prompt_prefix=prompt_prefix, options=options
        )
        self._engine.rpc("cacheblend_open", space.to_plain())
        self._sync()

    def _sync(self) -> None:
        """Let the engine's scheduler know what its workers did. In one process it knows at once;
        else that travels with a step, and there is one.
        """
        if self._is_heard:
            return
        self._synced_at = time.monotonic()
        if any(self._engine.rpc("cacheblend_waits")):
            token = EngineRequest(token_ids=(0,), sampling=_ONE_TOKEN)
            self._engine.generate([token])

    def _sync_if_due(self) -> None:
        """``_sync``, twice a second at most: other processes store chunks too."""
        if not self._is_heard and time.monotonic() >= self._synced_at + _SYNC_EVERY_S:
            self._sync()

    def _store_prompt_prefix(self) -> PromptPrefix | None:
        """The head of chat prompts, stored at position 0: exact where a prompt starts with it."""
        ids = self._prompt_prefix_ids()
        if len(ids) < 2:
            return None
        key = self._space.prompt_prefix_key(ids)
        if any(self._ask_stores("cacheblend_missing", [key])):
            stable = self._prompt_prefix_ids(timeless=True)
            if stable == ids:
                self._ingest([Chunk(key, ids)], ())
            else:
                self._replace_prompt_prefix(
                    f"cacheblend/head/{self._space.prompt_prefix_key(stable)}", Chunk(key, ids)
                )
        return PromptPrefix(key, ids)

    def _replace_prompt_prefix(self, name: str, prompt_prefix: Chunk) -> None:
        """One with a date is another every day, and only the newest is kept."""
        old = self._engine.rpc("cacheblend_unregister", [name], None)
        self._engine.rpc("cacheblend_forget", list(itertools.chain.from_iterable(old)))
        self._ingest([prompt_prefix], ())
        self._engine.rpc("cacheblend_register", [(name, [prompt_prefix.key])])

    def _prompt_prefix_ids(self, *, timeless: bool = False) -> tuple[int, ...]:
        return prompt_prefix_ids(self.config, self._tokenizer, self._engine.chat, timeless=timeless)

    def _probe(self, report: ModelCheck) -> ModelCheck:
        probe = model_check.probe(self.info)
        if probe is None:
            return report
        name = f"probe-{self._name}"
        # behind the probe's own head, so that the first chunk's KV is exact, and has no rows
        space = KeySpace(self.info.fingerprint, probe.prompt_prefix, self.config.namespace)
        key = space.key(probe.chunk)
        self._ingest([Chunk(key, probe.chunk)], probe.prompt_prefix)
        # whether the store took it or not: then it is missing, and computed with the others
        known = [[key, array("i", probe.chunk).tobytes(), len(probe.prompt_prefix)]]
        self._engine.rpc("cacheblend_open", Space(name=name, keys=space).to_plain(), known)
        self._sync()
        [[alone]] = self._engine.generate([_probing(probe.ids)])
        # beside a request of one row and a plain prefill: were their rows taken for one another's,
        # nothing else would say so
        config = self.config.for_call(
            {"mode": "blend", "recompute_ratio": 1.0, "blend_if": "always"}
        )
        blended = _probing(probe.ids, self._params(config, name, name))
        beside = [_probing(probe.ids[:1]), _probing(probe.ids)]
        _, *together = self._engine.generate([*beside, blended])
        done = self._engine_part(_PreparedRequest(blended, None, "blend", 0.0, name), together[1])
        with suppress(UnavailableError):  # the store keeps the probe then
            self._engine.rpc("cacheblend_forget", [key])
        for [piece] in together:
            assert alone.logprobs is not None and piece.logprobs is not None
            both = alone.logprobs[0], piece.logprobs[0]
            report = model_check.check_prefill(report, *both, "recomputed" in done)
            if not report.passed:
                return report
        return model_check.within_what_was_proved(report, self.info, len(probe.ids))

    def _measure_costs(self) -> Costs | None:
        """What the workers measured, corrected by requests from end to end; None on a CPU."""
        measured = self._engine.rpc("cacheblend_costs")[0]
        if not measured:
            return None
        costs, prompts = Costs(**measured), model_check.timing_ids(self.info, _TIMING_ROUNDS)
        if not prompts:
            return costs
        ids = prompts[0][1]
        chunk = Chunk(self._space.key(ids), ids)
        self._ingest([chunk], self._space.prefix_ids)
        self._sync()
        plain, blended = {"mode": "full"}, {"mode": "blend", "blend_if": "always"}
        taken: dict[str, list[float]] = {"full": [], "blend": []}
        plan: Plan | None = None
        for parts in prompts:
            for options in (plain, blended):
                start = time.perf_counter()
                prepared = self._prepare(sum(parts, ()), {**options, **_ONE_TOKEN})
                pieces = self._engine.generate([prepared.request])[0]
                seconds = time.perf_counter() - start
                # the store's speed is known apart
                done = self._engine_part(prepared, pieces)
                fetched = done.get("seconds", {}).get("fetch", 0.0)
                taken[options["mode"]].append(seconds - fetched)
            plan = Plan.from_dict(done["plan"]) if done.get("plan") else None
        with suppress(UnavailableError):
            self.forget_keys([chunk.key])
        if plan is None:
            return costs
        return costs.corrected(plan, *(statistics.median(taken[mode]) for mode in taken))

    # ---- life ----------------------------------------------------------------------------------

    def stats(self) -> list[dict[str, int]]:
        """Counts of the chunk store; of ``memory://``, which each rank has for itself, one dict a
        rank. Empty where blending is off. Where several namespaces share the engine, only the
        number of chunks that this one has.
        """
        self._check_open()
        if len(self._namespaces) > 1:
            return [{"chunks": len(self.stored())}]
        return self._ask_stores("cacheblend_store_stats") if self.model_check.passed else []

    def close(self) -> None:
        """Stop the engine; does nothing on the second call."""
        if not self._closed and self._home.is_here:
            self._closed = True
            self._preparing.close(drop=True)
            self._engine.close()

    def __reduce__(self) -> Any:
        raise EngineError(
            "a CacheBlend can't be pickled or copied: it holds a running engine. Make one in each "
            "process, or pass on the LLM of LlamaIndex or LangChain, which starts one when needed"
        )

    def __enter__(self) -> CacheBlend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        self._home.check()
        if self._closed:
            raise ClosedError("this CacheBlend was closed; make a new one")


def as_prompts(prompts: object) -> list[Prompt]:
    """A list of prompts as such.

    Raises:
        PromptError: it is not one, or empty.
    """
    if isinstance(prompts, Sequence) and not prompts:
        raise EmptyTextError("there is no prompt; pass text, chat messages or token ids")
    if not isinstance(prompts, Sequence) or not all(is_prompt(p) for p in prompts):
        raise PromptError("pass text, chat messages or token ids, or a list of such prompts")
    return list(prompts)


def _probing(ids: tuple[int, ...], params: dict[str, Any] | None = None) -> EngineRequest:
    """A request of the model check's, of which nothing is in vLLM's prefix cache."""
    return EngineRequest(
        token_ids=ids,
        sampling=_PROBE_SAMPLING,
        params=params,
        cache_salt=f"full:{uuid.uuid4().hex}",
    )


def _salt(config: BlendConfig, request_id: str) -> str | None:
    """A full prefill reads no cached block at all. Tenants read none of one another: it would tell
    what the other asked.
    """
    if config.mode == "full":
        return f"full:{request_id}"
    return f"namespace:{config.namespace}" if config.namespace else None
