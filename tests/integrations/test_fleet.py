"""A fleet on one machine: workers on Ray Data fill one Valkey, replicas on Ray Serve answer over
it; what one of them ingests or forgets the others learn; and some are killed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from fleet import ENGINE, Replica, cluster, kill, processes, replicas, stored, texts, until
from servers import RedisServer, free_port
from tiny import make_with_tokenizer

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # of Ray, whose own they are
]

CORPUS = texts(500, seed=1)
MORE = texts(80, seed=2)
LATER = texts(4, seed=3)  # ingested while replicas serve
WORKERS, REPLICAS = 2, 2
TOKENS = 600  # of a stream
MODEL, DEPLOYMENT = "tiny", "CacheBlendServer:tiny"
WITHIN_S = float(os.environ.get("SHARED_WITHIN_S", "12"))  # 3 are promised; a machine may be busy


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


@pytest.fixture(scope="module")
def corpus(ray: Any, model: Path, valkey: RedisServer) -> Any:
    """Ingested, some of its texts in a second document too."""
    return ingestion(ray, model, valkey, CORPUS + CORPUS[:40]).materialize()


def test_two_workers_fill_one_store_and_compute_each_chunk_once(
    corpus: Any, valkey: RedisServer, request: pytest.FixtureRequest
) -> None:
    from ray_cacheblend import totals

    counts, rows, puts = totals(corpus), corpus.take_all(), stored(valkey)
    keys = {row["key"] for row in rows}
    request.node.user_properties += [("counts", counts)]
    assert len(rows) == 540
    assert {row["problem"] for row in rows} == {""}
    assert len(keys) == 500 and "" not in keys
    assert (counts["chunks"], counts["computed"]) == (540, 500)
    assert counts["present"] + counts["repeated"] == 40
    assert {key: puts[key] for key in keys} == dict.fromkeys(keys, 1)


def test_a_worker_that_is_killed_loses_nothing(
    ray: Any,
    model: Path,
    valkey: RedisServer,
    corpus: Any,
    request: pytest.FixtureRequest,
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
    rows = ingestion(ray, model, valkey, CORPUS[:100] + MORE).take_all()
    killer.join()
    keys = {row["key"] for row in rows}
    puts = stored(valkey)
    assert killed
    assert len(rows) == 180 and len(keys) == 180 and "" not in keys
    assert keys <= puts.keys()
    twice = sum(count > 1 for count in puts.values())
    request.node.user_properties += [("chunks computed twice", twice)]
    assert twice <= 8 + 1  # the batch that the killed one was at, and the prompt prefix


# ---- serving -------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """Of one prompt: how many of its tokens came from chunks, and who answered."""

    reused: int
    replica: str


def of_chunks(report: dict[str, Any]) -> int:
    """Tokens whose stored KV was there, those that were then recomputed among them."""
    return sum(s["end"] - s["start"] for s in report["segments"] if s["kind"] == "reused")


def are_used(reused: int, chunks: list[str]) -> bool:
    """All of these chunks, but for what is in the last block of the prompt: that is computed."""
    return reused > sum(len(chunk.split()) for chunk in chunks) - ENGINE["block_size"]


class App:
    """Two replicas behind Ray's own ingress."""

    def __init__(self, ray: Any, url: str) -> None:
        self._ray, self.url = ray, url
        self.client = httpx.Client(base_url=url, timeout=120)
        self._numbers = itertools.count(100)

    def replicas(self) -> list[Replica]:
        return replicas(self._ray, DEPLOYMENT)

    def prompt(self, chunks: list[str]) -> str:
        """A new one each time, so that vLLM's prefix cache knows no more than its first token."""
        number = next(self._numbers)
        first, second = 3 + number % 500, 3 + number // 500
        return " ".join([f"w{first} w{second}", *(f"{chunk} w9" for chunk in chunks), "w7 w8"])

    def body(self, chunks: list[str], tokens: int = 2) -> dict[str, Any]:
        asked = {"model": MODEL, "prompt": self.prompt(chunks), "max_tokens": tokens}
        return {**asked, "temperature": 0, "ignore_eos": True}

    def complete(self, chunks: list[str], tokens: int = 2) -> Any:
        reply = self.client.post("/v1/completions", json=self.body(chunks, tokens))
        assert reply.status_code == 200, reply.text
        return reply.json()

    def reused(self, replica: Replica, chunks: list[str]) -> int:
        """By one replica, in a new prompt of these chunks."""
        done = replica.complete(self.body(chunks))
        status, report = replica.ask("GET", f"/requests/{done['id']}")
        assert status == 200, report
        return of_chunks(report)

    def answer(self, chunks: list[str]) -> Answer:
        """What was done for a prompt of these chunks."""
        done = self.complete(chunks)
        for replica in self.replicas():
            status, report = replica.ask("GET", f"/requests/{done['id']}")
            if status == 200:
                return Answer(of_chunks(report), replica.name)
        raise AssertionError(f"no replica knows {done['id']}")


@pytest.fixture(scope="module")
def app(ray: Any, model: Path, valkey: RedisServer, corpus: Any) -> Iterator[App]:
    from ray import serve

    from ray_cacheblend.serving import build_app

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    made = build_app(
        str(model),
        f"{valkey.url}?memory=64MiB",
        REPLICAS,
        model_id=MODEL,
        accelerator="cpu",
        config={"blend_if": "always"},
        engine_kwargs=ENGINE,
        deployment={"ray_actor_options": {"num_cpus": 0.5}, "health_check_period_s": 5},
    )
    serve.run(made, name="fleet")
    running = App(ray, f"http://127.0.0.1:{port}")
    yield running
    running.client.close()
    serve.shutdown()


