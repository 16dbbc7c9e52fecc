"""Engines that others start, with nothing of ours but the connector."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import untried
from engines import SHARE, start_in_process
from tiny import VOCAB, Words, make

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine.groups import GroupedBlends
from cacheblend_rag.engine.outcome import BlendTask
from cacheblend_rag.engine.runner import StepTensors
from cacheblend_rag.engine.scratch import Scratch
from cacheblend_rag.engine.start import prepare
from cacheblend_rag.reason import Reason
from cacheblend_rag.store import open_store

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

HYBRID = "CacheBlendHybridConnector"
words = Words(31)
PREFIX = words(4)
A, B, C = words(70), words(90), words(64)
SAMPLING: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True, "logprobs": -1}


BEGINNING, QUESTION = words(4), words(15)


def prompt(*chunks: tuple[int, ...], first: int = 7) -> tuple[int, ...]:
    return (first, *BEGINNING, *(t for chunk in chunks for t in (3, *chunk)), *QUESTION)


class Answer(NamedTuple):
    token_ids: tuple[int, ...]
    finish_reason: str | None
    report: Mapping[str, Any]
    logprobs: Any


class Server:
    """Stock vLLM."""

    def __init__(
        self,
        model: Path,
        beside: Path | None = None,
        connector: str = "CacheBlendConnector",
        **extra: Any,
    ) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        ours: dict[str, Any] = {
            "kv_connector": connector,
            "kv_connector_module_path": "cacheblend_rag.engine.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
        }
        if beside is not None:
            theirs: dict[str, Any] = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
            theirs["kv_connector_extra_config"] = {"shared_storage_path": str(beside)}
            both = {"connectors": [theirs, ours]}
            ours = {**theirs, "kv_connector": "MultiConnector", "kv_connector_extra_config": both}
        self.llm = LLM(
            model=str(model),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_logprobs=VOCAB,
            enforce_eager=True,
            kv_transfer_config=KVTransferConfig(**ours),
            **{"block_size": 32, **SHARE},
        )

    def ask(self, ids: tuple[int, ...], **options: Any) -> Answer:
        from vllm import SamplingParams

        extra = {"kv_transfer_params": {"cacheblend": options}} if options else None
        params = SamplingParams(**SAMPLING, extra_args=extra)
        tokens: Any = {"prompt_token_ids": list(ids)}
        [output] = self.llm.generate(tokens, params, use_tqdm=False)
        answer = output.outputs[0]
        report = (output.kv_transfer_params or {}).get("cacheblend", {})
        return Answer(tuple(answer.token_ids), answer.finish_reason, report, answer.logprobs)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> Path:
    return make("llama", tiny_models)


class Filled(NamedTuple):
    """A store that another engine filled."""

    url: str
    fingerprint: str
    keys: list[str]


@pytest.fixture(scope="module")
def filled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    url = str(tmp_path_factory.mktemp("store"))
    with start_in_process(model, config=BlendConfig(store=url, ingest_prefix=PREFIX)) as blend:
        keys = list(blend.ingest([A, B, C], progress=False).keys)
        return Filled(url, blend.info.fingerprint, keys)


@pytest.fixture
def serve(model: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    started: list[Server] = []

    def begin(**extra: Any) -> Server:
        started.append(Server(model, **extra))
        return started[-1]

    yield begin
    for server in started:
        server.close()


def table(answer: Answer) -> torch.Tensor:
    return torch.tensor([[at[t].logprob for t in range(VOCAB)] for at in answer.logprobs])


def same(one: Answer, other: Answer) -> bool:
    close = bool((table(one) - table(other)).abs().max() < 2e-3)
    return one.token_ids == other.token_ids and close


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError


def test_the_first_blend_proves_that_blends_are_right(serve: Any, filled: Filled) -> None:
    server = serve(
        store=filled.url, ingest_prefix=list(PREFIX), blend_if="always", propagation_length=0
    )
    first, second = prompt(B, A), prompt(A, C, B)
    proof = server.ask(first)
    assert sum(proof.report["recomputed"]) > 0 and "reason" not in proof.report
    assert same(proof, server.ask(first, mode="off")), "it is exact"
    blended = server.ask(second)
    exact = server.ask(second, mode="off")
    assert 0 < sum(blended.report["recomputed"]) < 60 and not same(blended, exact)
    assert exact.report["reason"] == Reason.MODE and exact.report["prefix_cached"] == 0
    whole = server.ask(prompt(C, A), recompute_ratio=1.0)
    assert same(whole, server.ask(prompt(C, A), mode="off"))
    assert server.ask(words(50)).report["reason"] == Reason.NO_CHUNK_FOUND
    refused = server.ask(second, segments=[[0, 32, filled.keys[0], 0, 1]])
    assert refused.report["reason"] == Reason.MALFORMED_OPTIONS and same(refused, exact)


def test_what_other_processes_store_and_forget_is_learnt(serve: Any, filled: Filled) -> None:
    server = serve(store=filled.url, ingest_prefix=list(PREFIX), blend_if="always")
    store = open_store(filled.url, namespace=filled.fingerprint[:32])
    number = iter(range(10, 500))

    def blends() -> bool:
        return "recomputed" in server.ask(prompt(A, first=next(number))).report

    assert blends()
    chunk = store.get(filled.keys[0])
    assert chunk is not None
    store.discard(filled.keys[0])
    until(lambda: not blends())
    assert not store.put(filled.keys[0], chunk)
    until(blends)
    store.close()


@pytest.mark.parametrize("connector", ["CacheBlendConnector", HYBRID])
def test_rows_that_are_wrong_end_the_request_and_all_blends(
    serve: Any, filled: Filled, monkeypatch: pytest.MonkeyPatch, connector: str
) -> None:
    """Also beside the hybrid manager, which makes one group of layers of one kind."""
    options = {"ingest_prefix": list(PREFIX), "blend_if": "always"}
    server = serve(store=filled.url, connector=connector, **options)
    write = StepTensors.write

    def shifted(self: Any, place: Any, number: int, ids: Any, positions: Any, context: Any) -> None:
        write(self, place, number, ids, positions + 1, context)

    with monkeypatch.context() as patch:
        patch.setattr(StepTensors, "write", shifted)
        assert server.ask(prompt(B, A)).finish_reason == "error"
    after = server.ask(prompt(A, B))
    assert after.finish_reason == "length" and after.report["reason"] == Reason.ROWS_DIFFER
    assert same(after, server.ask(prompt(A, B), mode="off"))


def test_the_hybrid_manager_is_on_where_it_is_asked_for(tiny_models: Path) -> None:
    path = str(make("gemma3", tiny_models))
    for given, is_off in ((None, True), (True, True), (False, False)):
        options = {} if given is None else {"disable_hybrid_kv_cache_manager": given}
        args = prepare("EngineArgs", path, {"skip_tokenizer_init": True, **options}).engine_args
        config = args.create_engine_config()
        assert config.scheduler_config.disable_hybrid_kv_cache_manager is is_off


@pytest.fixture
def windowed(
    tiny_models: Path, tmp_path: Path, in_process: None, monkeypatch: Any
) -> Iterator[Any]:
    """Servers of a model of several KV cache groups."""
    untried.skip("kv_groups")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    path, started = make("gemma3", tiny_models), list[Server]()
    with start_in_process(path, config=BlendConfig(store=str(tmp_path), ingest_prefix=PREFIX)) as b:
        b.ingest([A, B, C], progress=False)
    ours = {"store": str(tmp_path), "ingest_prefix": list(PREFIX), "blend_if": "always"}

    def begin() -> Server:
        started.append(Server(path, connector=HYBRID, propagation_length=0, **ours))
        return started[-1]

    yield begin
    for server in started:
        server.close()


def test_with_several_groups_the_first_blend_is_a_proof_too(
    windowed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proves = windowed(), list[bool]()
    run = GroupedBlends._run

    def noting(self: GroupedBlends, task: BlendTask) -> None:
        proves.append(task.proves)
        run(self, task)

    monkeypatch.setattr(GroupedBlends, "_run", noting)
    first = prompt(B, A)
    # The last token's block comes with its step: what vLLM keeps can't be shown to be right.
    for ids in (first[-32 * 5 - 1 :], first):
        assert same(server.ask(ids), server.ask(ids, mode="off"))
    blended = server.ask(prompt(A, C, B))
    assert 0 < sum(blended.report["recomputed"]) < 60
    assert not same(blended, server.ask(prompt(A, C, B), mode="off"))
    assert proves == [True, True, False]


@pytest.mark.slow
def test_with_several_groups_and_a_worker_in_another_process(
    windowed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    server = windowed()
    for ids in (prompt(B, A), prompt(A, C)):
        whole = server.ask(ids, recompute_ratio=1.0)
        assert "recomputed" in whole.report
        assert same(whole, server.ask(ids, mode="off"))
    assert "recomputed" in server.ask(prompt(C, B), recompute_ratio=0.1).report


@pytest.mark.parametrize("where", ["save", "write"])
def test_with_several_groups_wrong_blends_end_the_request_and_all_blends(
    windowed: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    server, right = windowed(), getattr(Scratch, where)

    def wrong(self: Scratch, index: int, *args: Any) -> None:
        # What is kept a block behind where it belongs, or what is seen a token behind.
        if where == "save":
            table, first = args
            right(self, index, torch.roll(table, 1), first)
        else:
            k, v, at = args
            right(self, index, k, v, at + 1)

    with monkeypatch.context() as patch:
        patch.setattr(Scratch, where, wrong)
        assert server.ask(prompt(B, A)).finish_reason == "error"
    after = server.ask(prompt(A, B))
    assert after.finish_reason == "length" and after.report["reason"] == Reason.ROWS_DIFFER
    assert same(after, server.ask(prompt(A, B), mode="off"))


@pytest.mark.parametrize(
    ("extra", "says"),
    [({"stor": "x"}, "'store'"), ({"recompute_ratio": 3}, "recompute_ratio"), ({"store": 5}, "")],
    ids=str,
)
def test_a_wrong_configuration_is_told_with_every_request(
    serve: Any, extra: dict[str, Any], says: str
) -> None:
    answer = serve(**extra).ask(prompt(A, B))
    assert answer.finish_reason == "length" and answer.report["reason"] == Reason.NOT_READY
    assert says in answer.report["detail"]


def test_beside_another_connector_nothing_is_blended(
    serve: Any, filled: Filled, tmp_path: Path
) -> None:
    """One that keeps KV by token ids would hand blended KV on as exact."""
    server = serve(beside=tmp_path, store=filled.url, ingest_prefix=list(PREFIX), blend_if="always")
    answer = server.ask(prompt(A, B), mode="blend")
    assert answer.finish_reason == "length"
    assert answer.report["reason"] == Reason.OTHER_CONNECTORS


@pytest.mark.slow
def test_with_a_worker_in_another_process(
    model: Path, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU, and with tensor parallelism: what it says comes with the handshake."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    server = Server(
        model, store=filled.url, ingest_prefix=list(PREFIX), blend_if="always", propagation_length=0
    )
    try:
        proof = server.ask(prompt(B, A))
        assert "recomputed" in proof.report
        assert same(proof, server.ask(prompt(B, A), mode="off"))
        assert "recomputed" in server.ask(prompt(A, B)).report
    finally:
        server.close()


def stock_server(model: Path, store: Path, port: int) -> list[str]:
    connector = {
        "kv_connector": "CacheBlendConnector",
        "kv_connector_module_path": "cacheblend_rag.engine.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": str(store)},
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "m", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "2048", "--enforce-eager", "--gpu-memory-utilization", "0.3"]
    return [*command, "--kv-transfer-config", json.dumps(connector)]


@pytest.mark.slow
def test_a_stock_client_of_a_stock_server(embedded: Path, tmp_path: Path) -> None:
    """vLLM's server as docs/serving.md starts it, and the openai package."""
    from openai import OpenAI

    store = tmp_path / "kv"
    chunks = [
        f"Boat {n} is painted in colour {n}, and its captain is number {n}. " * 6 for n in range(4)
    ]
    asked = [
        {"role": "user", "content": "\n\n".join(chunks[n] for n in order) + "\n\nWho?"}
        for order in ((2, 0, 1), (1, 3, 2, 0))
    ]
    options = {"dtype": "float32", "max_model_len": 2048}
    with CacheBlend(embedded, config=BlendConfig(store=str(store)), **options) as blend:
        blend.ingest(chunks[:3], progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(stock_server(embedded, store, port), stdout=log, stderr=log) as server,
    ):
        try:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

            def report(messages: Any, **options: Any) -> tuple[str, dict[str, Any]]:
                body = {"kv_transfer_params": {"cacheblend": options}} if options else None
                answer: Any = client.chat.completions.create(
                    model="m", messages=messages, max_tokens=6, temperature=0, extra_body=body
                )
                return answer.choices[0].message.content, answer.kv_transfer_params["cacheblend"]

            def is_up() -> bool:
                time.sleep(1)
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                with contextlib.suppress(Exception):
                    return bool(client.models.list().data)
                return False

            until(is_up)
            text, proof = report([asked[0]])
            plain, off = report([asked[0]], mode="off")
            assert sum(proof["recomputed"]) and text == plain and off["prefix_cached"] == 0
            blended = report([asked[1]])[1]
            assert blended["bytes"] > 0 and blended["missing"] == []
            assert report([asked[1]], mode="off")[1]["reason"] == "mode"
            deep = json.loads("[" * 900 + "]" * 900)  # the engine ended writing it for its workers
            assert report([asked[1]], mode=deep)[1]["reason"] == "malformed_options"
        finally:
            server.terminate()
