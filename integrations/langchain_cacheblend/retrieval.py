"""What LangChain retrieves: brought nearer ahead of the prompt, and named in reports where no
prompt contains it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage

from langchain_cacheblend.ingestion import CacheBlendIngestion

_log = logging.getLogger(__name__)


@dataclass
class _Chain:
    """One call of a chain, with all that it calls in turn."""

    runs: list[UUID] = field(default_factory=list)  # the first is the whole of it
    waiting: list[Document] | None = None  # retrieved, and in no prompt yet
    fresh: bool = True  # no prompt since it was retrieved


# what a handler found out about the prompt that this thread or task is about to ask
_prompt_matches: ContextVar[tuple[str, list[str] | None]] = ContextVar(
    "cacheblend_prompt_matches", default=("", None)
)


class RetrievalHandler(BaseCallbackHandler):
    """A callback for chains: ``chain.invoke(..., config={"callbacks": [handler]})``.

    It starts to bring the KV of retrieved documents from disk to memory while the prompt is still
    being written, for stores with both (``file:///kv?memory=4GiB``). And reports name, as
    ``response_metadata["cacheblend"]["retrieved_not_found"]``, what the chain retrieved and no
    prompt of it contained so far, by id or by how it begins. No answer depends on it.

    Args:
        ingestion: knows the engine, and how documents are written into prompts.
    """

    run_inline = True  # in the context of the model's call, which then reads what was found

    def __init__(self, ingestion: CacheBlendIngestion) -> None:
        self.ingestion = ingestion
        self._lock = threading.Lock()
        self._chains: dict[UUID, _Chain] = {}  # each under all of its parts' runs

    # ---- callbacks of LangChain ---------------------------------------------------------------

    def on_chain_start(
        self, *_: Any, run_id: UUID, parent_run_id: UUID | None = None, **__: Any
    ) -> None:
        with self._lock:
            chain = self._chain(parent_run_id) or _Chain()
            chain.runs.append(run_id)
            self._chains[run_id] = chain

    def on_chain_end(self, *_: Any, run_id: UUID, **__: Any) -> None:
        self._ended(run_id)

    def on_chain_error(self, *_: Any, run_id: UUID, **__: Any) -> None:
        self._ended(run_id)

    def on_retriever_end(
        self, documents: Sequence[Document], *, parent_run_id: UUID | None = None, **_: Any
    ) -> None:
        self.ingestion.engine.prefetch([self.ingestion.text_of(found) for found in documents])
        with self._lock:
            if chain := self._chain(parent_run_id):
                before = (chain.waiting or []) if chain.fresh else []  # of a retriever run with it
                chain.waiting, chain.fresh = [*before, *documents], True

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        parent_run_id: UUID | None = None,
        **_: Any,
    ) -> None:
        text = text_of(messages[0])
        _prompt_matches.set((text, self._not_found(parent_run_id, text)))

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        parent_run_id: UUID | None = None,
        **_: Any,
    ) -> None:
        _prompt_matches.set((prompts[0], self._not_found(parent_run_id, prompts[0])))

    # ---- what it makes of it -------------------------------------------------------------------

    def _chain(self, run_id: UUID | None) -> _Chain | None:
        return None if run_id is None else self._chains.get(run_id)

    def _ended(self, run_id: UUID) -> None:
        with self._lock:
            chain = self._chain(run_id)
            if chain and chain.runs[0] == run_id:
                for run in chain.runs:
                    del self._chains[run]

    def _not_found(self, parent_run_id: UUID | None, prompt: str) -> list[str] | None:
        """What a call of a chain retrieved last and no prompt of it contained since, this one
        included; None where it retrieved nothing. Warns where the first prompt contains none.
        """
        with self._lock:
            chain = self._chain(parent_run_id)
            if chain is None or chain.waiting is None:
                return None
            before = len(chain.waiting)
            waiting = [found for found in chain.waiting if not self._is_in(found, prompt)]
            first, chain.waiting, chain.fresh = chain.fresh, waiting, False
        if first and len(waiting) == before > 0:
            _log.warning(
                "None of the %d chunks retrieved last is in the prompt as it was ingested, so "
                "their KV can't be reused as a whole. Compressors and templates that rewrite text "
                "do this; a chain's document_prompt must be CacheBlendIngestion's as well.",
                before,
            )
        return [found.id or found.page_content[:80] for found in waiting]

    def _is_in(self, document: Document, prompt: str) -> bool:
        return self.ingestion.text_of(document).strip() in prompt


def not_found(prompt: str) -> list[str] | None:
    """What a ``RetrievalHandler`` of this call found of its prompt; None where there is none."""
    about, found = _prompt_matches.get()
    return found if about == prompt else None


def text_of(messages: Sequence[BaseMessage]) -> str:
    """The texts of messages, to look for documents in."""
    return "\n".join(str(message.text) for message in messages)