def test_two_replicas_serve_the_whole_corpus_blended(
    app: App, request: pytest.FixtureRequest
) -> None:
    groups = [CORPUS[i : i + 10] for i in range(0, len(CORPUS), 10)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(app.answer, groups))
    by_replica = Counter(answer.replica for answer in answers)
    request.node.user_properties += [("prompts by replica", sorted(by_replica.values()))]
    assert all(are_used(a.reused, group) for a, group in zip(answers, groups, strict=True))
    assert len(by_replica) == REPLICAS


def test_the_ingress_has_our_endpoints_and_finds_the_replica_that_knows(app: App) -> None:
    state = app.client.get("/v1/cacheblend").json()
    assert state["blending"]["on"] and state["chunks"] >= 500
    done = app.complete(CORPUS[:3])
    for _ in range(6):  # whichever replica is asked first
        report = app.client.get(f"/v1/cacheblend/requests/{done['id']}")
        assert report.status_code == 200
    assert app.client.get("/v1/cacheblend/requests/none").status_code == 404
    assert app.client.get("/v1/models").json()["data"][0]["id"] == MODEL


def test_what_one_replica_ingests_and_forgets_the_other_learns(
    app: App, request: pytest.FixtureRequest
) -> None:
    one, other = app.replicas()
    chunks = LATER[:2]
    status, job = one.ask("POST", "/ingestions", {"wait": True, "chunks": chunks})
    assert (status, job["counts"]["computed"]) == (200, 2)
    # Both: replicas of one machine share their jobs, so either may have computed the chunks.
    took = [
        until(lambda r=r: are_used(app.reused(r, chunks), chunks), WITHIN_S) for r in (other, one)
    ]
    learnt = sum(took)
    for key in job["keys"]:  # on the one that did not compute them
        assert other.ask("DELETE", f"/chunks/{key}")[0] == 200
    gone = until(lambda: app.reused(one, chunks) == 0, WITHIN_S)
    assert app.reused(other, chunks) == 0
    request.node.user_properties += [("learnt after s", learnt), ("gone after s", gone)]
    for replica in (one, other):
        status, found = replica.ask("POST", "/chunks/keys", {"texts": chunks})
        assert [row["stored"] for row in found["data"]] == [False, False]
    for replica in (one, other, one, other):  # nor does any memory bring them back
        assert app.reused(replica, chunks) == 0


def test_ray_data_over_http(ray: Any, app: App) -> None:
    from ray_cacheblend import ingest, totals

    given = [*LATER[2:], CORPUS[0]]
    data = ray.data.from_items([{"text": text} for text in given])
    done = ingest(data, url=app.url, workers=1).materialize()
    counts = totals(done)
    assert (counts["chunks"], counts["computed"], counts["present"]) == (3, 2, 1)
    until(lambda: are_used(app.answer(given).reused, given), WITHIN_S)


class Stream(NamedTuple):
    """One that was read to its end, whatever that was."""

    tokens: int
    is_whole: bool  # by what the client was told


def stream(app: App, number: int, begun: Callable[[], object]) -> Stream:
    body = {**app.body(CORPUS[number : number + 2], TOKENS), "stream": True}
    body["stream_options"] = {"include_usage": True}
    tokens, is_whole = 0, False
    with (
        contextlib.suppress(httpx.HTTPError),
        app.client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        for line in reply.iter_lines():
            said = json.loads(line[6:]) if line.startswith("data: {") else {}
            if usage := said.get("usage"):  # the last that a whole one says
                tokens = usage["completion_tokens"]
            for choice in said.get("choices", ()):
                is_whole |= choice["finish_reason"] == "length"
                begun()
    return Stream(tokens, is_whole)


def test_a_replica_that_is_killed_takes_no_answer_with_it(
    app: App, valkey: RedisServer, request: pytest.FixtureRequest
) -> None:
    from ray.exceptions import RayError

    before, tries = set(stored(valkey)), itertools.count()

    def asked(number: int) -> int:
        """As any client does: again, where there was no answer."""
        ends = time.monotonic() + 240
        while time.monotonic() < ends:
            next(tries)
            with contextlib.suppress(httpx.HTTPError, AssertionError):
                done = app.complete(CORPUS[number : number + 5], 16)
                return int(done["usage"]["completion_tokens"])
            time.sleep(1)
        raise TimeoutError

    begun = threading.Semaphore(0)
    victim = processes(f"ServeReplica:fleet:{DEPLOYMENT}")[0]
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(stream, app, i, begun.release) for i in range(8)]
        for _ in range(40):  # pieces
            assert begun.acquire(timeout=120)
        answers = [pool.submit(asked, number) for number in range(24)]
        kill(victim)
        counts = [future.result() for future in answers]
        ended = [future.result() for future in streams]
    request.node.user_properties += [
        ("streams cut", sum(not s.is_whole for s in ended)),
        ("tries for 24 answers", next(tries)),
    ]
    assert counts == [16] * 24
    # none ends as if it were whole, and those of the other replica go on
    assert {s.tokens for s in ended if s.is_whole} == {TOKENS}
    assert any(not s.is_whole for s in ended)
    assert before <= set(stored(valkey))
    took = until(lambda: len(app.replicas()) == REPLICAS, 240, 1)
    request.node.user_properties += [("replaced after s", took)]
    # Ray counts a replica before it takes requests. Whoever is sent to it then is told so.
    reused: list[Any] = []

    def is_answered() -> bool:
        with contextlib.suppress(RayError):
            reused.append(app.answer(CORPUS[:4]).reused)
        return bool(reused)

    until(is_answered, 120, 1)
    assert are_used(reused[0], CORPUS[:4])
