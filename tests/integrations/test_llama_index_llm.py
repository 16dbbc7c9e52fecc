"""``CacheBlendLLM`` towards LlamaIndex: all eight calls, events, copies, settings and refusals."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_models import MISTRAL_FILES, NO_SYSTEM, THINKING, own_chat, with_tekken, with_template
from fake_engine import ANSWER, MODEL, FakeEngine, fake_blend, sent
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, MessageRole
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.prompts import PromptTemplate
from llama_matrix import Retrieve, engine, ingest, split
from pydantic import BaseModel, ValidationError

from cacheblend_rag import (
    BlendConfig,
    ClosedError,
    ConfigError,
    EmptyTextError,
    ModelError,
    PromptError,
    PromptTooLongError,
)
from llama_index_cacheblend import CacheBlendIngestion, CacheBlendLLM, watch_retrieval

TEXT = "".join(ANSWER)
HELLO = [ChatMessage(content="Hello")]


@pytest.fixture
def llm(engines: list[FakeEngine]) -> CacheBlendLLM:
    return CacheBlendLLM(model=str(MODEL), engine_args={"max_model_len": 2048})


async def in_all_ways(llm: CacheBlendLLM, **options: Any) -> dict[str, list[Any]]:
    """The responses of each of the eight calls."""
    return {
        "complete": [llm.complete("Hello", **options)],
        "stream_complete": list(llm.stream_complete("Hello", **options)),
        "acomplete": [await llm.acomplete("Hello", **options)],
        "astream_complete": [r async for r in await llm.astream_complete("Hello", **options)],
        "chat": [llm.chat(HELLO, **options)],
        "stream_chat": list(llm.stream_chat(HELLO, **options)),
        "achat": [await llm.achat(HELLO, **options)],
        "astream_chat": [r async for r in await llm.astream_chat(HELLO, **options)],
    }


def text_of(response: Any) -> str:
    return str(response.text if hasattr(response, "text") else response.message.content)


# --- the eight calls ------------------------------------------------------------------------------


async def test_every_call_answers_the_same_prompt(llm: CacheBlendLLM) -> None:
    for name, found in (await in_all_ways(llm)).items():
        assert text_of(found[-1]) == TEXT, name
        assert found[-1].raw["usage"]["completion_tokens"] == 4, name
        assert found[-1].raw["cacheblend"]["tokens_total"] > 0, name
        if "stream" in name:
            assert [r.delta for r in found] == list(ANSWER), name
            assert [text_of(r) for r in found][1] == "A short", name
    prompts = {request.token_ids for request in sent(llm.blend)}
    assert len(prompts) == 1
    assert len(sent(llm.blend)) == 8


async def test_options_of_the_object_and_of_a_call(llm: CacheBlendLLM) -> None:
    own = CacheBlendLLM(
        engine=llm.engine, temperature=0.5, max_tokens=2, stop=["x"], sampling={"top_p": 0.9}
    )
    assert all(text_of(f[-1]) == "A short" for f in (await in_all_ways(own)).values())
    own.complete("Hello", temperature=0.1, stop=[" answer"], max_tokens=9, mode="off")
    first, *_, last = sent(llm.blend)
    assert first.sampling == {"temperature": 0.5, "max_tokens": 2, "stop": ["x"], "top_p": 0.9}
    assert last.sampling["stop"] == [" answer"]
    assert (last.sampling["temperature"], last.sampling["max_tokens"]) == (0.1, 9)
    assert text_of(own.complete("Hello", stop=[" answer"], max_tokens=9)) == "A short"


async def test_an_unknown_option_is_refused_by_every_call(llm: CacheBlendLLM) -> None:
    with pytest.raises(ValidationError, match="temprature"):
        CacheBlendLLM(engine=llm.engine, temprature=1)
    with pytest.raises(ValidationError, match="show_progres"):
        CacheBlendIngestion(llm, show_progres=False)
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        llm.chat(HELLO, temprature=1)
    with pytest.raises(ConfigError, match="no option 'functions'"):
        await llm.achat(HELLO, functions=[])
    with pytest.raises(ConfigError, match="refused"):
        list(llm.stream_complete("Hello", temperature=-1.0))


async def test_log_probabilities(llm: CacheBlendLLM) -> None:
    for name, found in (await in_all_ways(llm, logprobs=2)).items():
        rows = found[-1].logprobs
        assert rows is not None, name
        assert [[entry.logprob for entry in row] for row in rows] == [[-0.5, -2.0]] * 4, name
        assert rows[0][0].token == llm.blend.tokenizer.decode([100]), name


def test_metadata_is_the_engine_s(llm: CacheBlendLLM) -> None:
    found = CacheBlendLLM(engine=llm.engine, max_tokens=77).metadata
    assert (found.context_window, found.num_output) == (2048, 77)
    assert found.is_chat_model
    assert not found.is_function_calling_model
    assert found.model_name == str(MODEL)
    assert not CacheBlendLLM(engine=llm.engine, is_chat_model=False).metadata.is_chat_model


def test_it_is_a_base_llm() -> None:
    assert BaseLLM in CacheBlendLLM.__mro__
    assert CacheBlendLLM.class_name() == "CacheBlendLLM"


# --- prompts --------------------------------------------------------------------------------------


def decoded(llm: CacheBlendLLM) -> str:
    return str(llm.blend.tokenizer.decode(sent(llm.blend)[-1].token_ids))


def test_formatted_text_goes_in_as_it_is(llm: CacheBlendLLM) -> None:
    llm.complete("Once upon", formatted=True)
    assert decoded(llm) == "Once upon"
    llm.complete("Once upon")
    assert decoded(llm).endswith("user\nOnce upon<|im_end|>\n<|im_start|>assistant\n")


def own_messages(messages: Sequence[ChatMessage]) -> str:
    return "|".join(f"{m.role.value}={m.content}" for m in messages)


def own_completion(text: str) -> str:
    return f"<<{text}>>"


def test_own_prompt_functions_take_the_template_s_place(llm: CacheBlendLLM) -> None:
    own = CacheBlendLLM(
        engine=llm.engine, messages_to_prompt=own_messages, completion_to_prompt=own_completion
    )
    own.chat([*HELLO, ChatMessage(role=MessageRole.ASSISTANT, content="Yes")])
    assert decoded(llm) == "user=Hello|assistant=Yes"
    own.complete("Hello")
    assert decoded(llm) == "<<Hello>>"
    own.complete("Hello", formatted=True)
    assert decoded(llm) == "Hello"


def test_system_prompt_is_put_first_and_chunks_are_computed_behind_it(
    engines: list[FakeEngine],
) -> None:
    llm = CacheBlendLLM(model=str(MODEL), system_prompt="Be kind.")
    llm.predict(PromptTemplate("Say {word}"), word="hello")
    assert decoded(llm).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nSay")
    assert llm.blend.config.system_prompt == "Be kind."


def test_a_template_without_a_system_role_starts(engines: list[FakeEngine], tmp_path: Path) -> None:
    llm = CacheBlendLLM(model=str(with_template(tmp_path, NO_SYSTEM)))
    assert text_of(llm.complete("Hello")) == TEXT
    assert llm.metadata.is_chat_model
    assert decoded(llm).endswith("<turn>user\nHello</turn>\n<turn>model")
    with pytest.raises(PromptError, match=r"System role not supported.*messages_to_prompt"):
        llm.chat([ChatMessage(role="system", content="Be brief."), *HELLO])
    llm.close()
    with pytest.raises(ConfigError, match="system_prompt can't be used"):
        CacheBlendLLM(model=str(tmp_path), system_prompt="Be brief.").complete("Hello")


def test_mistral_s_own_tokenizer(engines: list[FakeEngine], tmp_path: Path) -> None:
    folder = with_tekken(tmp_path, MISTRAL_FILES[0])
    llm = CacheBlendLLM(model=str(folder), engine_args={"tokenizer_mode": "mistral"})
    assert llm.metadata.is_chat_model
    llm.chat([ChatMessage(role="system", content="Be brief."), *HELLO])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert sent(llm.blend)[-1].token_ids == own_chat(folder, messages, "mistral")


def test_arguments_of_the_chat_template(engines: list[FakeEngine], tmp_path: Path) -> None:
    folder = with_template(tmp_path, THINKING)
    off = {"enable_thinking": False}
    llm = CacheBlendLLM(model=str(folder), chat_template_kwargs=off)
    llm.chat(HELLO)
    assert llm.blend.config.chat_template_kwargs == off
    assert decoded(llm).endswith("</think>\n\n")
    llm.chat(HELLO, chat_template_kwargs={"enable_thinking": True})
    assert "</think>" not in decoded(llm)
    again = CacheBlendLLM(model=str(folder), sampling={"chat_template_kwargs": off})
    again.chat(HELLO)
    assert decoded(llm).endswith("</think>\n\n")
    with pytest.raises(ConfigError, match="must be a dict"):
        llm.chat(HELLO, chat_template_kwargs="off")


def test_no_secret_is_shown(engines: list[FakeEngine]) -> None:
    config = BlendConfig(store="rediss://me:s3cr3t@one/0")
    llm = CacheBlendLLM(model=str(MODEL), blend_config=config, engine_args={"hf_token": "s3cr3t"})
    assert "s3cr3t" not in f"{llm!r} {llm} {llm.to_dict()} {llm.to_json()} {llm.engine.config}"


def test_bad_prompts(llm: CacheBlendLLM) -> None:
    with pytest.raises(PromptError, match="no messages"):
        llm.chat([])
    with pytest.raises(EmptyTextError):
        llm.complete("", formatted=True)
    with pytest.raises(PromptTooLongError, match="Retrieve fewer"):
        llm.complete("word " * 3000)
    picture = ChatMessage(role="user", blocks=[ImageBlock(image=b"png")])
    with pytest.raises(PromptError, match="ImageBlock"):
        llm.chat([picture])


class Fact(BaseModel):
    """A fact."""

    year: int


async def test_structured_predict_holds_decoding_to_the_schema(
    llm: CacheBlendLLM, engines: list[FakeEngine]
) -> None:
    llm.blend  # noqa: B018 - starts it
    engines[0].answer = ('{"year":', " 1874}")
    prompt, fact = PromptTemplate("When?"), Fact(year=1874)
    assert llm.structured_predict(Fact, prompt) == fact
    assert await llm.astructured_predict(Fact, prompt) == fact
    assert list(llm.stream_structured_predict(Fact, prompt))[-1] == fact
    stream = await llm.astream_structured_predict(Fact, prompt)
    assert [found async for found in stream][-1] == fact
    assert llm.as_structured_llm(Fact).complete("When?").raw == fact
    held = {"json": Fact.model_json_schema()}
    assert [r.sampling["structured_outputs"] for r in sent(llm.blend)] == [held] * 5
    own = {"json_object": True}
    llm.structured_predict(Fact, prompt, llm_kwargs={"structured_outputs": own, "max_tokens": 9})
    last = sent(llm.blend)[-1].sampling
    assert (last["structured_outputs"], last["max_tokens"]) == (own, 9)


# --- events ---------------------------------------------------------------------------------------


class Events(BaseEventHandler):
    seen: list[str] = []  # noqa: RUF012 - a pydantic field

    def handle(self, event: Any, **_: Any) -> None:
        self.seen.append(event.class_name())


@pytest.fixture(scope="module")
def events() -> Events:
    handler = Events()
    get_dispatcher().add_event_handler(handler)
    return handler


async def test_every_call_starts_and_ends_with_an_event(llm: CacheBlendLLM, events: Events) -> None:
    llm.chat(HELLO)
    await llm.achat(HELLO)
    events.seen.clear()
    list(llm.stream_complete("Hello", formatted=True))
    [r async for r in await llm.astream_complete("Hello", formatted=True)]
    list(llm.stream_chat(HELLO))
    [r async for r in await llm.astream_chat(HELLO)]
    completion, chat = (
        [f"LLM{kind}StartEvent", *[f"LLM{kind}InProgressEvent"] * 4, f"LLM{kind}EndEvent"]
        for kind in ("Completion", "Chat")
    )
    assert events.seen == completion * 2 + chat * 2


def test_token_counts_reach_llamaindex_s_counter(llm: CacheBlendLLM) -> None:
    counter = TokenCountingHandler()
    counted = CacheBlendLLM(engine=llm.engine, callback_manager=CallbackManager([counter]))
    list(counted.stream_chat(HELLO))
    assert counter.prompt_llm_token_count == len(sent(llm.blend)[0].token_ids)
    assert counter.completion_llm_token_count == 4


# --- one engine for all ---------------------------------------------------------------------------


def test_the_engine_starts_when_first_needed_and_once(
    llm: CacheBlendLLM, engines: list[FakeEngine]
) -> None:
    again = CacheBlendLLM(model=str(MODEL))
    copies = [llm, again, copy.deepcopy(llm), copy.copy(llm), pickle.loads(pickle.dumps(llm))]
    assert engines == []
    assert {text_of(one.complete("Hello")) for one in copies} == {TEXT}
    assert len(engines) == 1
    assert engines[0].options == {"max_model_len": 2048}


def test_copies_keep_their_settings(llm: CacheBlendLLM) -> None:
    own = CacheBlendLLM(engine=llm.engine, max_tokens=3, messages_to_prompt=own_messages)
    for one in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert (one.max_tokens, one.messages_to_prompt) == (3, own_messages)
    nested = CacheBlendLLM(engine=llm.engine, completion_to_prompt=lambda text: text + "!")
    with pytest.raises(pickle.PicklingError, match="completion_to_prompt"):
        pickle.dumps(nested)
    copied = copy.deepcopy(nested)
    copied.complete("Hello")
    assert decoded(llm) == "Hello!"


def test_other_settings_for_the_same_engine_are_refused(llm: CacheBlendLLM) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len.*2048.*from_engine"):
        CacheBlendLLM(model=str(MODEL), engine_args={"max_model_len": 1024})
    with pytest.raises(ConfigError, match="recompute_ratio"):
        CacheBlendLLM(model=str(MODEL), blend_config=BlendConfig(recompute_ratio=0.5))
    llm.close()
    assert CacheBlendLLM(model=str(MODEL), engine_args={"max_model_len": 1024}).complete("Hello")


def test_after_close_every_call_says_so(llm: CacheBlendLLM, engines: list[FakeEngine]) -> None:
    with llm:
        llm.complete("Hello")
    assert engines[0].closed
    for call in (lambda: llm.complete("Hello"), lambda: llm.metadata):
        with pytest.raises(ClosedError, match="make a new"):
            call()
    with pytest.raises(ClosedError):
        asyncio.run(llm.achat(HELLO))
    llm.close()


def test_from_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    blend = fake_blend(monkeypatch)
    one, two = CacheBlendLLM.from_engine(blend), CacheBlendLLM.from_engine(blend, max_tokens=2)
    assert one.engine is two.engine
    assert text_of(two.complete("Hello")) == "A short"
    assert pickle.loads(pickle.dumps(one)).engine is one.engine


def test_a_model_that_is_not_there() -> None:
    llm = CacheBlendLLM(model="/no/such/folder")
    with pytest.raises(ModelError, match="no model folder"):
        llm.complete("Hello")
    with pytest.raises(ConfigError, match="name a model"):
        CacheBlendLLM()


# --- streams --------------------------------------------------------------------------------------


async def test_leaving_a_stream_early(llm: CacheBlendLLM, engines: list[FakeEngine]) -> None:
    stream = llm.stream_chat(HELLO)
    next(stream)
    stream.close()
    astream = await llm.astream_complete("Hello")
    await anext(astream)
    await astream.aclose()
    del astream
    await asyncio.sleep(0.1)  # LlamaIndex leaves the inner stream to the event loop
    assert engines[0].aborted == 2


# --- what was retrieved and not found -------------------------------------------------------------


def eventually(met: Callable[[], bool]) -> bool:
    for _ in range(100):
        if met():
            return True
        time.sleep(0.05)
    return False


def test_what_is_retrieved_is_brought_nearer(llm: CacheBlendLLM, engines: list[FakeEngine]) -> None:
    nodes = split()[:4]
    watch_retrieval(prefetch=llm.engine)
    Retrieve(nodes).retrieve("?")  # nothing runs yet: nothing happens
    ingest(llm, nodes[:3])
    watch_retrieval(prefetch=llm.engine)
    Retrieve(nodes).retrieve("?")
    stored = engines[0].ingested[-3:]
    assert eventually(lambda: set(engines[0].prefetched) >= set(stored))  # the store has no other
    llm.close()
    Retrieve(nodes).retrieve("?")


def test_report_names_what_was_retrieved_and_is_not_in_the_prompt(
    llm: CacheBlendLLM, caplog: pytest.LogCaptureFixture
) -> None:
    watch_retrieval()
    watch_retrieval()
    nodes = split()[:3]
    ingest(llm, nodes)
    retriever = Retrieve(nodes)
    retriever.retrieve("?")
    texts = [node.get_content() for node in nodes]

    def missing(prompt: str) -> list[str]:
        found = llm.complete(prompt).raw["cacheblend"]["retrieved_not_found"]  # type: ignore[index]
        return [str(name) for name in found]

    assert missing(texts[0]) == [nodes[1].node_id, nodes[2].node_id]
    assert missing(texts[1]) == [nodes[2].node_id]  # as refine asks: one prompt a node
    assert not caplog.records
    engine(llm, nodes, response_mode="simple_summarize").query("?")
    assert "None of the 3 chunks" in caplog.text
    engine(llm, nodes, response_mode="compact").query("?")
    assert len(caplog.records) == 1
