"""A real server: what every endpoint says, bad input, clients that leave, and its end in the middle
of everything. The tests run in this order: the last ones end the server.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from live_server import LiveServer
from tiny import WORDS, Words, make_with_tokenizer

from cacheblend_rag.server.jobs import Jobs, shown

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

words = Words(31)
KEY = "sk-test"
BASE = "/v1/cacheblend"


def text(count: int) -> str:
    return " ".join(WORDS[token] for token in words(count))


A, B, C = text(70), text(90), text(64)


@pytest.fixture(scope="module")
def server(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")
    options = ["--dtype", "float32", "--max-model-len", "1024", "--served-model-name", "m"]
    options += ["--store", str(folder / "kv"), "--blend-if", "always", "--ingest-prefix", "bos"]
    options += ["--propagation-length", "0", "--max-body", "4MiB", "--api-key", KEY]
    options += ["--num-gpu-blocks-override", "512"]
    model = make_with_tokenizer("llama", tiny_models)
    found = LiveServer(model, folder, options)
    found.client.headers["Authorization"] = f"Bearer {KEY}"
    try:
        found.start()
        yield found
    finally:
        found.client.close()
        found.kill()


@pytest.fixture(scope="module")
def keys(server: LiveServer) -> list[str]:
    """Of A, B and C, which are stored."""
    job = server.ask("POST", "/ingestions", json={"chunks": [A, B, C], "wait": True})
    assert job["status"] == "completed"
    found: list[str] = job["keys"]
    return found


def complete(server: LiveServer, prompt: str, **options: Any) -> dict[str, Any]:
    ours = options.pop("cacheblend", None)
    body = {"model": "m", "prompt": prompt, "max_tokens": 4, "temperature": 0, **options}
    if ours is not None:
        body["kv_transfer_params"] = {"cacheblend": ours}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def asking(*chunks: str) -> str:
    return f"{text(3)} {' w3 '.join(chunks)} {text(15)}"


def wrong(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, (answer.status_code, answer.text)
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"} and error["message"]
    return error


# ---- what is right -------------------------------------------------------------------------------


def test_state(server: LiveServer, keys: list[str]) -> None:
    state = server.ask("GET", "")
    assert state["object"] == "cacheblend.state" and state["blending"]["on"]
    assert state["chunks"] >= 3 and state["store"]["chunks"] >= 3 and state["namespace"] == ""
    assert state["max_model_len"] == 1024 and state["block_size"] == 32
    assert state["config"]["ingest_prefix"] == "bos" and len(state["fingerprint"]) == 64


def test_ingested_chunks_are_blended_at_once(server: LiveServer, keys: list[str]) -> None:
    chunk = text(80)
    server.ask("POST", "/ingestions", json={"chunks": [chunk], "wait": True})
    for prompt in (asking(A, chunk), asking(chunk, B, A)):
        answer = complete(server, prompt)
        report = server.ask("GET", f"/requests/{answer['id']}")
        assert report["object"] == "cacheblend.report" and report["blended"]
        assert report["tokens_total"] == answer["usage"]["prompt_tokens"]
        parts = ("reused", "recomputed", "fresh", "prefix_cached")
        assert sum(report[f"tokens_{part}"] for part in parts) == report["tokens_total"]
        assert report["ttft_s"] is None
        assert "recomputed" in answer["kv_transfer_params"]["cacheblend"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_at_ratio_1_it_answers_as_without(server: LiveServer, keys: list[str]) -> None:
    complete(server, asking(A))  # the proof
    for prompt in (asking(A, B), asking(C, A, B)):
        whole = complete(server, prompt, cacheblend={"recompute_ratio": 1.0})
        plain = complete(server, prompt, cacheblend={"mode": "off"})
        assert whole["choices"][0]["text"] == plain["choices"][0]["text"]
        off = server.ask("GET", f"/requests/{plain['id']}")
        assert not off["blended"] and off["reason"] == "mode" and off["tokens_prefix_cached"] == 0


def test_reports_of_streams_of_many_and_of_several(server: LiveServer, keys: list[str]) -> None:
    body = {"model": "m", "prompt": asking(A, C), "max_tokens": 3, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        pieces = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    name = json.loads(pieces[0])["id"]
    assert server.ask("GET", f"/requests/{name}")["blended"]
    many = complete(server, asking(B, C), n=3, temperature=1.0)
    assert server.ask("GET", f"/requests/{many['id']}")["reports"] == 3
    several = server.client.post(
        "/v1/completions", json={"model": "m", "prompt": [asking(A), text(9)], "max_tokens": 2}
    ).json()
    first, second = (
        server.ask("GET", f"/requests/{several['id']}", params={"index": n}) for n in (0, 1)
    )
    assert first["blended"] and second["reason"] == "no_chunk_found"
    wrong(server.client.get(f"{BASE}/requests/{several['id']}?index=2"), 400)
    responses = server.client.post("/v1/responses", json={"model": "m", "input": text(9)})
    if responses.status_code == 200:
        server.ask("GET", f"/requests/{responses.json()['id']}")


def test_chunks(server: LiveServer, keys: list[str]) -> None:
    first = server.ask("GET", "/chunks", params={"limit": 2})
    assert first["has_more"] and first["last_id"] == first["data"][1]["id"]
    seen = [row["id"] for row in first["data"]]
    while first["has_more"]:
        first = server.ask("GET", "/chunks", params={"limit": 2, "after": first["last_id"]})
        seen += [row["id"] for row in first["data"]]
    assert seen == sorted(set(seen)) and set(keys) <= set(seen)
    new = text(50)
    [told] = server.ask("POST", "/chunks/keys", json={"texts": [new]})["data"]
    assert told["tokens"] == 50 and not told["stored"]
    server.ask("POST", "/ingestions", json={"chunks": [new], "wait": True})
    [told] = server.ask("POST", "/chunks/keys", json={"texts": [new]})["data"]
    assert told["stored"]
    assert server.ask("POST", "/chunks/prefetch", json={"texts": [new]})["object"]
    gone = server.ask("DELETE", f"/chunks/{told['id']}")
    assert gone == {"id": told["id"], "object": "cacheblend.chunk", "deleted": True}
    assert not server.ask("DELETE", f"/chunks/{told['id']}")["deleted"]
    both = [text(40), text(41)]
    server.ask("POST", "/ingestions", json={"chunks": both, "wait": True})
    assert server.ask("POST", "/chunks/delete", json={"texts": both[:1]})["deleted"] == 1
    kept = server.ask("POST", "/chunks/delete", json={"except_texts": [A, B, C, *both]})
    assert kept["deleted"] >= 0
    assert server.ask("GET", "", params={})["chunks"] == 4
    assert server.ask("POST", "/chunks/delete", json={"ids": keys[:0]})["deleted"] == 0
    assert not server.ask("GET", f"/requests/{complete(server, asking(new))['id']}")["blended"]


def test_documents(server: LiveServer, keys: list[str]) -> None:
    name = "folder/ünïcode ?#%2F.md"
    quoted = quote(name, safe="")
    one, two, three = text(40), text(42), text(44)

    def put(*chunks: str) -> Any:
        return server.ask("PUT", f"/documents/{quoted}", json={"chunks": chunks, "wait": True})

    job = put(one, two)
    assert job["document"] == name and job["counts"]["computed"] == 2
    assert server.ask("GET", f"/documents/{quoted}")["registered"]
    listed = server.ask("GET", "/chunks", params={"document": name})["data"]
    assert [row["id"] for row in listed] == sorted(job["keys"])
    other = {"text": two, "document": "other"}
    assert server.ask("POST", "/ingestions", json={"chunks": [other], "wait": True})["document"]
    again = put(three)
    assert again["counts"]["computed"] == 1
    stored = server.ask("POST", "/chunks/keys", json={"texts": [one, two, three]})["data"]
    assert [row["stored"] for row in stored] == [False, True, True], "two is the other's too"
    found = server.ask("POST", "/documents/registered", json={"documents": ["x", name, "other"]})
    assert found["data"] == [name, "other"]
    gone = server.ask("DELETE", f"/documents/{quoted}")
    assert gone == {"id": name, "object": "cacheblend.document", "deleted": True, "chunks": 1}
    wrong(server.client.get(f"{BASE}/documents/{quoted}"), 404)
    assert not server.ask("DELETE", f"/documents/{quoted}")["deleted"]
    [key] = [row["id"] for row in stored[1:2]]
    noted = server.ask("POST", "/documents", json={"documents": {"third": [key]}})
    assert noted == {"object": "cacheblend.registration", "documents": 1}
    few = {"documents": ["other", "third"], "only": [key]}
    assert server.ask("POST", "/documents/delete", json=few)["deleted"] == 1
    put(one)
    assert put()["status"] == "completed", "a document without chunks"
    assert server.ask("POST", "/documents/registered", json={"documents": [name]})["data"] == []


def test_ingestions(server: LiveServer) -> None:
    body = {"chunks": [text(40), text(41), text(5), "w9 " * 2000]}
    headers = {"Idempotency-Key": "once"}
    answer = server.client.post(f"{BASE}/ingestions", json=body, headers=headers)
    assert answer.status_code == 202 and answer.json()["status"] == "queued"
    name = answer.json()["id"]
    done = server.ended(name)
    assert {n: c for n, c in done["counts"].items() if c} == {
        "total": 4, "computed": 2, "too_short": 1, "too_long": 1,
    }  # fmt: skip
    assert [bool(key) for key in done["keys"]] == [True, True, False, False]
    again = server.client.post(f"{BASE}/ingestions", json=body, headers=headers)
    assert again.json()["id"] == name and again.json()["status"] == "completed"
    other = {"chunks": [text(40)]}
    wrong(server.client.post(f"{BASE}/ingestions", json=other, headers=headers), 409)
    wrong(server.client.post(f"{BASE}/ingestions/{name}/cancel"), 409)
    listed = server.ask("GET", "/ingestions", params={"limit": 1})
    assert listed["data"][0]["id"] == name and listed["has_more"]
    oldest = server.ask("GET", "/ingestions", params={"order": "asc", "limit": 100})["data"]
    assert oldest[-1]["id"] == name


def test_ids_as_a_request_would_send_them(server: LiveServer) -> None:
    told = server.ask("POST", "/tokenize", json={"prompt": "w5 w6"})
    plain = server.client.post("/tokenize", json={"model": "m", "prompt": "w5 w6"}).json()
    assert told == {"object": "cacheblend.prompt", "token_ids": plain["tokens"]}
    assert server.ask("POST", "/tokenize", json={"prompt": [7, 8]})["token_ids"] == [7, 8]
    chat = [{"role": "user", "content": "w5"}]
    wrong(server.client.post(f"{BASE}/tokenize", json={"prompt": chat}), 400)  # no template


# ---- what is wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/ingestions", b"{", 400),
        ("POST", "/ingestions", b"", 400),
        ("POST", "/ingestions", {"chunks": []}, 400),
        ("POST", "/ingestions", {"chunks": ["w5"], "wiat": True}, 400),
        ("POST", "/ingestions", {"chunks": [{"text": "w5", "left_context": "w6"}]}, 400),
        ("POST", "/ingestions", {"chunks": ["w5"], "wait": "yes"}, 400),
        ("POST", "/ingestions", {"chunks": ["w5"], "\ud800": 1}, 400),
        ("PUT", "/documents/d", {"chunks": [{"text": "w5", "document": "e"}]}, 400),
        ("GET", "/ingestions/ing_x", None, 404),
        ("POST", "/ingestions/ing_x/cancel", None, 404),
        ("GET", "/ingestions?after=ing_x", None, 404),
        ("GET", "/ingestions?limit=0", None, 400),
        ("GET", "/chunks?after=x", None, 400),
        ("GET", "/chunks?befor=x", None, 400),
        ("DELETE", "/chunks/x", None, 400),
        ("POST", "/chunks/delete", {}, 400),
        ("POST", "/chunks/delete", {"ids": ["x"]}, 400),
        ("POST", "/chunks/keys", {"texts": [[99999]]}, 400),
        ("POST", "/ingestions", {"chunks": ["w5", [5, 99999]]}, 400),
        ("GET", "/ingestions?limit=" + "0" * 8 + "1" + "0" * 5000, None, 400),
        ("GET", "/requests/absent?index=" + "0" * 9 + "5" * 5000, None, 400),
        ("GET", "/documents/%ff", None, 400),
        ("GET", "/requests/a%2Fb", None, 404),
        ("POST", "/documents", {"documents": []}, 400),
        ("GET", "/documents/absent", None, 404),
        ("GET", "/requests/absent", None, 404),
        ("POST", "/tokenize", {}, 400),
        ("POST", "/tokenize", {"prompt": {"a": 1}}, 400),
        ("POST", "/tokenize", {"prompt": [5] * 2000}, 400),
        ("GET", "/nothing", None, 404),
        ("PATCH", "/chunks", None, 404),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests(server: LiveServer, method: str, path: str, body: Any, status: int) -> None:
    raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    wrong(server.client.request(method, f"{BASE}{path}", content=raw), status)


def test_without_the_key(server: LiveServer) -> None:
    for path in ("", "/chunks", "/ingestions"):
        answer = httpx.get(f"{server.url}{BASE}{path}", headers={"Authorization": "Bearer no"})
        assert answer.status_code == 401


@pytest.mark.parametrize("how", ["Content-Length: 104857600", "Transfer-Encoding: chunked"])
def test_a_body_of_100_megabytes(server: LiveServer, how: str) -> None:
    head = f"POST {BASE}/ingestions HTTP/1.1\r\nHost: s\r\nAuthorization: Bearer {KEY}\r\n{how}\r\n"
    part = b"100000\r\n" + b" " * (1 << 20) + b"\r\n" if "chunked" in how else b" " * (1 << 20)
    with socket.create_connection(("127.0.0.1", server.port), 20) as wire:
        wire.sendall(head.encode() + b"\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                wire.settimeout(0.01)
                with contextlib.suppress(TimeoutError):
                    assert b" 413 " in wire.recv(65536)
                    return
                wire.settimeout(20)
                wire.sendall(part)
        wire.settimeout(20)
        assert b" 413 " in wire.recv(65536)


@pytest.mark.parametrize(
    "forged",
    [
        {"segments": [[0, 32, "ab" * 32, 0, 1]]},
        {"space": "another's"},
        {"request_id": "another's"},
        {"ingest": True},
        {"mode": "no such"},
        {"mode": None},
        {"recompute_ratio": "x"},
        {"recompute_ratio": 2**40},
        {"propagation_length": 2**40},
        {"selector": ["a"]},
        {"selector_options": {"no such": [1] * 1000}},
        {"blend_if": True},
        {"mode": {"a": [{}]}},
        ["a list"],
        "a text",
        5,
    ],
    ids=str,
)
def test_forged_params_change_nothing(server: LiveServer, keys: list[str], forged: Any) -> None:
    prompt = asking(A, B)
    before = server.ask("GET", "")["chunks"]
    answer = complete(server, prompt, cacheblend=forged)
    plain = complete(server, prompt, cacheblend={"mode": "off"})
    assert answer["choices"][0]["text"] == plain["choices"][0]["text"]
    report = server.ask("GET", f"/requests/{answer['id']}")
    assert report["reason"] == "malformed_options" and not report["blended"]
    assert server.ask("GET", "")["chunks"] == before
    wrong(server.client.get(f"{BASE}/requests/another's"), 404)


@pytest.mark.parametrize(
    "params",
    [
        {"kv_transfer_params": {"cacheblend": json.loads("[" * 900 + "]" * 900)}},
        {"kv_transfer_params": {"cacheblend": {"mode": "\ud800"}}},
        {"kv_transfer_params": {"\udfff": 1}},
        {"kv_transfer_params": {"cacheblend": {"recompute_ratio": 10**400}}},
        {"kv_transfer_params": "x"},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
    ],
    ids=["deep", "half", "half name", "huge", "text", "by another name"],
)
def test_what_no_process_could_be_handed_is_refused(server: LiveServer, params: Any) -> None:
    """The first of these ended the engine, and with it the server."""
    body = json.dumps({"model": "m", "prompt": "w5", "max_tokens": 2, **params})
    headers = {"Content-Type": "application/json"}
    wrong(server.client.post("/v1/completions", content=body, headers=headers), 400)
    assert complete(server, "w5 w6")["choices"]


def test_ids_that_clients_choose(server: LiveServer, keys: list[str]) -> None:
    """With a slash in it; and one that is given twice is the later request."""
    for prompt in (asking(A), asking(C, B)):
        body = {"model": "m", "prompt": prompt, "max_tokens": 2}
        headers = {"X-Request-Id": "mine/ÿ b"}
        answer = server.client.post(
            "/v1/completions",
            json=body,
            headers={name: value.encode("latin-1") for name, value in headers.items()},
        ).json()
        report = server.ask("GET", f"/requests/{quote(answer['id'], safe='')}")
        assert report["tokens_total"] == answer["usage"]["prompt_tokens"]
        assert report["reports"] == 1


def test_put_and_delete_at_once(server: LiveServer) -> None:
    """What was deleted last stays deleted, however far its ingestion was."""
    for pause_s in (0, 0.02, 0.1):
        body = {"chunks": [text(60) for _ in range(12)]}
        put = server.ask("PUT", "/documents/race", json=body)
        time.sleep(pause_s)
        server.ask("DELETE", "/documents/race")
        found = server.ask("POST", "/chunks/keys", json={"texts": body["chunks"]})["data"]
        assert not any(row["stored"] for row in found)
        wrong(server.client.get(f"{BASE}/documents/race"), 404)
        assert server.ended(put["id"])["status"] in ("cancelled", "completed")
        found = server.ask("POST", "/chunks/keys", json={"texts": body["chunks"]})["data"]
        assert not any(row["stored"] for row in found)
        wrong(server.client.get(f"{BASE}/documents/race"), 404)


# ---- many at once, and those who leave -----------------------------------------------------------


def test_a_client_that_leaves_in_mid_stream(server: LiveServer, keys: list[str]) -> None:
    body = {"model": "m", "prompt": asking(A, B), "max_tokens": 400, "stream": True}
    for _ in range(3):
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    assert complete(server, asking(B, A))["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_client_that_leaves_in_mid_ingestion(server: LiveServer) -> None:
    chunks = [text(60) for _ in range(40)]
    with pytest.raises(httpx.TimeoutException):
        server.client.post(
            f"{BASE}/ingestions", json={"chunks": chunks, "wait": True}, timeout=0.15
        )
    [newest] = server.ask("GET", "/ingestions", params={"limit": 1})["data"]
    assert newest["counts"]["total"] == 40
    assert server.ended(newest["id"])["counts"]["computed"] == 40


def test_two_ingestions_of_one_document_at_once(server: LiveServer) -> None:
    one, two, common = [text(40) for _ in range(6)], [text(41) for _ in range(6)], text(50)

    def put(chunks: list[str]) -> Any:
        body = {"chunks": [*chunks, common], "wait": True}
        return server.ask("PUT", "/documents/both", json=body)

    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(put, (one, two)))
    assert {job["status"] for job in jobs} == {"completed"}
    listed = {r["id"] for r in server.ask("GET", "/chunks", params={"document": "both"})["data"]}
    assert listed in [set(job["keys"]) for job in jobs], "exactly one of them"
    assert server.ask("DELETE", "/documents/both")["chunks"] == 7


def test_answers_beside_an_ingestion(server: LiveServer, keys: list[str]) -> None:
    """Exact and blended ones, none of them another's."""
    prompts = [asking(*chunks) for chunks in ((A, B), (C, A), (B, C, A))]
    off = [complete(server, p, cacheblend={"mode": "off"})["choices"][0]["text"] for p in prompts]
    chunks = [text(100) for _ in range(60)]
    name = server.ask("POST", "/ingestions", json={"chunks": chunks})["id"]

    def exact(number: int) -> bool:
        options = [{"mode": "off"}, {"recompute_ratio": 1.0}][number % 2]
        answer = complete(server, prompts[number % 3], cacheblend=options)
        return bool(answer["choices"][0]["text"] == off[number % 3])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(exact, range(24)))
    assert server.ended(name)["counts"]["computed"] == 60


