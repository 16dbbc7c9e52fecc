"""``ChatCacheBlend`` and ``CacheBlendLLM`` beyond LangChain's own suites: settings and refusals."""

from __future__ import annotations

import asyncio
import copy
import pickle
import re
from collections.abc import Mapping
from typing import Any

import pytest
from fake_engine import ANSWER, MODEL, FakeEngine, sent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.load import dumps
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel, ValidationError

from cacheblend_rag import (
    BlendConfig,
    ClosedError,
    ConfigError,
    PromptError,
    PromptTooLongError,
)
from langchain_cacheblend import CacheBlendLLM, ChatCacheBlend

TEXT = "".join(ANSWER)
Model = ChatCacheBlend | CacheBlendLLM


@pytest.fixture(params=[ChatCacheBlend, CacheBlendLLM])
def llm(request: pytest.FixtureRequest, engines: list[FakeEngine]) -> Any:
    return request.param(model=str(MODEL), engine_args={"max_model_len": 2048})


def text_of(answer: Any) -> str:
    return str(answer.content if hasattr(answer, "content") else answer)


async def in_all_ways(llm: Model, **call: Any) -> dict[str, str]:
    return {
        "invoke": text_of(llm.invoke("Hello", **call)),
        "ainvoke": text_of(await llm.ainvoke("Hello", **call)),
        "stream": "".join(text_of(piece) for piece in llm.stream("Hello", **call)),
        "astream": "".join([text_of(piece) async for piece in llm.astream("Hello", **call)]),
        "batch": text_of(llm.batch(["Hello", "Hello"], **call)[1]),
        "abatch": text_of((await llm.abatch(["Hello", "Hello"], **call))[1]),
    }


# --- options --------------------------------------------------------------------------------------


async def test_every_way_answers_the_same_prompt(llm: Model) -> None:
    assert set((await in_all_ways(llm)).values()) == {TEXT}
    assert len({request.token_ids for request in sent(llm.blend)}) == 1


async def test_options_of_the_object_and_of_a_call(llm: Model) -> None:
    own = type(llm)(
        engine=llm.engine, temperature=0.5, max_tokens=2, stop=["x"], sampling={"top_p": 0.9}
    )
    assert set((await in_all_ways(own)).values()) == {"A short"}
    assert set((await in_all_ways(own, stop=[" short"])).values()) == {"A"}
    first, *_, last = sent(llm.blend)
    assert first.sampling == {"temperature": 0.5, "max_tokens": 2, "stop": ["x"], "top_p": 0.9}
    assert last.sampling["stop"] == [" short"]
    own.invoke("Hello", stop=[], mode="off", max_tokens=3)
    assert "stop" not in sent(llm.blend)[-1].sampling
    for where in ("sampling", "extra_body"):
        more = type(llm)(engine=llm.engine, **{where: {"stop": [" answer"]}})
        assert set((await in_all_ways(more)).values()) == {"A short"}
        assert set((await in_all_ways(more, stop=[" short"])).values()) == {"A"}
        assert text_of(more.invoke("Hello", stop=[])) == TEXT


def test_unknown_and_impossible_options_are_refused(llm: Model) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        llm.invoke("Hello", temprature=1)
    with pytest.raises(ConfigError, match="another engine"):
        llm.invoke("Hello", model="other/model")
    with pytest.raises(ConfigError, match="tools"):
        list(llm.stream("Hello", tools=[{}]))
    with pytest.raises(ValidationError, match="temprature"):
        type(llm)(engine=llm.engine, temprature=1)
    with pytest.raises(ValidationError):
        type(llm)(engine=llm.engine, max_tokens=0)
    with pytest.raises(ConfigError, match="name a model"):
        type(llm)()


async def test_timeout(llm: Model) -> None:
    hasty = type(llm)(engine=llm.engine, timeout=1e-9)
    for call in ("invoke", "batch"):
        with pytest.raises(TimeoutError, match="lower max_tokens"):
            getattr(hasty, call)("Hello" if call == "invoke" else ["Hello"])
    with pytest.raises(TimeoutError):
        list(hasty.stream("Hello"))
    with pytest.raises(TimeoutError):
        [piece async for piece in hasty.astream("Hello")]
    with pytest.raises(TimeoutError):
        await hasty.ainvoke("Hello")


def test_tokens_are_the_model_s_own(llm: Model) -> None:
    assert llm.get_num_tokens("Hello there") == len(llm.blend.tokenizer.encode("Hello there"))


# --- names that other models have for the same ----------------------------------------------------


