"""Ray Serve's side without engines: replicas that only say their names, and files for Ray."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fleet import Noting, cluster, texts, until
from servers import free_port

from cacheblend_rag.errors import ConfigError

pytestmark = [
    pytest.mark.fleet,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),  # of Ray, whose own they are
]

EXAMPLES = Path(__file__).parents[2] / "examples" / "ray"
ROUTER = "ray_cacheblend.routing.WarmRequestRouter"


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with cluster(tmp_path_factory.mktemp("routing")) as started:
        yield started


@pytest.fixture(scope="module")
def handle(ray: Any) -> Iterator[Any]:
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    class Named:
        async def __call__(self, body: dict[str, Any]) -> int:
            await asyncio.sleep(body.get("takes", 0))
            return os.getpid()

    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    deployed = serve.deployment(
        Named,
        num_replicas=3,
        ray_actor_options={"num_cpus": 0.1},
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    yield serve.run(deployed.bind(), name="named", route_prefix="/named")
    serve.shutdown()


def test_requests_of_a_topic_go_where_its_text_was_sent(handle: Any) -> None:
    topics = [" ".join(texts(3, seed=10 + i, size=200)) for i in range(3)]
    served: dict[int, Counter[int]] = defaultdict(Counter)
    for turn in range(8):
        for topic in range(len(topics)):
            # in another place, behind another text
            prompt = f"{turn} begins otherwise {'x' * turn} {topics[topic]} and a question"
            served[topic][handle.remote({"prompt": prompt}).result()] += 1
    assert [max(counts.values()) for counts in served.values()] == [8, 8, 8]
    assert len({max(counts, key=lambda pid: counts[pid]) for counts in served.values()}) == 3


def test_a_topic_that_all_ask_for_does_not_fill_one_replica(handle: Any) -> None:
    prompt = " ".join(texts(3, seed=77, size=200))
    waiting = [handle.remote({"prompt": prompt, "takes": 0.5}) for _ in range(24)]
    counts = Counter(response.result() for response in waiting)
    assert len(counts) == 3 and max(counts.values()) <= 12, counts


def test_a_replica_that_died_is_forgotten(ray: Any, handle: Any) -> None:
    prompt = " ".join(texts(3, seed=78, size=200))
    first = handle.remote({"prompt": prompt}).result()
    os.kill(first, signal.SIGKILL)

    def is_answered_elsewhere() -> bool:
        try:
            return bool(handle.remote({"prompt": prompt}).result() != first)
        except ray.exceptions.RayError:  # it was asked before its death was known
            return False

    until(is_answered_elsewhere, 60)
    assert first not in {handle.remote({"prompt": prompt}).result() for _ in range(8)}


def test_what_has_no_text_is_served_too(handle: Any) -> None:
    for body in ({}, {"prompt": 3}, {"messages": None}):
        assert handle.remote(body).result() > 0


# ---- the page ------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "ray.md"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_blocks_of_the_page(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of "ray.md"; the workers have no engines, as the model is on a hub and there is no GPU.

    Before the replicas below: together they want more processors than there are.
    """
    from ray import serve

    from ray_cacheblend import ingestion

    checked = ingestion._step
    made: list[Any] = []

    def step(*given: Any) -> Any:
        made.append(checked(*given)[0].__name__)
        return Noting, {}

    corpus, ran = tmp_path / "corpus.jsonl", list[Any]()
    lines = [json.dumps({"text": text, "source": "a"}) for text in texts(30, seed=5)]
    corpus.write_text("\n".join(lines))
    monkeypatch.setattr(ingestion, "_step", step)
    monkeypatch.setattr(serve, "run", ran.append)
    scope: dict[str, Any] = {}
    for number, code in enumerate(blocks("python")):
        code = code.replace('"corpus.jsonl"', repr(str(corpus))).replace("num_gpus=1,", "")
        exec(compile(code, f"ray.md, block {number}", "exec"), scope)
    assert capsys.readouterr().out.count("'computed': 30") == 2
    assert made == ["Ingestor", "HttpIngestor"]
    assert type(ran[0]).__name__ == "Application"


# ---- the ingress ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def front(ray: Any, embedded: Path) -> Iterator[httpx.Client]:
    """Ray's own ingress before two replicas that say what they were asked."""
    from fleet_echo import EchoServer
    from ray import serve

    from ray_cacheblend import replica
    from ray_cacheblend.serving import build_app

    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replica, "CacheBlendServer", EchoServer)
        app = build_app(
            str(embedded),
            "redis://127.0.0.1:1/0",
            2,
            model_id="echo",
            accelerator="cpu",
            server={"max_body": 1000},
            deployment={"ray_actor_options": {"num_cpus": 0.1}},
        )
    serve.shutdown()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app, name="echo")
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    serve.shutdown()


def test_our_endpoints_are_at_the_address_of_the_app(front: httpx.Client) -> None:
    path = "/v1/cacheblend/documents/a%2Fb%20c?limit=3"
    reply = front.put(path, content="body")
    assert (reply.status_code, reply.text) == (200, f"PUT {path} body")
    assert front.get("/v1/cacheblend").text == "GET /v1/cacheblend "
    assert front.post("/v1/cacheblend/ingestions", content="x" * 1001).status_code == 413
    assert front.get("/v1/models").json()["data"][0]["id"] == "echo"


def test_the_replica_that_knows_is_found(front: httpx.Client) -> None:
    def process() -> str:
        return str(front.get("/v1/cacheblend").headers["x-process"])

    names = {process() for _ in range(60)}
    assert len(names) == 2
    for name in names:
        for _ in range(6):  # whichever is asked first
            reply = front.get(f"/v1/cacheblend/requests/{name}")
            assert (reply.status_code, reply.headers["x-process"]) == (200, name)
    assert front.get("/v1/cacheblend/requests/none").status_code == 404


def test_a_repeated_ingestion_reaches_the_same_replica(front: httpx.Client) -> None:
    def process(key: str) -> str:
        reply = front.post("/v1/cacheblend/ingestions", headers={"Idempotency-Key": key})
        assert reply.status_code == 200
        return str(reply.headers["x-process"])

    found = {key: {process(key) for _ in range(6)} for key in map(str, range(20))}
    assert all(len(names) == 1 for names in found.values())
    assert len(set.union(*found.values())) == 2


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["serve.yaml", "kuberay.yaml"])
def test_the_examples_fit_rays_schema(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    found = yaml.safe_load((EXAMPLES / name).read_text())
    if name == "kuberay.yaml":
        assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
        found = yaml.safe_load(found["spec"]["serveConfigV2"])
    [application] = ServeDeploySchema.model_validate(found).applications
    assert application.import_path == "ray_cacheblend.serving:app"


def test_what_ray_refuses_is_an_error_of_ours(ray: Any, embedded: Path) -> None:
    from ray_cacheblend.serving import build_app

    given = {"model": str(embedded), "store": "redis://127.0.0.1:1/0", "accelerator": "cpu"}
    for wrong, message in (
        ({"engine_kwargs": {"max_model_lenn": 3}}, "max_model_lenn"),
        ({"replicas": {"min_replicas": 3, "max_replicas": 1}}, "min_replicas"),
        ({"accelerator": "abacus"}, "abacus"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_app(**{**given, **wrong})
    assert build_app(**given, replicas=2) is not None