def test_cancelled(server: LiveServer) -> None:
    name = server.ask("POST", "/ingestions", json={"chunks": [text(90) for _ in range(200)]})["id"]
    server.ask("POST", f"/ingestions/{name}/cancel")
    job = server.ended(name)
    assert job["status"] == "cancelled" and job["counts"]["remaining"] > 0 and job["keys"] is None


# ---- its end -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_in_mid_ingestion_it_goes_on_where_it_was(server: LiveServer) -> None:
    """And told to end, it keeps what it has acknowledged."""
    chunks = [text(90) for _ in range(400)]
    body, headers = {"chunks": chunks}, {"Idempotency-Key": "killed"}
    first = server.client.post(f"{BASE}/ingestions", json=body, headers=headers).json()
    later = server.ask("POST", "/ingestions", json={"chunks": [text(33)]})
    before = first
    while before["counts"]["remaining"] in (0, 400):
        before = server.ask("GET", f"/ingestions/{first['id']}")
    server.kill()
    server.start()
    again = server.client.post(f"{BASE}/ingestions", json=body, headers=headers).json()
    assert again["id"] == first["id"]
    done = server.ended(first["id"])
    counts = done["counts"]
    assert done["status"] == "completed" and counts["computed"] + counts["present"] == 400
    assert before["counts"]["computed"] <= counts["computed"]
    assert len(set(done["keys"])) == 400
    assert server.ended(later["id"])["status"] == "completed"
    listed = server.client.get(f"{BASE}/chunks", params={"after": "0" * 64, "limit": 100})
    assert listed.json()["has_more"]

    chunks = [text(90) for _ in range(300)]
    name = server.ask("POST", "/ingestions", json={"chunks": chunks})["id"]
    while server.ask("GET", f"/ingestions/{name}")["counts"]["remaining"] == 300:
        time.sleep(0.01)
    ended: list[str] = []

    def stream() -> None:
        body = {"model": "m", "prompt": text(9), "max_tokens": 900, "stream": True}
        with (
            contextlib.suppress(httpx.HTTPError),
            server.client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            ended.extend(answer.iter_lines())
        ended.append("over")

    streaming = threading.Thread(target=stream)
    streaming.start()
    time.sleep(0.2)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 15
    streaming.join(10)
    assert ended[-1] == "over" and len(ended) > 3
    [file] = server.folder.glob("kv-serve/*.sqlite")
    jobs = Jobs(file, 1)
    job = jobs.get("", name)
    told = shown(job, jobs.keys(job))
    jobs.close()
    assert told["status"] == "queued" and 0 < told["counts"]["remaining"] < 300
