"""``CacheBlend.connect``: what comes over HTTP is what the same engine says without it."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import Any

import pytest
from fake_server import FakeServer, Fault

from cacheblend_rag import (
    BlendConfig,
    BlendResult,
    CacheBlend,
    ClosedError,
    ConfigError,
    EmptyTextError,
    EngineError,
    IngestReport,
    PromptError,
    PromptTooLongError,
    Reason,
    ServerError,
)
from cacheblend_rag.client import RemoteCacheBlend
from cacheblend_rag.client import chunks as client_chunks
from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.shadow import Figures
from cacheblend_rag.shadow import report as reports

TEXTS = [f"Passage {i}. " + f"The ship of number {i} sailed to harbour {i}. " * 8 for i in range(4)]
PROMPT = "\n\n".join([*TEXTS, "Where did ship 2 sail?"])
MESSAGES = [{"role": "user", "content": PROMPT}]
PROMPTS = {
    "text": PROMPT,
    "messages": MESSAGES,
    "ids": tuple(range(1000, 1200)),
    "lines": "é\u2028\x85x",
}


def timeless(result: BlendResult) -> BlendResult:
    """Without what differs from call to call."""
    report = replace(result.report, ttft_s=0, total_s=0, stages_s={})
    return replace(result, report=report, request_id="")


def same_ingestion(one: IngestReport, other: IngestReport) -> bool:
    return replace(one, seconds=0) == replace(other, seconds=0)


# ---- the same methods ----------------------------------------------------------------------------


WAYS_TO_MAKE_ONE = {"connect", "from_engine"}


def public(kind: type) -> dict[str, Any]:
    names = {name for name in dir(kind) if not name.startswith("_")} - WAYS_TO_MAKE_ONE
    return {name: inspect.getattr_static(kind, name) for name in names}


def test_every_public_method_of_the_front_door_works_over_http() -> None:
    """None is left that would look for an engine in this process."""
    ours, theirs = public(RemoteCacheBlend), public(CacheBlend)
    assert theirs.keys() <= ours.keys()
    assert [name for name in theirs if ours[name] is theirs[name]] == []


def test_methods_take_the_same_arguments() -> None:
    ours = public(RemoteCacheBlend)
    for name, method in public(CacheBlend).items():
        if inspect.isfunction(method):
            wanted = inspect.signature(method).parameters.keys()
            assert inspect.signature(ours[name]).parameters.keys() == wanted, name


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "off"},
        {"mode": "full", "max_tokens": 2},
        {"recompute_ratio": 0.5, "selector": "first_k", "blend_if": "always", "logprobs": 1},
        {"stop": ["answer"]},
        {"max_tokens": None},
    ],
    ids=str,
)
def test_answers_are_the_embedded_ones(
    remote: CacheBlend, behind: CacheBlend, prompt: Any, options: dict[str, Any]
) -> None:
    behind.ingest(TEXTS, progress=False)
    expected = behind.generate(prompt, **options)
    got = remote.generate(prompt, **options)
    assert timeless(got) == timeless(expected)
    assert 0 < got.report.ttft_s <= got.report.total_s
    assert got.report.stages_s.keys() == expected.report.stages_s.keys()
    assert got.request_id.startswith("cmpl-")


def test_what_the_shadow_found_is_asked_of_the_server(
    remote: CacheBlend, server: FakeServer
) -> None:
    result = remote.generate(PROMPT)
    assert result.report.shadow is None and remote.shadow(result) is None
    figures = Figures(tokens=4, kl=0.1, agreement=0.75, changed=True, first_changed=False)
    server.reports[result.request_id]["shadow"] = reports.done("t", figures)
    found = remote.shadow(result)
    assert found is not None and found.state == "done"
    assert (found.tokens, found.kl, found.agreement) == (4, 0.1, 0.75)
    del server.reports[result.request_id]
    assert remote.shadow(result) is None  # it is forgotten


def test_several_prompts_are_answered_in_order(remote: CacheBlend, server: FakeServer) -> None:
    prompts = [f"{PROMPT} {i}" for i in range(9)]
    results = remote.generate(prompts, max_tokens=2)
    assert [r.prompt_token_ids for r in results] == [remote.tokenize(p) for p in prompts]


def test_of_several_prompts_one_fails_and_the_others_are_left(
    remote: CacheBlend, server: FakeServer
) -> None:
    server.pause_s = 0.3
    server.next("/completions", Fault(500))
    start = time.monotonic()
    with pytest.raises(ServerError, match="not now"):
        remote.generate([PROMPT] * 3)
    assert time.monotonic() - start < 1.1  # an answer of four words takes 1.2 s


def test_a_stream_is_that_of_the_embedded_engine(remote: CacheBlend, behind: CacheBlend) -> None:
    behind.ingest(TEXTS, progress=False)
    here, there = behind.stream(MESSAGES), remote.stream(MESSAGES)
    assert list(there) == list(here)
    assert timeless(there.result) == timeless(here.result)
    assert [p._replace(at=0, engine={}) for p in there.pieces] == [
        p._replace(at=0, engine={}) for p in here.pieces
    ]


async def test_an_answer_may_hold_what_else_ends_a_line(
    remote: CacheBlend, behind: CacheBlend
) -> None:
    engine: Any = behind.engine
    text = "one\u2028two\x85three\x0b\r\nfour"
    engine.answers += [text, text]
    assert remote.generate(PROMPT).text == text
    assert (await remote.agenerate(PROMPT)).text == text


async def test_answers_for_an_event_loop(remote: CacheBlend, behind: CacheBlend) -> None:
    behind.ingest(TEXTS, progress=False)
    expected = await behind.agenerate(PROMPT, logprobs=1)
    both = await asyncio.gather(*(remote.agenerate(PROMPT, logprobs=1) for _ in range(5)))
    assert all(timeless(got) == timeless(expected) for got in both)
    pieces = [piece async for piece in remote.astream(PROMPT)]
    assert "".join(pieces) == expected.text


def test_event_loops_and_threads_share_a_front(remote: CacheBlend) -> None:
    texts: list[str] = []

    def work() -> None:
        texts.append(asyncio.run(remote.agenerate(PROMPT)).text)
        texts.append(remote.generate(PROMPT).text)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [texts[0]] * 12


def wait_for(said: Callable[[], bool]) -> bool:
    until = time.monotonic() + 5
    while not said() and time.monotonic() < until:
        time.sleep(0.01)
    return said()


def test_leaving_a_stream_closes_the_connection(remote: CacheBlend, server: FakeServer) -> None:
    server.pause_s = 0.2
    with remote.stream(PROMPT) as stream:
        next(stream)
    assert next(stream, None) is None
    assert wait_for(lambda: server.left_early == 1)
    with pytest.raises(Exception, match="read to its end"):
        stream.result  # noqa: B018


async def test_leaving_an_async_stream_closes_the_connection(
    remote: CacheBlend, server: FakeServer
) -> None:
    server.pause_s = 0.2
    async with remote.astream(PROMPT) as stream:
        await anext(stream)
    assert await asyncio.to_thread(wait_for, lambda: server.left_early == 1)


async def test_cancelling_closes_the_connection(remote: CacheBlend, server: FakeServer) -> None:
    server.pause_s = 0.2
    task = asyncio.ensure_future(remote.agenerate(PROMPT))
    await asyncio.to_thread(wait_for, lambda: bool(server.bodies))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(wait_for, lambda: server.left_early == 1)


def test_an_async_stream_that_is_never_read_asks_nothing(
    remote: CacheBlend, server: FakeServer
) -> None:
    remote.astream(PROMPT)
    assert server.calls == []


def test_an_answer_that_breaks_off_is_an_error(remote: CacheBlend, server: FakeServer) -> None:
    server.breaks_after = 2
    stream = remote.stream(PROMPT)
    assert [next(stream), next(stream)] == ["A", " short"]
    with pytest.raises(ServerError, match="ended an answer without saying why"):
        next(stream)


def test_an_answer_whose_report_is_gone_says_so(remote: CacheBlend, server: FakeServer) -> None:
    server.next("/requests/cmpl-1", *[Fault(404)] * 9)
    server._number = 0
    report = remote.generate(PROMPT).report
    assert (report.blended, report.reason) == (False, Reason.NOT_REPORTED)
    assert "no report" in report.detail
    assert report.tokens_total == len(remote.tokenize(PROMPT))


def test_a_report_that_comes_late_is_waited_for(
    remote: CacheBlend, server: FakeServer, behind: CacheBlend
) -> None:
    behind.ingest(TEXTS, progress=False)
    server._number = 0
    server.next("/requests/cmpl-1", Fault(404), Fault(404))
    assert remote.generate(PROMPT).report.blended


# ---- what is sent --------------------------------------------------------------------------------


def test_parameters_that_are_left_out_are_vllms_and_not_the_models(
    remote: CacheBlend, server: FakeServer
) -> None:
    """A server would take those of the model's generation_config.json."""
    remote.generate(PROMPT)
    [body] = server.bodies
    assert {body[n] for n in ("temperature", "top_p", "repetition_penalty")} == {1.0}
    assert (body["top_k"], body["min_p"], body["presence_penalty"]) == (0, 0.0, 0.0)
    assert "kv_transfer_params" not in body  # the server's configuration holds


