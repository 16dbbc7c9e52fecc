"""Engines in processes of their own give the same answers, and stores survive them all.

Run as a script, this file ingests into a store until it is done or killed.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from engines import logprobs, start
from tiny import Words, make

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend
from cacheblend_rag.errors import EngineDeadError, EngineError
from cacheblend_rag.reason import Reason
from cacheblend_rag.store.chunk_file import ChunkHeader

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SAMPLING: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, "logprobs": -1}
WAYS: list[dict[str, Any]] = [
    {},
    {"selector": "hkvd"},
    {"selector": "hkvd", "selector_options": {"deviation": "kv"}},
    {"recompute_ratio": 0.5},
    {"recompute_ratio": 1.0},
    {"mode": "full"},
]

words = Words(31)
PREFIX = words(4)
CHUNKS = [words(n) for n in (70, 100, 64, 40)]
PROMPT = words(5) + CHUNKS[0] + words(3) + CHUNKS[1] + CHUNKS[2] + CHUNKS[3][:36] + words(20)
SMALL = [words(40) for _ in range(200)]
SMALL_PROMPTS = [
    words(3) + tuple(t for chunk in SMALL[i::29] for t in chunk) + words(12) for i in range(8)
]
FRESH = words(90)  # ingested by two ranks
FRESH_PROMPT = words(7) + FRESH + words(25)


class Known(NamedTuple):
    """What an engine in this process answered, and the store it filled."""

    store: Path
    answers: list[BlendResult]
    chosen: list[list[int]]
    small: list[BlendResult]


def config(store: Path) -> BlendConfig:
    # without propagation: with it, what a step moves depends on where vLLM cuts a prompt into steps
    return BlendConfig(ingest_prefix=PREFIX, store=f"file://{store}", propagation_length=0)


def open_here(path: Path, store: Path) -> CacheBlend:
    """An engine in this process that stores one small chunk at a time."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch, multiprocessing=False)
        return start(path, config=config(store), max_num_batched_tokens=64)


def quiet(patch: pytest.MonkeyPatch, *, multiprocessing: bool) -> None:
    """One thread a process: two that wait for each other cost more than they save."""
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(multiprocessing)))
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> Path:
    return make("llama", tiny_models)


