"""What all tasks of the front door share: the engine, and how it is asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from cacheblend_rag import ingest
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engine import Engine, EngineRequest, ModelCheck
from cacheblend_rag.engine.base import EngineInfo, from_answering_ranks, plain_adapter
from cacheblend_rag.errors import (
    ClosedError,
    PromptError,
)
from cacheblend_rag.ingest import Chunk
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.prefix import prompt_prefix_ids
from cacheblend_rag.process import Home
from cacheblend_rag.prompt import tokenize_chunk

_SYNC_EVERY_S = 0.5
ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}


class Front:
    """State of a front door, and what several of its tasks do."""

    config: BlendConfig
    info: EngineInfo
    model_check: ModelCheck
    _engine: Engine
    _tokenizer: Any  # never handed out
    _space: KeySpace
    _home: Home
    _closed: bool
    _has_scheduler: bool  # the scheduler learns at once what workers do
    _synced_at: float
    _lora: Any  # vLLM's LoRARequest of this front's requests
    _adapter: str  # digest of it
    _documents = ""  # what the store calls documents of this front begins so

    def _check_open(self) -> None:
        self._home.check()
        if self._closed:
            raise ClosedError("this CacheBlend was closed; make a new one")

    def _ask_stores(self, method: str, *args: Any) -> list[Any]:
        return from_answering_ranks(self._engine.rpc(method, *args))

    def _sync(self) -> None:
        """Let the engine's scheduler know what its workers did. In one process it knows at once;
        else that travels with a step, and there is one.
        """
        if self._has_scheduler:
            return
        self._synced_at = time.monotonic()
        if any(self._engine.rpc("cacheblend_waits")):
            token = EngineRequest(token_ids=(0,), sampling=ONE_TOKEN)
            self._engine.generate([token])

    def _sync_if_due(self) -> None:
        """``_sync``, twice a second at most: other processes store chunks too."""
        if not self._has_scheduler and time.monotonic() >= self._synced_at + _SYNC_EVERY_S:
            self._sync()

    def _chunk(self, text: str | Sequence[int]) -> Chunk:
        ids = tokenize_chunk(text, self._tokenizer)
        self._check_vocabulary(ids)
        return Chunk(self._space.key(ids), ids)

    def _numbered(self, texts: Sequence[str | Sequence[int]]) -> list[Chunk]:
        """The chunks of all texts; an error names the number of its text."""
        chunks = []
        for number, text in enumerate(texts, 1):
            with ingest.naming(f"text {number} of {len(texts)}"):
                chunks.append(self._chunk(text))
        return chunks

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        """A token id without an embedding would end the engine."""
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.info.vocab_size:
            wrong = low if low < 0 else high
            raise PromptError(
                f"token id {wrong} is not in the model's vocabulary of {self.info.vocab_size}; "
                "tokenise with this model's own tokenizer"
            )

    def _ingest(
        self, chunks: Sequence[Chunk], prefix_ids: tuple[int, ...]
    ) -> list[tuple[int, dict[str, str]]]:
        """Of each rank: the bytes stored, and why what key was not stored."""
        keys, ids = [c.key for c in chunks], [list(c.token_ids) for c in chunks]
        contexts = [list(c.context) for c in chunks]
        shared = list(prefix_ids[: len(prefix_ids) - len(contexts[0])])
        adapter = () if self._lora is None else (plain_adapter(self._lora),)
        return self._engine.rpc("cacheblend_ingest", keys, ids, shared, contexts, *adapter)

    @property
    def _positions(self) -> int:
        """Those of the model; a model that was refused was not asked."""
        return self.info.positions or self.info.max_model_len

    def _prompt_prefix_ids(self, *, timeless: bool = False) -> tuple[int, ...]:
        return prompt_prefix_ids(self.config, self._tokenizer, self._engine.chat, timeless=timeless)
