"""What an ingestion that fails midway leaves behind, and what becomes of unusable texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")
from fake_engine import MODEL, fake_blend, install, sent

from cacheblend_rag import (
    BlendConfig,
    CacheBlend,
    EmptyTextError,
    PromptError,
    StoreError,
)
from cacheblend_rag.shared import SharedEngine

TEXTS = [f"Passage {i}: " + f"the ship number {i} sailed on day {i}. " * 40 for i in range(20)]
NAMES = [f"document {i}" for i in range(20)]
SURROGATE = "caf\udce9.pdf " + "and words " * 40
LONG = "word " * 9000


@pytest.fixture
def blend(monkeypatch: pytest.MonkeyPatch) -> CacheBlend:
    return fake_blend(monkeypatch)


def fail_after(
    blend: CacheBlend, patch: pytest.MonkeyPatch, chunks: int, error: BaseException
) -> None:
    """The store takes that many chunks, also of a batch that it does not take as a whole."""
    engine: Any = blend.engine
    rpc = engine.rpc

    def failing(method: str, *args: Any) -> list[Any]:
        if method != "cacheblend_ingest":
            return list(rpc(method, *args))
        room = chunks - len(engine.stored) + left_context
        keys, chunks_ids, prefix, contexts = args
        done = list(rpc(method, keys[:room], chunks_ids[:room], prefix, contexts[:room]))
        if len(args[0]) > room:
            raise error
        return done

    left_context = len(engine.stored)
    patch.setattr(engine, "rpc", failing)


@pytest.mark.parametrize("error", [StoreError("the disk is full"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("chunks", [0, 1, 7, 14])
def test_what_was_stored_before_a_failure_is_used(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch, chunks: int, error: BaseException
) -> None:
    blend.ingest(TEXTS[-1], progress=False)
    with monkeypatch.context() as patch:
        fail_after(blend, patch, chunks, error)
        with pytest.raises(type(error)):
            blend.ingest(TEXTS, documents=NAMES, progress=False)
    stored = {blend.key(text) for text in TEXTS} & blend.engine.stored  # type: ignore[attr-defined]
    assert len(stored) == chunks + 1
    assert stored == blend.stored()
    documents = {name for name, text in zip(NAMES, TEXTS, strict=True) if blend.key(text) in stored}
    assert blend.registered_documents(NAMES) == documents
    if chunks:
        assert blend.generate(TEXTS[0] + TEXTS[-1] + "Which day?").report.blended
    assert blend.ingest(TEXTS, progress=False).computed == len(TEXTS) - chunks - 1


def test_adapters_leave_the_same_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedEngine.from_running(blend := fake_blend(monkeypatch))
    with monkeypatch.context() as patch:
        fail_after(blend, patch, 7, StoreError("the disk is full"))
        with pytest.raises(StoreError):
            shared.ingest(TEXTS, NAMES, progress=False)
    assert len(shared.registered_documents(NAMES)) == 7 == len(blend.stored())
    assert shared.forget(shared.registered_documents(NAMES)) == 7
    assert not {blend.key(text) for text in TEXTS} & blend.engine.stored  # type: ignore[attr-defined]


def test_documents_are_noted_with_their_chunks(blend: CacheBlend) -> None:
    report = blend.ingest([*TEXTS[:2], TEXTS[0]], documents=["a", None, "b"], progress=False)
    assert (report.computed, report.repeated) == (2, 1)
    assert blend.registered_documents(["a", "b", "c"]) == {"a", "b"}
    assert blend.forget_documents(["a"]) == 0  # b has it as well
    assert blend.forget_documents(["b"]) == 1
    blend.ingest(TEXTS[1], documents="c", progress=False)  # it is stored already
    assert blend.forget_documents(["c"]) == 1
    with pytest.raises(PromptError, match="documents has 1 texts for 2 chunks"):
        blend.ingest(TEXTS[:2], documents=["a"], progress=False)


def test_a_document_that_could_not_be_forgotten_can_be_later(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend.ingest(TEXTS[:2], documents=["a", "a"], progress=False)
    before, engine = len(blend.stored()), blend.engine
    rpc: Any = engine.rpc

    def refusing(method: str, *args: Any) -> list[Any]:
        if method == "cacheblend_forget":
            raise StoreError("the disk is read-only")
        return list(rpc(method, *args))

    with monkeypatch.context() as patch:
        patch.setattr(engine, "rpc", refusing)
        with pytest.raises(StoreError, match="read-only"):
            blend.forget_documents("a")
    assert blend.registered_documents("a") == {"a"}
    assert blend.forget_documents("a") == 2
    assert len(blend.stored()) == before - 2
    assert blend.registered_documents("a") == set()


def test_too_long_ones_are_counted_and_the_others_computed(blend: CacheBlend) -> None:
    report = blend.ingest([TEXTS[0], LONG, "short", TEXTS[1]], progress=False)
    assert (report.chunks, report.computed, report.too_long, report.too_short) == (4, 2, 1, 1)
    assert report.keys == [blend.key(TEXTS[0]), "", "", blend.key(TEXTS[1])]
    assert blend.key(LONG) not in blend.stored()
    blend.forget(LONG)  # it is not there
    blend.prefetch(LONG)
    assert blend.delete_except([LONG, TEXTS[0]]) == 1


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (SURROGATE, PromptError, "surrogate"),
        ("  \n", EmptyTextError, "empty"),
        (b"bytes", PromptError, "decode"),
        ([1, 2.5], PromptError, "2.5"),
        ([10**9] * 40, PromptError, "vocabulary"),
        (None, PromptError, "NoneType"),
    ],
    ids=repr,
)
def test_a_bad_text_is_named_before_anything_is_computed(
    blend: CacheBlend, bad: Any, error: type[Exception], message: str
) -> None:
    uses: list[Callable[[], object]] = [
        lambda: blend.ingest([*TEXTS[:2], bad], progress=False),
        lambda: blend.forget([*TEXTS[:2], bad]),
        lambda: blend.prefetch([*TEXTS[:2], bad]),
        lambda: blend.delete_except([*TEXTS[:2], bad]),
    ]
    for use in uses:
        with pytest.raises(error, match=f"text 3 of 3: .*{message}"):
            use()
    assert not sent(blend) and len(blend.stored()) == 0


def test_what_stands_before_a_bad_text_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    blend = fake_blend(monkeypatch, config=BlendConfig(ingest_prefix="document"))
    with pytest.raises(PromptError, match=r"left_context, text 2 of 2: .*2\.5"):
        blend.ingest(TEXTS[:2], left_context=["a title", [2.5]], progress=False)
    assert len(blend.stored()) == 0


@pytest.mark.parametrize(
    "bad",
    [7, [7], [True], [1.5], b"a", [b"a"], [{"a": "b"}], {"a": "b"}, [[1.5]], ["\udce9"]],
    ids=repr,
)
def test_what_stands_before_a_text_is_text_or_token_ids(
    monkeypatch: pytest.MonkeyPatch, bad: Any
) -> None:
    blend = fake_blend(monkeypatch, config=BlendConfig(ingest_prefix="document"))
    with pytest.raises(PromptError, match="left_context"):
        blend.ingest(TEXTS[:1], left_context=bad, progress=False)
    assert len(blend.stored()) == 0


@pytest.mark.parametrize(
    "bad", [7, [7], [True], b"a", [b"a"], [("a", "b")], [["a"]], {"a": "b"}], ids=repr
)
def test_a_documents_name_is_a_text(blend: CacheBlend, bad: Any) -> None:
    with pytest.raises(PromptError, match="documents"):
        blend.ingest(TEXTS[:1], documents=bad, progress=False)
    assert not sent(blend) and len(blend.stored()) == 0
    uses: list[Callable[[], object]] = [
        lambda: blend.registered_documents(bad),
        lambda: blend.forget_documents(bad),
    ]
    for use in uses if not isinstance(bad, dict) else ():
        with pytest.raises(PromptError, match="documents"):
            use()


def test_what_is_registered_is_keys_by_documents(blend: CacheBlend) -> None:
    key = blend.key(TEXTS[0])
    for bad in ("a", ["a"], None, {7: [key]}, {"a": key}, {"a": [7]}, {"a": 7}):
        with pytest.raises(PromptError, match="documents"):
            blend.register_documents(bad)  # type: ignore[arg-type]


def test_keys_as_reports_have_them(blend: CacheBlend) -> None:
    """That of a text too short to be stored is empty."""
    report = blend.ingest([TEXTS[0], "short", TEXTS[1]], progress=False)
    assert report.keys[1] == ""
    blend.register_documents({"a": report.keys})
    assert blend.forget_keys(report.keys) == 2
    for bad in ("zz", "A" * 64, report.keys[0] + "0", 7, None):
        with pytest.raises(PromptError, match="no key of a chunk"):
            blend.forget_keys([bad])  # type: ignore[list-item]
        with pytest.raises(PromptError, match="no key of a chunk"):
            blend.register_documents({"a": [bad]})  # type: ignore[list-item]
    with pytest.raises(PromptError, match="list"):
        blend.forget_keys(report.keys[0])


def test_any_text_names_a_document(blend: CacheBlend) -> None:
    """A file's name, which need not be UTF-8."""
    names = ["caf\udce9.pdf", "", "\0", "x" * 10_000]
    blend.ingest(TEXTS[:4], documents=names, progress=False)
    assert blend.registered_documents(names) == set(names)
    assert blend.forget_documents("caf\udce9.pdf") == 1
    assert blend.forget_documents(names) == 3


def test_adapters_warn_of_what_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedEngine.from_running(fake_blend(monkeypatch))
    with pytest.warns(UserWarning, match=r"1 of 2 texts .* smaller chunks"):
        report = shared.ingest([TEXTS[0], LONG], NAMES[:2], progress=False)
    assert report.computed == 1 and shared.registered_documents(NAMES) == {NAMES[0]}


def test_starts_over_one_store_have_probes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the first to end its check would forget the chunk of the other's, which never blends."""
    engines = install(monkeypatch)
    for _ in range(2):
        CacheBlend(MODEL)
    first, second = (engine.ingested[0] for engine in engines)
    assert first != second
    assert not any(engine.stored & {first, second} for engine in engines)
