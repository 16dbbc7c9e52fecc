"""An engine whose store fails under it: answers at ratio 1 equal plain vLLM's, and none hangs."""

from __future__ import annotations

import random
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import FULL_LOGPROBS, logprobs, start
from servers import RedisServer
from tiny import Words, make

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore:The remote store fails"),
    pytest.mark.filterwarnings("ignore:Chunks in"),
]

words = Words(11)
PREFIX = words(4)
CHUNKS = [words(size) for size in (70, 33, 64, 90, 41)]
TIMEOUT = 0.3


def opened(models: Path, store: str, patch: pytest.MonkeyPatch) -> CacheBlend:
    torch.set_num_threads(1)
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    config = BlendConfig(ingest_prefix=PREFIX, store=store)
    return start(make("llama", models), config=config, max_num_batched_tokens=256)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    pytest.importorskip("redis")
    started = RedisServer(tmp_path)
    yield started
    started.process.send_signal(signal.SIGCONT)
    started.kill()


def prompts(count: int) -> list[tuple[int, ...]]:
    """New ones, of four chunks in any order and a question."""
    order = random.Random(5)
    made = []
    for _ in range(count):
        parts = [words(5), *order.sample(CHUNKS, 4), words(12)]
        made.append(tuple(token for part in parts for token in part))
    return made


def asked(blend: CacheBlend, ids: tuple[int, ...], **options: object) -> BlendResult:
    return blend.generate(ids, **FULL_LOGPROBS, **options)


def check(blend: CacheBlend, counts: dict[str, int]) -> None:
    """Ratio 1 equals plain vLLM, and a blend ends; whatever the store did."""
    for ids in prompts(2):
        plain = asked(blend, ids, mode="off")
        exact = asked(blend, ids, recompute_ratio=1.0)
        assert torch.allclose(logprobs(exact), logprobs(plain), atol=2e-4)
        assert exact.token_ids == plain.token_ids
        asked(blend, ids)
        counts["answers"] += 3
        counts["missing"] += len(exact.report.missing_keys)


def ingest_again(blend: CacheBlend) -> int:
    return blend.ingest(CHUNKS, progress=False).computed


def test_redis_killed_hung_and_back(
    server: RedisServer,
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    counts = {"answers": 0, "missing": 0, "healthy": 0}
    with opened(tiny_models, f"{server.url}?timeout={TIMEOUT}", monkeypatch) as blend:
        assert blend.gate.passed, blend.gate.reason
        assert ingest_again(blend) == len(CHUNKS)
        good = asked(blend, prompts(1)[0])
        counts["healthy"] += good.report.blended
        check(blend, counts)
        for fault in ("hang", "kill"):
            if fault == "hang":
                server.process.send_signal(signal.SIGSTOP)
            else:
                server.kill()
            started = time.monotonic()
            check(blend, counts)
            ingest_again(blend)  # can keep nothing, and is no error
            assert time.monotonic() - started < 60
            if fault == "hang":
                server.process.send_signal(signal.SIGCONT)
            else:
                server.start()  # empty
            until = time.monotonic() + 90
            while not asked(blend, good_prompt := prompts(1)[0]).report.blended:
                assert time.monotonic() < until, good_prompt
                ingest_again(blend)
                time.sleep(1)
            counts["healthy"] += 1
    request.node.user_properties += counts.items()
    assert counts["healthy"] == 3


def test_files_damaged_swapped_and_removed(
    tmp_path: Path,
    tiny_models: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    counts = {"answers": 0, "missing": 0, "faults": 0}
    choose = random.Random(3)
    with opened(tiny_models, f"file://{tmp_path}/kv", monkeypatch) as blend:
        for fault in ("flip", "cut", "swap", "remove", "index", "folder"):
            ingest_again(blend)
            files = sorted(tmp_path.rglob("*.safetensors"))
            assert len(files) == len(CHUNKS)
            one, two = choose.sample(files, 2)
            content = bytearray(one.read_bytes())
            if fault == "flip":
                content[choose.randrange(len(content))] ^= 4
                one.write_bytes(content)
            elif fault == "cut":
                one.write_bytes(content[: choose.randrange(len(content))])
            elif fault == "swap":
                one.write_bytes(two.read_bytes())
            elif fault == "remove":
                one.unlink()
            elif fault == "index":
                (tmp_path / "kv" / "index.sqlite").write_bytes(b"x" * 8192)
            else:
                shutil.rmtree(tmp_path / "kv" / "v1")
            counts["faults"] += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(blend, counts)
    request.node.user_properties += counts.items()
    assert counts["missing"] > 0
