"""A fleet on one machine: workers on Ray Data fill one Valkey, and one of them is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import ENGINE, cluster, kill, processes, stored, texts, until
from servers import RedisServer
from tiny import make_with_tokenizer

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # of Ray, whose own they are
]

CORPUS = texts(500, seed=1)
MORE = texts(80, seed=2)
WORKERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return make_with_tokenizer("llama", folder)


@pytest.fixture(scope="module")
def ray(folder: Path) -> Iterator[Any]:
    with cluster(folder) as started:
        yield started


@pytest.fixture(scope="module")
def valkey(folder: Path) -> Iterator[RedisServer]:
    (folder / "valkey").mkdir()
    server = RedisServer(folder / "valkey")
    yield server
    server.kill()


def ingestion(ray: Any, model: Path, valkey: RedisServer, given: list[str]) -> Any:
    """Not run yet."""
    from ray_cacheblend import ingest

    rows = [{"text": text, "source": f"document {i % 9}"} for i, text in enumerate(given)]
    config = {"store": valkey.url, "blend_if": "always"}
    data = ray.data.from_items(rows)
    options = {"workers": WORKERS, "batch_size": 8, "document": "source"}
    return ingest(data, str(model), config=config, engine_args=ENGINE, **options)


def test_two_workers_fill_one_store_and_compute_each_chunk_once(
    ray: Any, model: Path, valkey: RedisServer, request: pytest.FixtureRequest
) -> None:
    from ray_cacheblend import totals

    # some of the texts twice, in another document
    done = ingestion(ray, model, valkey, CORPUS + CORPUS[:40]).materialize()
    counts = totals(done)
    rows = done.take_all()
    keys = {row["key"] for row in rows}
    puts = stored(valkey)
    request.node.user_properties += [("counts", counts)]
    assert len(rows) == 540
    assert {row["problem"] for row in rows} == {""}
    assert len(keys) == 500 and "" not in keys
    assert (counts["chunks"], counts["computed"]) == (540, 500)
    assert counts["present"] + counts["repeated"] == 40
    assert {key: puts[key] for key in keys} == dict.fromkeys(keys, 1)


def test_a_worker_that_is_killed_loses_nothing(
    ray: Any, model: Path, valkey: RedisServer, request: pytest.FixtureRequest
) -> None:
    before = set(stored(valkey))
    killed: list[int] = []

    def kill_one() -> None:
        until(lambda: len(set(stored(valkey)) - before) >= 8, 300)
        worker = processes("MapWorker(MapBatches(Ingestor")[0]
        kill(worker)
        killed.append(worker.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    rows = ingestion(ray, model, valkey, CORPUS + MORE).take_all()
    killer.join()
    keys = {row["key"] for row in rows}
    puts = stored(valkey)
    assert killed
    assert len(rows) == 580 and len(keys) == 580 and "" not in keys
    assert keys <= puts.keys()
    twice = sum(count > 1 for count in puts.values())
    request.node.user_properties += [("chunks computed twice", twice)]
    assert twice <= 8 + 1  # the batch that the killed one was at, and the prompt prefix