def test_a_call_sends_the_options_that_it_names(remote: CacheBlend, server: FakeServer) -> None:
    remote.generate(PROMPT, selector="first_k", recompute_ratio=0.3)
    [body] = server.bodies
    sent = {"selector": "first_k", "recompute_ratio": 0.3, "selector_options": {}}
    assert body["kv_transfer_params"] == {"cacheblend": sent}


def test_a_full_prefill_reads_no_cached_block(remote: CacheBlend, server: FakeServer) -> None:
    remote.generate([PROMPT, PROMPT], mode="full")
    salts = {body["cache_salt"] for body in server.bodies}
    assert len(salts) == 2


def test_all_there_is_room_for(remote: CacheBlend, server: FakeServer) -> None:
    remote.generate(PROMPT, max_tokens=None)
    [body] = server.bodies
    assert body["max_tokens"] == remote.info.max_model_len - len(body["prompt"])


def test_an_adapter_goes_by_its_name(remote: CacheBlend, server: FakeServer) -> None:
    remote.generate(PROMPT, lora_request="an-adapter")
    assert server.bodies[0]["model"] == "an-adapter"
    with pytest.raises(ConfigError, match="--lora-modules"):
        remote.generate(PROMPT, lora_request=7)


class Unsendable(Enum):
    """No JSON, and called the same in every process."""

    ONE = "a member of an enumeration"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tempertaure": 1}, "Did you mean 'temperature'"),
        ({"n": 2}, "n must be 1"),
        ({"prompt_logprobs": 1}, "no place for it"),
        ({"detokenize": False}, "always sends text"),
        ({"skip_reading_prefix_cache": True}, "mode='full'"),
        ({"recompute_ratio": 2}, "is a share"),
        ({"mode": "blnd"}, "must be one of"),
        ({"logprob_token_ids": [1]}, "to this server"),  # whose vLLM does not have it
        ({"seed": Unsendable.ONE}, "can't be sent"),
        ({"chat_template_kwargs": {"tokenize": False}}, "can't set tokenize"),
    ],
    ids=str,
)
def test_options_that_are_refused(
    remote: CacheBlend, server: FakeServer, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        remote.generate(PROMPT, **options)
    assert server.bodies == []


def test_what_this_servers_vllm_has_is_sent(remote: CacheBlend, server: FakeServer) -> None:
    remote.generate(PROMPT, watermarking=True)
    assert server.bodies[0]["watermarking"] is True
    remote.generate(PROMPT, watermarking=True)
    assert server.count("GET", "/openapi.json") == 1


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("", EmptyTextError),
        ([], EmptyTextError),
        ("caf\udce9", PromptError),
        ([{"role": "user", "content": [{"type": "image_url"}]}], PromptError),
        (tuple(range(9000)), PromptTooLongError),
        ("word " * 9000, PromptTooLongError),
        ([1, "a"], PromptError),
        (7, PromptError),
    ],
    ids=["empty", "none", "surrogate", "image", "long", "long text", "mixed", "number"],
)
def test_prompts_that_are_refused(
    remote: CacheBlend, server: FakeServer, prompt: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        remote.generate(prompt)
    assert server.bodies == []


# ---- chunks and documents ------------------------------------------------------------------------


def test_ingestion_says_what_the_embedded_one_says(
    remote: CacheBlend, behind: CacheBlend, server: FakeServer
) -> None:
    texts = [*TEXTS, TEXTS[0], "short", "long " * 9000, list(range(500, 600))]
    documents = ["a", "a", "b", None, "b", None, None, "c"]
    before = [None, TEXTS[0], None, "What came before.", None, None, None, [7, 8, 9]]
    got = remote.ingest(texts, documents=documents, left_context=before, progress=False)
    stored, noted = remote.stored(), remote.registered_documents(["a", "b", "c", "d"])
    behind_them = dict(behind.engine.behind)  # type: ignore[attr-defined]
    server.reset()
    expected = behind.ingest(texts, documents=documents, left_context=before, progress=False)
    assert same_ingestion(got, expected)
    assert stored == behind.stored()
    assert noted == behind.registered_documents(["a", "b", "c", "d"]) == {"a", "b", "c"}
    assert behind_them == behind.engine.behind  # type: ignore[attr-defined]
    again = remote.ingest(texts, progress=False)
    assert (again.computed, again.present) == (0, 5)


def test_ingestion_is_followed_with_a_bar(
    remote: CacheBlend, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.job_s = 0.4
    remote.ingest(TEXTS)
    assert "4/4" in capsys.readouterr().err
    assert sum(m == "GET" and "/ingestions/ing_" in path for m, path in server.calls) >= 2


def test_a_large_ingestion_goes_in_several_bodies(
    remote: CacheBlend, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_chunks, "MOST_BYTES", 900)
    report = remote.ingest(TEXTS, progress=False)
    assert server.count("POST", "/ingestions") == 2
    assert (report.chunks, report.computed, len(report.keys)) == (4, 4, 4)
    assert remote.delete_except(TEXTS[:1]) == 3
    assert remote.stored() == {remote.key(TEXTS[0])}


def test_an_ingestion_that_fails_raises_what_the_server_says(
    remote: CacheBlend, server: FakeServer
) -> None:
    from cacheblend_rag import StoreError

    server.fail_job = {"code": "ingestion_failed", "message": "the disk is full"}
    with pytest.raises(StoreError, match="the disk is full"):
        remote.ingest(TEXTS, progress=False)


@pytest.mark.parametrize("refused", [1, len(TEXTS)], ids=["one", "all"])
def test_what_a_store_refused_is_in_the_report(
    remote: CacheBlend,
    behind: CacheBlend,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    refused: int,
) -> None:
    """As in the embedded one's. Where it was all, the job has failed."""
    ingest, keys = behind.ingest, [behind.key(text) for text in TEXTS[:refused]]

    def refusing(*args: Any, **options: Any) -> IngestReport:
        report = ingest(*args, **options)
        behind.forget_keys(keys)
        why = "not stored: too large"
        return replace(report, not_stored=dict.fromkeys(keys, why), detail=why)

    monkeypatch.setattr(behind, "ingest", refusing)
    if refused == len(TEXTS):
        server.fail_job = {"code": "not_stored", "message": "the store kept none of the chunks"}
    report = remote.ingest(TEXTS, progress=False)
    assert report.not_stored == dict.fromkeys(keys, "not stored: too large")
    assert report.chunks == report.computed == len(report.keys) == len(TEXTS)
    assert server.count("GET", "/chunks") == 0, "a store may be large"


def test_an_ingestion_that_is_left_is_cancelled(
    remote: CacheBlend, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.job_s = 30

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client_chunks.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remote.ingest(TEXTS, progress=False)
    assert server.count("POST", "/cancel") == 1


def test_an_ingestion_whose_response_is_lost_is_not_done_twice(
    remote: CacheBlend, server: FakeServer
) -> None:
    server.next("/ingestions", Fault(503))
    remote.ingest(TEXTS, progress=False)
    assert server.count("POST", "/ingestions") == 2
    assert len(server.jobs) == 1


@pytest.mark.parametrize("texts", [["a", " "], [TEXTS[0], "\udce9"], [[]], b"x"], ids=repr)
def test_texts_that_are_refused_are_not_sent(
    remote: CacheBlend, server: FakeServer, texts: Any
) -> None:
    with pytest.raises(PromptError):
        remote.ingest(texts, progress=False)
    assert server.calls == []


def test_forgetting(remote: CacheBlend, behind: CacheBlend) -> None:
    keys = remote.ingest(TEXTS, progress=False).keys
    assert list(keys) == [behind.key(text) for text in TEXTS] == [remote.key(t) for t in TEXTS]
    remote.forget(TEXTS[0])
    assert remote.stored() == set(keys[1:])
    assert remote.forget_keys([keys[1], keys[0], "f" * 64]) == 1
    assert remote.delete_except([TEXTS[2]]) == 1
    assert remote.stored() == {keys[2]}


def test_documents(remote: CacheBlend) -> None:
    keys = remote.ingest(TEXTS, progress=False).keys
    remote.register_documents({"one": keys[:2], "two / ä?": keys[1:]})
    assert remote.registered_documents(["one", "two / ä?", "three"]) == {"one", "two / ä?"}
    assert remote.forget_documents(["one"]) == 1  # the other has the second chunk too
    assert remote.forget_documents(["two / ä?"], keys[3:]) == 1
    assert remote.stored() == {keys[1], keys[2]}


def test_more_chunks_than_a_page_are_listed(remote: CacheBlend, server: FakeServer) -> None:
    ids = [list(range(1000 + i, 1040 + i)) for i in range(130)]
    report = remote.ingest(ids, progress=False)
    assert remote.stored() == set(report.keys)
    assert server.count("GET", "/chunks") == 2


def test_chunks_are_prefetched(remote: CacheBlend, behind: CacheBlend) -> None:
    remote.prefetch(TEXTS[:2])
    assert behind.engine.prefetched[-2:] == [behind.key(t) for t in TEXTS[:2]]  # type: ignore[attr-defined]


# ---- configuration -------------------------------------------------------------------------------


def test_facts_of_the_server(remote: CacheBlend, behind: CacheBlend, server: FakeServer) -> None:
    assert remote.config == behind.config
    assert remote.model_check.passed
    assert remote.info.max_model_len == behind.info.max_model_len
    assert remote.info.fingerprint == behind.info.fingerprint
    assert remote.takes_messages
    remote.ingest(TEXTS, progress=False)
    assert remote.stats() == behind.stats()
    with pytest.MonkeyPatch.context() as patch:
        state = {**remote._state(), "store": {}, "store_error": "it does not answer"}  # type: ignore[attr-defined]
        patch.setattr(remote, "_state", lambda: state)
        assert remote.model_check.passed
        with pytest.raises(UnavailableError, match="it does not answer"):
            remote.stats()
    with pytest.raises(EngineError, match="runs in the server"):
        remote.engine  # noqa: B018
    with pytest.raises(EngineError, match="made by the server"):
        remote.key_space  # noqa: B018


def test_the_servers_tokenizer(remote: CacheBlend, behind: CacheBlend, server: FakeServer) -> None:
    for special in (True, False):
        got = remote.tokenizer.encode("Ship 2 é", add_special_tokens=special)
        assert got == list(behind.tokenizer.encode("Ship 2 é", add_special_tokens=special))
    assert remote.tokenizer.decode(got) == "Ship 2 é"
    assert remote.tokenizer.decode(got) == "Ship 2 é"
    assert server.count("POST", "/detokenize") == 1


def test_a_configuration_of_requests(server: FakeServer, behind: CacheBlend) -> None:
    config = BlendConfig(mode="off", recompute_ratio=0.4)
    with CacheBlend.connect(server.url + "/v1/", config=config) as remote:
        assert remote.config.ingest_prefix == "document"  # the server's
        assert remote.config.recompute_ratio == 0.4
        remote.generate(PROMPT)
        sent = server.bodies[-1]["kv_transfer_params"]["cacheblend"]
        assert (sent["mode"], sent["recompute_ratio"]) == ("off", 0.4)
        other = remote.with_config(BlendConfig(mode="full"))
        other.generate(PROMPT)
        assert server.bodies[-1]["kv_transfer_params"]["cacheblend"]["mode"] == "full"
        remote.generate(PROMPT)
        assert server.bodies[-1]["kv_transfer_params"]["cacheblend"]["mode"] == "off"
        with pytest.raises(ConfigError, match="namespace"):
            remote.with_config(BlendConfig(namespace="another"))
        with pytest.raises(ConfigError, match="space"):
            remote.with_config(BlendConfig(), space="a")


def test_a_configuration_that_only_the_server_can_have(server: FakeServer) -> None:
    with pytest.raises(
        ConfigError, match=r"ingest_prefix is 'prompt_prefix' here.*--ingest-prefix"
    ):
        CacheBlend.connect(server.url, config=BlendConfig(ingest_prefix="prompt_prefix"))


def test_arguments_of_the_chat_template_reach_the_server(
    remote: CacheBlend, behind: CacheBlend
) -> None:
    with pytest.raises(ConfigError, match="no_such"):
        remote.generate(MESSAGES, chat_template_kwargs={"no_such": 1})


# ---- life ----------------------------------------------------------------------------------------


def test_a_closed_front_says_so(server: FakeServer) -> None:
    remote = CacheBlend.connect(server.url)
    remote.close()
    remote.close()
    for call in (
        lambda: remote.generate(PROMPT),
        lambda: remote.astream(PROMPT),
        lambda: remote.ingest(TEXTS),
        remote.stats,
    ):
        with pytest.raises(ClosedError, match="connect anew"):
            call()


def test_copies_and_pickles_connect_anew(server: FakeServer) -> None:
    config = BlendConfig(mode="off", selector_options={})
    with CacheBlend.connect(server.url, config=config, timeout=9) as remote:
        for other in (copy.deepcopy(remote), pickle.loads(pickle.dumps(remote))):
            with other:
                assert other.generate(PROMPT).text
                assert other.config == remote.config
        assert remote.generate(PROMPT).text  # closing the others closed nothing here


def test_a_forked_child_has_connections_of_its_own(remote: CacheBlend) -> None:
    remote.generate(PROMPT)
    child = os.fork()
    if child == 0:
        os._exit(0 if remote.generate(PROMPT).text == "A short answer." else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert remote.generate(PROMPT).text == "A short answer."


def sockets() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket")
    return found


def test_no_connection_is_left_open(server: FakeServer) -> None:
    time.sleep(0.2)  # the server sees that those of earlier tests were closed
    before = sockets()
    with CacheBlend.connect(server.url) as remote:
        for _ in range(3):
            remote.generate(PROMPT)
            asyncio.run(remote.agenerate(PROMPT))
            remote.stream(PROMPT).close()
    assert wait_for(lambda: sockets() <= before)