async def test_other_names_for_the_same(llm: Model) -> None:
    own = type(llm)(engine=llm.engine, max_completion_tokens=2, stream_usage=True)
    assert set((await in_all_ways(own)).values()) == {"A short"}
    found = await in_all_ways(llm, max_completion_tokens=1, stream_options={"include_usage": True})
    assert set(found.values()) == {"A"}
    endless = type(llm)(engine=llm.engine, max_tokens=None)
    assert set((await in_all_ways(endless)).values()) == {TEXT}
    assert sent(llm.blend)[-1].sampling["max_tokens"] is None
    llm.invoke("Hello", extra_body={"top_k": 5, "temperature": 0.5}, temperature=0.1)
    assert {"top_k": 5, "temperature": 0.1}.items() <= sent(llm.blend)[-1].sampling.items()
    extra = type(llm)(engine=llm.engine, extra_body={"top_k": 6}, sampling={"top_p": 0.5})
    extra.invoke("Hello")
    assert {"top_k": 6, "top_p": 0.5}.items() <= sent(llm.blend)[-1].sampling.items()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stream_usage": False}, "last piece has its usage"),
        ({"stream_options": {"include_usage": False}}, "last piece has its usage"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "the same thing"),
    ],
)
def test_other_names_with_another_meaning(llm: Model, given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        llm.invoke("Hello", **given)
    with pytest.raises(ConfigError, match=says):
        type(llm)(engine=llm.engine, **given)


def test_arguments_of_the_chat_template(engines: list[FakeEngine]) -> None:
    llm = ChatCacheBlend(model=str(MODEL))
    documents = {"documents": [{"title": "t", "text": "x"}]}  # an argument that all templates take
    for bound in (
        llm.bind(chat_template_kwargs=documents),
        llm.bind(extra_body={"chat_template_kwargs": documents}),
        ChatCacheBlend(engine=llm.engine, chat_template_kwargs=documents),
        ChatCacheBlend(engine=llm.engine, extra_body={"chat_template_kwargs": documents}),
    ):
        assert text_of(bound.invoke("Hello")) == TEXT
    with pytest.raises(ConfigError, match="no argument 'enable_thinking'"):
        llm.invoke("Hello", chat_template_kwargs={"enable_thinking": False})
    llm.close()
    made = ChatCacheBlend(model=str(MODEL), chat_template_kwargs=documents)
    assert made.blend.config.chat_template_kwargs == documents


# --- errors ---------------------------------------------------------------------------------------


async def test_errors_are_the_same_in_every_way(llm: Model) -> None:
    long = "word " * 3000
    for call in (lambda: llm.ainvoke(long), lambda: llm.abatch(["Hello", long])):
        with pytest.raises(PromptTooLongError):
            await call()
    with pytest.raises(ConfigError):
        await llm.ainvoke("Hello", temperatur=1)
    with pytest.raises(PromptError, match="lone surrogate"):
        await llm.ainvoke("caf\udce9")
    wrong = llm.bind(temperatur=1)
    safe = wrong.with_fallbacks([llm.bind(max_tokens=1)], exceptions_to_handle=(ConfigError,))
    assert text_of(safe.invoke("Hello")) == text_of(await safe.ainvoke("Hello")) == "A"


# --- secrets --------------------------------------------------------------------------------------


class Traced(BaseCallbackHandler):
    """What tracers are told when a model is asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(f"{args} {kwargs}")

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(f"{args} {kwargs}")


def test_no_secret_reaches_tracers_and_caches(llm: Model) -> None:
    plain = llm._identifying_params
    llm.close()
    config = BlendConfig(store="rediss://me:s3cr3t@one/0", namespace="acme")
    args = {"hf_token": "s3cr3t"}
    one = type(llm)(model=str(MODEL), blend_config=config, engine_args=args)
    traced = Traced()
    one.invoke("Hello", config={"callbacks": [traced]})
    texts = [
        *traced.seen,
        repr(one),
        str(one._identifying_params),
        dumps(one),
        repr(one.engine.config),
    ]
    assert len(traced.seen) == 1
    assert not [text for text in texts if "s3cr3t" in text]
    other = BlendConfig(store="rediss://me:s3cr3t@two/0")
    with pytest.raises(ConfigError) as error:
        type(llm)(model=str(MODEL), blend_config=other, engine_args={"hf_token": "other"})
    assert "s3cr3t" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        type(llm)(model=str(MODEL), engine_args={"hf_token": "0ther"})
    assert not {"s3cr3t", "0ther"} & set(re.findall(r"\w+", str(error.value)))
    assert one._identifying_params != plain
    kept = pickle.loads(pickle.dumps(one)).engine
    assert kept.config.store == "rediss://me:s3cr3t@one/0"


# --- what comes with an answer --------------------------------------------------------------------


def check_details(found: Mapping[str, Any]) -> None:
    assert found["model_name"] == str(MODEL)
    assert found["finish_reason"] == "stop"
    assert found["cacheblend"]["tokens_total"] > 0
    rows = found["logprobs"]["content"]
    assert [row["logprob"] for row in rows] == [-0.5] * 4
    assert [len(row["top_logprobs"]) for row in rows] == [2] * 4


def test_chat_details(engines: list[FakeEngine]) -> None:
    llm = ChatCacheBlend(model=str(MODEL))
    answer = llm.invoke("Hello", logprobs=2)
    check_details(answer.response_metadata)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 4
    whole = None
    for piece in llm.stream("Hello", logprobs=2):
        whole = piece if whole is None else whole + piece
    assert whole is not None
    check_details(whole.response_metadata)
    assert whole.usage_metadata == answer.usage_metadata


def test_completion_details(engines: list[FakeEngine]) -> None:
    llm = CacheBlendLLM(model=str(MODEL))
    result = llm.generate(["Hello", "Hello there"], logprobs=2)
    for [generation] in result.generations:
        assert generation.generation_info is not None
        check_details(generation.generation_info)
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["completion_tokens"] == 8


# --- one engine for all ---------------------------------------------------------------------------


def test_the_engine_starts_when_first_needed_and_once(
    llm: Model, engines: list[FakeEngine]
) -> None:
    again = type(llm)(model=str(MODEL))
    copies = [llm, again, copy.deepcopy(llm), llm.model_copy(), pickle.loads(pickle.dumps(llm))]
    assert engines == []
    assert {text_of(one.invoke("Hello")) for one in copies} == {TEXT}
    assert len(engines) == 1
    with pytest.raises(ConfigError, match="from_engine"):
        type(llm)(model=str(MODEL), blend_config=BlendConfig(recompute_ratio=0.5))
    llm.close()
    with pytest.raises(ClosedError):
        again.invoke("Hello")
    with pytest.raises(ClosedError):
        asyncio.run(again.ainvoke("Hello"))


def test_langchain_s_cache_tells_settings_apart(llm: Model, engines: list[FakeEngine]) -> None:
    cache = InMemoryCache()
    one = type(llm)(engine=llm.engine, cache=cache)
    two = type(llm)(engine=llm.engine, cache=cache, max_tokens=2)
    assert [text_of(m.invoke("Hello")) for m in (one, one, two)] == [TEXT, TEXT, "A short"]
    assert len(sent(llm.blend)) == 2


# --- refusals of the chat model -------------------------------------------------------------------


@tool
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def test_tools_without_a_parser_are_refused_with_a_way_out(engines: list[FakeEngine]) -> None:
    llm = ChatCacheBlend(model=str(MODEL))
    here, on_a_server = (
        r"engine_args=\{\"tool_call_parser\": \.\.\.\}.*hermes",
        "--tool-call-parser NAME",
    )
    with pytest.raises(ConfigError, match=f"{here}|{on_a_server}"):
        llm.bind_tools([add]).invoke("Add 1 and 2.")
    with pytest.raises(ConfigError, match="what OpenAI's API had before tools"):
        llm.invoke("Hello", functions=[{}])
    with pytest.raises(PromptError, match="pass chat messages"):
        CacheBlendLLM(model=str(MODEL)).invoke("Hello", tools=[add])


def test_pictures_and_too_long_prompts_are_refused(engines: list[FakeEngine]) -> None:
    llm = ChatCacheBlend(model=str(MODEL), engine_args={"max_model_len": 2048})
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(PromptError, match="image_url"):
        llm.invoke([HumanMessage([picture])])
    with pytest.raises(PromptTooLongError, match="Retrieve fewer"):
        llm.invoke("word " * 3000)


# --- structured output ----------------------------------------------------------------------------


class Fact(BaseModel):
    """A fact."""

    year: int


def test_structured_output_holds_decoding_to_the_schema(engines: list[FakeEngine]) -> None:
    llm = ChatCacheBlend(model=str(MODEL))
    llm.blend  # noqa: B018 - starts it
    engines[0].answer = ('{"year":', " 1874}")
    assert llm.with_structured_output(Fact).invoke("When?") == Fact(year=1874)
    assert llm.with_structured_output(Fact.model_json_schema()).invoke("When?") == {"year": 1874}
    given = sent(llm.blend)[0].sampling["structured_outputs"]["json"]
    assert given["properties"]["year"]["type"] == "integer"
    with pytest.raises(ConfigError, match="json_schema"):
        llm.with_structured_output(Fact, method="magic")


def test_structured_output_with_the_raw_message(engines: list[FakeEngine]) -> None:
    llm = ChatCacheBlend(model=str(MODEL))
    llm.blend  # noqa: B018 - starts it
    engines[0].answer = ('{"year": 1874}',)
    found = llm.with_structured_output(Fact, include_raw=True).invoke("When?")
    assert found["parsed"] == Fact(year=1874)
    assert found["raw"].content == '{"year": 1874}'
    assert found["parsing_error"] is None
    engines[0].answer = ('{"year": 18', "74}")  # the parser would make 18 of the first
    short = llm.with_structured_output(Fact, include_raw=True, max_tokens=1)
    found = short.invoke("When?")
    assert found["parsed"] is None
    assert "raise max_tokens" in str(found["parsing_error"])
    with pytest.raises(OutputParserException, match="cut off"):
        llm.with_structured_output({"title": "x", "type": "object"}, max_tokens=1).invoke("When?")