@pytest.fixture(scope="module")
def known(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Known:
    store = tmp_path_factory.mktemp("store")
    with open_here(model, store) as blend:
        assert blend.ingest(CHUNKS, progress=False).computed == len(CHUNKS)
        answers = [blend.generate(PROMPT, **way, **SAMPLING) for way in WAYS]
        chosen = [on_every_rank(blend, answer) for answer in answers]
        assert blend.ingest(SMALL, progress=False).computed == len(SMALL)
        small = [blend.generate(ids, **SAMPLING) for ids in SMALL_PROMPTS]
    assert all(a.report.blended for a in answers[:-1] + small)
    return Known(store, answers, chosen, small)


def on_every_rank(blend: CacheBlend, result: BlendResult) -> list[int]:
    """The recomputed positions, which all ranks must agree on."""
    ranks = blend._engine.rpc("cacheblend_outcome", result.request_id, True)
    first, *others = [outcome.get("selected", []) for outcome in ranks]
    assert all(other == first for other in others)
    return list(first)


def assert_same(a: BlendResult, b: BlendResult) -> None:
    assert a.token_ids == b.token_ids
    torch.testing.assert_close(logprobs(a), logprobs(b), atol=2e-4, rtol=0)
    assert a.report.segments == b.report.segments  # keys too


def assert_same_answers(blend: CacheBlend, known: Known) -> None:
    for way, answer, chosen in zip(WAYS, known.answers, known.chosen, strict=True):
        result = blend.generate(PROMPT, **way, **SAMPLING)
        assert_same(answer, result)
        assert on_every_rank(blend, result) == chosen


def open_apart(path: Path, store: Path, **options: Any) -> CacheBlend:
    """An engine in processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        quiet(patch, multiprocessing=True)
        return start(path, config=config(store), max_num_batched_tokens=64, **options)


# ---- the same answers everywhere -----------------------------------------------------------------


@pytest.fixture(scope="module")
def apart(known: Known, model: Path) -> Iterator[CacheBlend]:
    """A batch engine in its own processes, over the store that another one filled."""
    with open_apart(model, known.store) as blend:
        yield blend


@pytest.mark.slow
def test_the_batch_engine_takes_up_the_store(apart: CacheBlend, known: Known) -> None:
    report = apart.ingest(CHUNKS, progress=False)
    assert (report.computed, report.present) == (0, len(CHUNKS))
    assert_same_answers(apart, known)
    together = apart.generate(SMALL_PROMPTS, **SAMPLING)
    for one, other in zip(known.small, together, strict=True):
        assert_same(one, other)
    short = apart.generate(PROMPT[:-1], **{**SAMPLING, "max_tokens": 1}).report
    assert short.blended and short.bytes_loaded == known.answers[0].report.bytes_loaded


def test_the_serving_engine_takes_up_the_store(known: Known, model: Path) -> None:
    with open_apart(model, known.store, engine="serving") as blend:
        assert blend.ingest(CHUNKS, progress=False).computed == 0
        assert_same_answers(blend, known)
        for one, other in zip(known.small, blend.generate(SMALL_PROMPTS, **SAMPLING), strict=True):
            assert_same(one, other)


@pytest.mark.slow
def test_tensor_parallel(known: Known, model: Path, tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    store = shutil.copytree(known.store, tmp_path / "kv")  # what one rank stored, two read
    with open_apart(model, store, **options) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        assert len(blend.stored()) == len(CHUNKS) + len(SMALL)
        assert blend.ingest(CHUNKS, progress=False).present == len(CHUNKS)
        assert len(blend.stats()) == 1, "they share the store"
        assert_same_answers(blend, known)
        assert blend.ingest([FRESH], progress=False).computed == 1
        reused = blend.generate(FRESH_PROMPT, **SAMPLING)
        assert reused.report.tokens_reused > len(FRESH) // 2
        (lost,) = store.glob(f"v3/*/*/{blend._space.key(CHUNKS[1])}.*")
        lost.unlink()
        result = blend.generate(PROMPT[1:], **SAMPLING, recompute_ratio=1.0)
        assert [s.kind for s in result.report.segments].count("missing") == 1
        full = blend.generate(PROMPT[1:], **SAMPLING, mode="full")
        assert result.token_ids == full.token_ids
        torch.testing.assert_close(logprobs(result), logprobs(full), atol=2e-4, rtol=0)
        assert blend.ingest(CHUNKS, progress=False).computed == 1
        (odd,) = store.glob(f"v3/*/*/{blend._space.key(CHUNKS[1])}.*")
        declare_a_tebibyte(odd)
        began = time.monotonic()
        result = blend.generate(PROMPT[2:], **SAMPLING, recompute_ratio=1.0)
        assert [s.kind for s in result.report.segments].count("missing") == 1
        full = blend.generate(PROMPT[2:], **SAMPLING, mode="full")
        assert result.token_ids == full.token_ids
        assert time.monotonic() - began < 60, "vLLM's own limits are minutes"
        assert blend.ingest(CHUNKS, progress=False).computed == 1
    with open_here(model, store) as blend:  # and the other way round
        assert blend.ingest([FRESH, *CHUNKS], progress=False).present == len(CHUNKS) + 1
        assert_same(blend.generate(FRESH_PROMPT, **SAMPLING), reused)
        assert_same_answers(blend, known)


def declare_a_tebibyte(path: Path) -> None:
    """Put a file in a chunk's place that is as long as its header says, and holds nothing."""
    header = ChunkHeader(path.stem, 1, "F32", (1 << 30, 2, 4, 4, 8), "0" * 32, "F32")
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, header.file_bytes)
    assert path.stat().st_size >= 1 << 40


