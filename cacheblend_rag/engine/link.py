"""How a rank's worker reaches the scheduler's side of its engine.

Where one process has both, as vLLM has it for one GPU, they share a ``Link``: what the worker sends
arrives at once. Else it waits in the worker's own, and leaves with the metadata of a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from threading import Lock
from typing import TYPE_CHECKING, ClassVar, TypeVar
from weakref import WeakValueDictionary

from cacheblend_rag.learn import Span
from cacheblend_rag.planner import Message
from cacheblend_rag.shadow import ShadowJob

_T = TypeVar("_T")
_MOST_SPANS = 1000  # that wait to be computed
_MOST_SHADOWS = 256  # that wait to be taken by the worker, which counts those that it drops

if TYPE_CHECKING:
    from cacheblend_rag.engine.blends import Blends
    from cacheblend_rag.store.follow import Follower


class Link:
    """One for an engine in each of its processes; ``of`` makes it.

    Attributes:
        rows: the only worker's; None where there are several, or it is in another process.
        has_worker: the only worker is in this process.
    """

    # Weak: vLLM ends its connectors without a call that could be relied on, and an id may come
    # again.
    _here: ClassVar[WeakValueDictionary[str, Link]] = WeakValueDictionary()
    _making: ClassVar[Lock] = Lock()

    def __init__(self) -> None:
        self.rows: Blends | None = None
        self.has_worker = False
        self._spans: deque[Span] = deque(maxlen=_MOST_SPANS)
        self._shadows: deque[ShadowJob] = deque(maxlen=_MOST_SHADOWS)
        self._messages: list[Message] = []
        self._lock = Lock()
        self._news: Follower | None = None
        self._on_message: Callable[[], object] | None = None

    @classmethod
    def of(cls, engine_id: str) -> Link:
        """That of an engine, by vLLM's name of it, for as long as somebody holds it."""
        with cls._making:
            return cls._here.setdefault(engine_id, cls())

    @property
    def has_scheduler(self) -> bool:
        """Whether the scheduler's side is in this process."""
        return self._on_message is not None

    @property
    def waits(self) -> bool:
        """Whether a message was sent that was not taken."""
        return bool(self._messages) or (self._news is not None and self._news.has_news)

    def on_message(self, wake: Callable[[], object]) -> None:
        """The scheduler's side is here: ``wake`` is called, from any thread, when it should
        ``take``.
        """
        self._on_message = wake

    def send(self, message: Message) -> None:
        """Send a message to the scheduler's side."""
        with self._lock:
            self._messages.append(message)
        self._wake()

    def follow(self, news: Follower) -> None:
        """Send a store's news as well, from here on."""
        self._news = news
        news.start(self._wake)

    def take(self) -> list[Message]:
        """The messages since the call before; waits for nothing."""
        with self._lock:
            messages, self._messages = self._messages, []
        # After the messages: a space must be known before the chunks that are in it.
        news = self._news.take() if self._news is not None else None
        return messages if news is None else [*messages, news]

    def add_spans(self, spans: Iterable[Span]) -> None:
        """The scheduler's side learnt what is to be computed. The oldest go where too many wait."""
        self._spans.extend(spans)

    def take_spans(self) -> list[Span]:
        """What was added since the call before."""
        return _drained(self._spans)

    def add_shadow(self, job: ShadowJob) -> None:
        """The scheduler's side saw the end of an answer that was drawn."""
        self._shadows.append(job)

    def take_shadows(self) -> list[ShadowJob]:
        """What was added since the call before."""
        return _drained(self._shadows)

    def end(self) -> None:
        """The worker blends no more."""
        self.rows = self._news = None

    def _wake(self) -> None:
        if self._on_message is not None:
            self._on_message()


def _drained(waiting: deque[_T]) -> list[_T]:
    """What is there; others may add to it meanwhile."""
    found = list[_T]()
    while waiting:
        found.append(waiting.popleft())
    return found
