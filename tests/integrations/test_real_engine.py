"""Both integrations over a real engine: ids and answers are plain vLLM's, at once or alone."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.base.llms.types import ChatMessage
from llama_matrix import CASES, Calls, engine, ingest, listen, split

from cacheblend_rag import BlendResult, CacheBlend
from langchain_cacheblend import CacheBlendIngestion, ChatCacheBlend
from llama_index_cacheblend import CacheBlendLLM

pytestmark = pytest.mark.vllm

EXACT = {"recompute_ratio": 1.0}
TOKENS = 6


class Plain(NamedTuple):
    ids: tuple[int, ...]
    text: str


def plain(blend: CacheBlend, prompt: str) -> Plain:
    """What vLLM makes of a text that none of our code has seen."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    owner: Any = blend._engine

    async def ask() -> Plain:
        params = SamplingParams(
            max_tokens=TOKENS, temperature=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        name = f"plain-{time.monotonic_ns()}"
        [output] = [o async for o in owner._engine.generate({"prompt": prompt}, params, name)]
        return Plain(tuple(output.prompt_token_ids), output.outputs[0].text)

    return asyncio.run_coroutine_threadsafe(ask(), owner._loop).result()


def rendered(blend: CacheBlend, messages: list[dict[str, str]]) -> str:
    return str(
        blend.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )


@pytest.fixture(scope="module")
def asked() -> Calls:
    return listen()


@pytest.fixture
def results(real: CacheBlend, monkeypatch: pytest.MonkeyPatch) -> list[BlendResult]:
    """What the engine answers from here on, in order; it remembers no prompt of before."""
    owner: Any = real._engine
    asyncio.run_coroutine_threadsafe(owner._engine.reset_prefix_cache(), owner._loop).result()
    seen: list[BlendResult] = []
    finish = real._finish

    def noting(*given: Any) -> BlendResult:
        seen.append(finish(*given))
        return seen[-1]

    monkeypatch.setattr(real, "_finish", noting)
    return seen


ALWAYS = ("compact", "streaming refine")
MATRIX = [
    pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow])
    for name, case in CASES.items()
    if not case.answers  # those need answers that so small a model does not give
]


@pytest.mark.parametrize("name", MATRIX)
def test_ids_and_answers_are_those_of_plain_vllm(
    name: str, real: CacheBlend, asked: Calls, results: list[BlendResult]
) -> None:
    llm = CacheBlendLLM.from_engine(real, max_tokens=TOKENS, sampling=EXACT)
    asked.calls.clear()

    CASES[name].run(llm)

    assert len(results) == len(asked.calls)
    assert any(result.report.blended for result in results)
    given = sorted((result.prompt_token_ids, result.text) for result in results)
    expected = sorted(plain(real, rendered(real, messages)) for messages in asked.calls)
    assert given == expected


def test_chain_answers_as_plain_vllm(real: CacheBlend, results: list[BlendResult]) -> None:
    llm = ChatCacheBlend.from_engine(real, max_tokens=TOKENS, sampling=EXACT)
    texts = [node.get_content() for node in split()[:3]]
    CacheBlendIngestion(real, show_progress=False).engine.ingest(texts, [None] * 3, progress=False)
    prompt = ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}")
    chain = prompt | llm | StrOutputParser()
    values = {"context": "\n\n".join(texts), "question": "Who?"}

    pieces = list(chain.stream(values))

    [result] = results
    assert result.report.blended
    content = f"{values['context']}\n\nQuestion: Who?"
    expected = plain(real, rendered(real, [{"role": "user", "content": content}]))
    assert (result.prompt_token_ids, "".join(pieces)) == expected
    assert len([piece for piece in pieces if piece]) > 2


def questions(llm: CacheBlendLLM) -> list[list[ChatMessage]]:
    """32 different prompts, each over a chunk of its own place."""
    nodes = sorted(split(64), key=lambda node: -len(node.get_content()))[:8]
    ingest(llm, nodes)
    return [
        [ChatMessage(content=f"{nodes[i % 8].get_content()}\n\nQuestion {i}: what is {i}?")]
        for i in range(32)
    ]