@pytest.mark.slow
def test_a_rank_that_fails_leaves_no_other_waiting(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each place where one can: both compute exactly then, and the next request is blended."""
    order = tmp_path / "fails"
    order.write_text("")
    monkeypatch.setenv("CACHEBLEND_TEST_FAILS", str(order))
    options = {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "worker_cls": "failing_rank.FailingWorker",
    }
    with open_apart(model, tmp_path / "store", **options) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        assert blend.ingest(CHUNKS, progress=False).computed == len(CHUNKS)
        for number, name in enumerate(["_load", "__init__", "layer", "ask", "_choose"]):
            ids = (7 + number, *PROMPT[1:])  # nothing of it is in vLLM's prefix cache
            full = blend.generate(ids, **SAMPLING, mode="full")
            order.write_text(name)
            began = time.monotonic()
            result = blend.generate(ids, **SAMPLING)
            order.write_text("")
            assert result.report.reason is Reason.BLEND_FAILED, name
            assert result.token_ids == full.token_ids
            torch.testing.assert_close(logprobs(result), logprobs(full), atol=2e-4, rtol=0)
            assert blend.generate(ids, **SAMPLING).report.blended
            assert time.monotonic() - began < 60, "vLLM's own limits are minutes"
        order.write_text("_run_prefix")
        with pytest.raises(EngineError, match=r"on purpose|another rank"):
            blend.ingest([words(60)], progress=False)
        order.write_text("")
        assert blend.ingest([words(60)], progress=False).computed == 1
        assert blend.generate(PROMPT, **SAMPLING).report.blended


@pytest.mark.kill
def test_a_killed_worker(apart: CacheBlend) -> None:
    stream = apart.stream(PROMPT, **{**SAMPLING, "max_tokens": 700})
    next(stream)
    child("Worker").kill()
    began = time.monotonic()
    with pytest.raises(EngineDeadError, match="died"):
        list(stream)
    later: list[Callable[[], Any]] = [
        lambda: apart.generate(PROMPT, **SAMPLING),
        lambda: apart.ingest([words(60)], progress=False),
    ]
    for use in later:
        with pytest.raises(EngineDeadError, match="died"):
            use()
    apart.close()
    assert time.monotonic() - began < 20


@pytest.mark.kill
@pytest.mark.slow
@pytest.mark.parametrize("during", ["ingest", "generate"])
def test_a_killed_engine_core(known: Known, model: Path, during: str) -> None:
    """vLLM's blocking client would wait for ever here."""
    with open_apart(model, known.store) as blend:
        killer = subprocess.Popen([sys.executable, "-c", KILL_LATER, str(child("EngineCore").pid)])
        with pytest.raises(EngineDeadError, match="died"):
            use_for_ever(blend, during)
    assert killer.wait() == 0


def use_for_ever(blend: CacheBlend, what: str) -> None:
    while True:
        if what == "ingest":
            blend.ingest([words(60) for _ in range(20)], progress=False)
        else:
            blend.generate(PROMPT, **{**SAMPLING, "max_tokens": 700})


def child(name: str) -> psutil.Process:
    """The newest living process of vLLM's that is called so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE and name in " ".join(process.cmdline()):
            found.append(process)
    return max(found, key=lambda p: p.create_time())


KILL_LATER = (
    "import os, signal, sys, time; time.sleep(1); os.kill(int(sys.argv[1]), signal.SIGKILL)"
)


# ---- an ingestion that is killed -----------------------------------------------------------------


@pytest.mark.kill
@pytest.mark.slow
def test_a_killed_ingestion_loses_nothing(known: Known, model: Path, tmp_path: Path) -> None:
    draw, kept = random.Random(5), set[str]()
    for _ in range(3):
        count = len(kept) + draw.randint(1, 50)
        ingest_until(model, tmp_path, count)
        assert kept < stored(tmp_path), "something stored was lost, or nothing was added"
        kept = stored(tmp_path)
    assert len(kept) < len(SMALL), "it was never killed"
    with open_here(model, tmp_path) as blend:
        assert len(blend.stored()) == len(kept)
        report = blend.ingest(SMALL, progress=False)
        assert (report.present, report.computed) == (len(kept), len(SMALL) - len(kept))
        for ids, answer in zip(SMALL_PROMPTS, known.small, strict=True):
            assert_same(answer, blend.generate(ids, **SAMPLING))
        [stats] = blend.stats()
        assert stats["chunks"] == len(SMALL) and stats["corrupt"] == 0


def stored(folder: Path) -> set[str]:
    """Keys of the chunks that a reader would find."""
    return {p.stem for p in folder.rglob("*.safetensors")}


def ingest_until(model: Path, store: Path, count: int) -> None:
    """Ingest in another process, and kill it a moment after ``count`` chunks are there."""
    helpers = Path(__file__).parent.parent / "helpers"
    process = subprocess.Popen(
        [sys.executable, __file__, str(model), str(store)],
        env={**os.environ, "PYTHONPATH": str(helpers)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while len(stored(store)) < count:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.001)
        time.sleep(random.Random(process.pid).random() * 0.02)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    with open_here(Path(sys.argv[1]), Path(sys.argv[2])) as ingesting:
        ingesting.ingest(SMALL, progress=False)
        time.sleep(600)  # never reached alive
