"""What LlamaIndex retrieves: brought nearer ahead of the prompt, and named in reports where no
prompt contains it.

LlamaIndex's events say what was retrieved, but not reliably for which prompt (a stream that is read
in another thread has none). So no answer depends on them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index_instrumentation import get_dispatcher

from cacheblend_rag.shared import SharedEngine

_log = logging.getLogger(__name__)


@dataclass
class _Retrieved:
    """What one retrieval found and no prompt has contained yet."""

    waiting: list[BaseNode]
    warn: bool = True  # until one was found, or a warning was given


_last: ContextVar[_Retrieved | None] = ContextVar("cacheblend_retrieved", default=None)


class RetrievalHandler(BaseEventHandler):
    """Remembers, for this thread or task, what was retrieved last, and has it brought nearer."""

    engines: list[SharedEngine] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "CacheBlendRetrievalHandler"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if isinstance(event, RetrievalEndEvent):
            nodes = [found.node for found in event.nodes]
            _last.set(_Retrieved(nodes))
            for engine in self.engines:
                engine.prefetch([node.get_content(MetadataMode.LLM) for node in nodes])


def watch_retrieval(prefetch: SharedEngine | None = None) -> None:
    """From now on, reports of this process name retrieved chunks that no prompt contained so far.

    Their node ids are in ``response.raw["cacheblend"]["retrieved_not_found"]``. LlamaIndex has no
    way to remove a handler; calling this again adds none.

    Args:
        prefetch: ``llm.engine``, to also bring the KV of what is retrieved from disk to memory
            while the prompt is written; for stores with both (``file:///kv?memory=4GiB``).
    """
    dispatcher = get_dispatcher()
    found = [h for h in dispatcher.event_handlers if isinstance(h, RetrievalHandler)]
    handler = found[0] if found else RetrievalHandler()
    if not found:
        dispatcher.add_event_handler(handler)
    handler.engines = [engine for engine in handler.engines if engine.started]
    if prefetch is not None and prefetch not in handler.engines:
        handler.engines.append(prefetch)


def not_found(prompt: str) -> list[str] | None:
    """Node ids of what was retrieved last here and stands in no prompt since, this one included;
    None where nothing was retrieved. Warns where a prompt contains none of it.
    """
    last = _last.get()
    if last is None:
        return None
    before = len(last.waiting)
    last.waiting = [node for node in last.waiting if not _is_in(node, prompt)]
    if len(last.waiting) < before:
        last.warn = False
    if last.waiting and last.warn:
        last.warn = False
        _log.warning(
            "None of the %d chunks retrieved last is in the prompt as it was ingested, so their KV "
            "can't be reused as a whole. Response modes, templates and postprocessors that rewrite "
            "text do this: see 'What is found' in docs/integrations.md.",
            before,
        )
    return [node.node_id for node in last.waiting]


def _is_in(node: BaseNode, prompt: str) -> bool:
    texts: Sequence[str] = [
        node.get_content(MetadataMode.LLM).strip(),
        node.get_content(MetadataMode.NONE).strip(),
    ]
    return any(text in prompt for text in texts)
