"""One engine for everything in a process that names the same model; it starts when first needed.

Frameworks make, copy and pickle their model objects freely, and a second engine rarely fits. So
an adapter holds a ``SharedEngine``: copies of it are itself, and a pickle has its settings only.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import os
import re
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import CacheBlendError, ClosedError, ConfigError, PromptError
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.prompt import checked
from cacheblend_rag.store.disk import MARKER
from cacheblend_rag.store.url import parse_url

_SECRET = re.compile("(token|key|secret|password)$", re.IGNORECASE)  # hf_token, say
_lock = threading.Lock()
_by_model: weakref.WeakValueDictionary[str, SharedEngine] = weakref.WeakValueDictionary()
_running: set[SharedEngine] = set()  # what was started stays until it is closed
_by_name: weakref.WeakValueDictionary[str, SharedEngine] = weakref.WeakValueDictionary()


class SharedEngine:
    """Make one with ``for_model`` or ``around``. Safe to use from several threads and event loops.

    Attributes:
        model: hub name or folder, as it was given.
    """

    def __init__(
        self, model: str, start: Callable[[], CacheBlend], settings: Mapping[str, Any]
    ) -> None:
        self.model = model
        self._start, self._settings = start, settings
        self._lock = threading.Lock()
        self._blend: CacheBlend | None = None
        self._closed = False
        self._name = uuid.uuid4().hex
        _by_name[self._name] = self

    @classmethod
    def for_model(
        cls,
        model: str | Path,
        config: BlendConfig | None = None,
        engine_args: Mapping[str, Any] | None = None,
        default: Callable[[], BlendConfig] = BlendConfig,
    ) -> SharedEngine:
        """The engine of ``model`` in this process: the one there is, or one yet to be started.

        Args:
            model: hub name or folder.
            config: None takes the running engine's, or ``default()`` for a new one.
            engine_args: vLLM's engine arguments; None takes the running engine's.
            default: makes the configuration where none was given.

        Raises:
            ConfigError: there is one with other settings.
        """
        name = _canonical(model)
        with _lock:
            shared = _by_model.get(name)
            if shared is None or shared._closed:
                settings = {"config": config or default(), "engine_args": dict(engine_args or {})}
                shared = _by_model[name] = cls(str(model), _starter(str(model), settings), settings)
            else:
                shared._check_same(config, engine_args)
        return shared

    @classmethod
    def resolve(
        cls,
        engine: SharedEngine | None,
        model: str | Path | None,
        config: BlendConfig | None,
        engine_args: Mapping[str, Any] | None,
        default: Callable[[], BlendConfig] = BlendConfig,
    ) -> SharedEngine:
        """What an adapter was given: the engine itself, or what ``for_model`` makes one of.

        Raises:
            ConfigError: neither engine nor model; or as ``for_model`` does.
        """
        if engine is not None:
            return engine
        if model is None:
            raise ConfigError("name a model, or pass a running engine to from_engine()")
        return cls.for_model(model, config, engine_args, default)

    @classmethod
    def from_running(cls, blend: CacheBlend) -> SharedEngine:
        """The one of an engine that runs already: the same for all who hold one of it."""
        with _lock:
            for shared in _by_name.values():
                if shared._blend is blend:
                    return shared
            shared = cls._holding(blend)
            shared._blend = blend
        return shared

    @classmethod
    def _holding(cls, blend: CacheBlend) -> SharedEngine:
        from cacheblend_rag.client import RemoteCacheBlend, SharedServer

        if isinstance(blend, RemoteCacheBlend):
            return SharedServer.holding(blend)
        return cls(blend.info.model, lambda: blend, {"config": blend.config})

    @property
    def config(self) -> BlendConfig:
        """How the engine blends, or will once it runs."""
        config: BlendConfig = self._settings["config"]
        return config

    # ---- the engine ----------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether the engine runs."""
        return self._blend is not None and not self._closed

    def blend(self) -> CacheBlend:
        """The engine; the first call starts it, and others wait meanwhile.

        Raises:
            ClosedError: it was closed.
            EngineMissingError, ConfigError, ModelError, StoreError, EngineError: it can't start.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"the engine of {self.model} was closed; make a new object")
            if self._blend is None:
                self._blend = self._start()
                _running.add(self)
            return self._blend

    async def ablend(self) -> CacheBlend:
        """``blend`` for an event loop, which goes on while the engine starts."""
        return self.blend() if self.started else await asyncio.to_thread(self.blend)

    def close(self) -> None:
        """Stop the engine, for all who share it; does nothing on the second call."""
        with self._lock:
            self._closed = True
            if self._blend is not None:
                self._blend.close()
            _running.discard(self)

    @staticmethod
    def close_all() -> None:
        """Close every engine that was made by ``for_model``, as happens when the process ends."""
        for shared in {*_running, *_by_model.values()}:
            shared.close()

    def identity(self) -> str:
        """Names model, ingest prefix, namespace and store: what computed chunks depend on.

        Starts the engine. A store that is emptied, and memory, which starts empty, have another.
        """
        blend = self.blend()
        space = blend.key_space
        # the last field apart: where it is not set, names stay what they were before there was one
        parts = [*map(str, space[:-1]), *["document"] * space.by_document]
        parts += [blend.config.store, _birth(blend.config.store) or self._name]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    # ---- documents -----------------------------------------------------------------------------

    @property
    def by_document(self) -> bool:
        """Whether ``ingest`` has a use for what stands before each text."""
        return self.config.ingest_prefix == "document"

    def ingest(
        self,
        texts: Sequence[str],
        documents: Sequence[str | None],
        left_context: Sequence[str | None] | None = None,
        *,
        progress: bool,
    ) -> IngestReport:
        """Compute chunks, and note which document each belongs to; empty texts are passed over.

        Args:
            texts: the chunks.
            documents: what each is forgotten by.
            left_context: see ``CacheBlend.ingest``.
            progress: a bar while KV is computed.
        """
        self.check(texts, documents)
        rows = [(i, d) for i, d in enumerate(documents) if texts[i].strip()]
        blend = self.blend()
        report = blend.ingest(
            [texts[i] for i, _ in rows],
            left_context=None if left_context is None else [left_context[i] for i, _ in rows],
            documents=[document for _, document in rows],
            progress=progress,
        )
        if report.too_long:  # frameworks drop the report
            warnings.warn(
                f"{report.too_long} of {report.chunks} texts have more tokens than fit a prompt of "
                f"{self.model}, so no KV was stored for them. Split documents into smaller chunks",
                stacklevel=2,
            )
        return report

    def check(self, texts: Sequence[str], documents: Sequence[str | None]) -> None:
        """Before anything else stores them: that ``ingest`` takes all of these texts.

        Raises:
            PromptError: it does not; names the text and its document.
        """
        for number, (text, document) in enumerate(zip(texts, documents, strict=True), 1):
            of = "" if document is None else f", of document {document!r}"
            checked(text, f"text {number} of {len(texts)}{of}")

    def prefetch(self, texts: Sequence[str]) -> None:
        """Bring chunks nearer, in a thread of its own: the caller goes on, and gets no error.
        Does nothing while the engine does not run.
        """

        def fetch() -> None:
            with suppress(CacheBlendError):  # a hint: the prompt itself will raise what is wrong
                self.blend().prefetch([text for text in texts if text.strip()])

        if self.started:
            threading.Thread(target=fetch, name="cacheblend-prefetch", daemon=True).start()

    def forget(self, documents: Iterable[str]) -> int:
        """Drop the chunks that only these documents consist of; returns how many.

        Raises:
            PromptError: a document that the store has no chunks registered for.
        """
        documents, blend = set(documents), self.blend()
        if unknown := documents - blend.registered_documents(documents):
            raise PromptError(
                f"no chunks are registered for {sorted(unknown)}: they were never ingested, or "
                "into a store that is gone or keeps no such records. To drop all chunks that your "
                "documents no longer contain, use gc(); to register them again, ingest or "
                "backfill them first"
            )
        return blend.forget_documents(documents)

    def registered_documents(self, documents: Iterable[str]) -> set[str]:
        """Those of ``documents`` that can be forgotten by name."""
        return self.blend().registered_documents(documents)

    def forget_chunks(self, chunks: Iterable[tuple[str, str]]) -> int:
        """Drop single chunks, each a document and a key, but for what other documents consist of;
        returns how many.
        """
        owned: dict[str, list[str]] = {}
        for document, key in chunks:
            owned.setdefault(document, []).append(key)
        blend = self.blend()
        return sum(blend.forget_documents([name], keys) for name, keys in owned.items())

    # ---- copies --------------------------------------------------------------------------------

    def __copy__(self) -> SharedEngine:
        return self

    def __deepcopy__(self, memo: object) -> SharedEngine:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        config = self._settings["config"]
        plain = {f.name: getattr(config, f.name) for f in fields(config)}
        plain |= {n: dict(value) for n, value in plain.items() if isinstance(value, Mapping)}
        args = self._settings.get("engine_args")
        return _revive, (self._name, self.model, plain, args)

    def _check_same(
        self, config: BlendConfig | None, engine_args: Mapping[str, Any] | None
    ) -> None:
        given = {"config": config, "engine_args": engine_args}
        for name, value in given.items():
            if value is not None and value != self._settings[name]:
                there, asked = _shown(self._settings[name]), _shown(value)
                raise ConfigError(
                    f"{self.model} is in use in this process with {name}={there}, "
                    f"and {asked} was asked for. Ask for the same or leave {name} out to share "
                    "it, close() the other first, or start a second engine yourself and pass it "
                    "to from_engine()"
                )


def may_have_kv(text: str) -> bool:
    """Whether a text can have been ingested. Other stores take any, empty ones and halves of
    characters included, and have to get rid of them again.
    """
    try:
        return bool(checked(text).strip())
    except PromptError:
        return False


def _shown(settings: object) -> str:
    """For messages: the values of what may be secret are left out."""
    if isinstance(settings, Mapping):
        settings = {n: "***" if _SECRET.search(n) else v for n, v in settings.items()}
    return repr(settings)


def _canonical(model: str | Path) -> str:
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(model)


def _starter(model: str, settings: Mapping[str, Any]) -> Callable[[], CacheBlend]:
    return lambda: CacheBlend(model, config=settings["config"], **settings["engine_args"])


def _revive(
    name: str, model: str, config: dict[str, Any], engine_args: Mapping[str, Any] | None
) -> SharedEngine:
    """In the same process the very same; in another one, an engine of its own when needed."""
    with _lock:
        shared = _by_name.get(name)
    if shared is not None:
        return shared
    if engine_args is not None:
        return SharedEngine.for_model(model, BlendConfig(**config), engine_args)

    def refuse() -> CacheBlend:
        raise ConfigError(
            f"this object came here pickled from another process, around an engine of {model} that "
            "was passed to from_engine(). Give it the model's name instead, so that it can start "
            "one here"
        )

    return SharedEngine(model, refuse, {"config": BlendConfig(**config)})


def _birth(store: str) -> str | None:
    """What tells a store on disk from an emptied one in the same folder; None where not on disk."""
    url = parse_url(store)
    if url.scheme != "file":
        return None
    try:
        found = os.stat(Path(url.path) / MARKER)
    except OSError:
        return None
    return f"{found.st_ino}/{found.st_mtime_ns}"


def _renew_locks() -> None:
    """In a forked child: a thread of the parent may have held them."""
    global _lock
    _lock = threading.Lock()
    for shared in list(_by_name.values()):
        shared._lock = threading.Lock()


atexit.register(SharedEngine.close_all)
os.register_at_fork(after_in_child=_renew_locks)