async def test_32_streams_at_once(real: CacheBlend) -> None:
    llm = CacheBlendLLM.from_engine(real, max_tokens=16, sampling={**EXACT, "ignore_eos": True})
    prompts = questions(llm)
    order: list[int] = []

    async def ask(number: int) -> str:
        text = ""
        async for response in await llm.astream_chat(prompts[number]):
            text += response.delta or ""
            order.append(number)
        return text

    answers = await asyncio.wait_for(asyncio.gather(*map(ask, range(32))), 120)

    for number in range(0, 32, 8):
        assert answers[number] == llm.chat(prompts[number], mode="full").message.content
    # None is starved: they begin about in the order they came. And they take turns.
    begun = list(dict.fromkeys(order))
    assert max(abs(place - number) for place, number in enumerate(begun)) <= 8
    assert sum(a != b for a, b in itertools.pairwise(order)) > len(order) / 2


async def test_queries_at_once_answer_as_alone(real: CacheBlend) -> None:
    llm = CacheBlendLLM.from_engine(real, max_tokens=TOKENS, sampling=EXACT)
    nodes = split(128)[:4]
    ingest(llm, nodes)
    engines = [engine(llm, [nodes[i % 4]]) for i in range(4)]
    answers = await asyncio.gather(*(e.aquery(f"What is {i}?") for i, e in enumerate(engines)))
    alone = [e.query(f"What is {i}?") for i, e in enumerate(engines)]  # a loop runs: no trouble
    assert [str(a) for a in answers] == [str(a) for a in alone]


def test_many_threads(real: CacheBlend) -> None:
    llm = CacheBlendLLM.from_engine(real, max_tokens=TOKENS, sampling=EXACT)
    prompts = questions(llm)[:8]
    with ThreadPoolExecutor(8) as pool:
        together = [r.message.content for r in pool.map(llm.chat, prompts)]
    assert together == [llm.chat(prompt).message.content for prompt in prompts]


async def idle(blend: CacheBlend) -> bool:
    """Whether the engine comes to rest within some seconds."""
    owner: Any = blend._engine
    for _ in range(100):
        if not owner._engine.output_processor.has_unfinished_requests():
            return True
        await asyncio.sleep(0.05)
    return False


async def test_leaving_a_stream_aborts_it(real: CacheBlend) -> None:
    llm = CacheBlendLLM.from_engine(real, max_tokens=2000, sampling={"ignore_eos": True})
    chat = ChatCacheBlend.from_engine(real, max_tokens=2000, sampling={"ignore_eos": True})
    message = [ChatMessage(content="Count.")]

    stream = llm.stream_chat(message)
    next(stream)
    stream.close()
    assert await idle(real)

    astream = await llm.astream_chat(message)
    await anext(astream)
    await astream.aclose()
    assert await idle(real)

    async for _ in chat.astream("Count."):
        break
    assert await idle(real)

    task = asyncio.create_task(llm.achat(message))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await idle(real)

    with pytest.raises(TimeoutError, match="lower max_tokens"):
        chat.model_copy(update={"timeout": 0.2}).invoke("Count.")
    assert await idle(real)


def test_cache_read_counts_reused_tokens(real: CacheBlend) -> None:
    chat = ChatCacheBlend.from_engine(real, max_tokens=2)
    text = split()[3].get_content()
    CacheBlendIngestion(chat, show_progress=False).engine.ingest([text], [None], progress=False)
    answer = chat.invoke(f"{text}\n\nWhat is new, {time.time()}?")
    report = answer.response_metadata["cacheblend"]
    assert report["blended"]
    assert answer.usage_metadata is not None
    read = answer.usage_metadata["input_token_details"]["cache_read"]
    assert read == report["tokens_reused"] + report["tokens_prefix_cached"] > 64
