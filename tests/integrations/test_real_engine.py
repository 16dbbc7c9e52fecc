"""Both integrations over a real engine: ids and answers are plain vLLM's, at once or alone."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_matrix import CHAINS, document_prompt, documents
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.schema import BaseNode
from llama_matrix import CASES, HELD_TOKENS, Calls, engine, ingest, listen, split

from cacheblend_rag import BlendResult, CacheBlend
from langchain_cacheblend import CacheBlendIngestion, ChatCacheBlend
from langchain_cacheblend import CacheBlendLLM as Completion
from llama_index_cacheblend import CacheBlendLLM

pytestmark = pytest.mark.vllm

EXACT = {"recompute_ratio": 1.0}
TOKENS = 6


class Plain(NamedTuple):
    ids: tuple[int, ...]
    text: str


def plain(blend: CacheBlend, prompt: str, **options: Any) -> Plain:
    """What vLLM makes of a text that none of our code has seen."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    owner: Any = blend._engine
    if "structured_outputs" in options:
        options["structured_outputs"] = StructuredOutputsParams(**options["structured_outputs"])
    options = {"max_tokens": TOKENS, "temperature": 0, **options}

    async def ask() -> Plain:
        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **options)
        name = f"plain-{time.monotonic_ns()}"
        [output] = [o async for o in owner._engine.generate({"prompt": prompt}, params, name)]
        return Plain(tuple(output.prompt_token_ids), output.outputs[0].text)

    return asyncio.run_coroutine_threadsafe(ask(), owner._loop).result()


def rendered(blend: CacheBlend, messages: list[dict[str, str]]) -> str:
    return str(
        blend.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )


def plainly(blend: CacheBlend, asked: Calls, held_to: str = "", **options: Any) -> list[Plain]:
    """What vLLM makes of what LlamaIndex asked, by itself and one after the other."""
    found = []
    for messages, tokens in zip(asked.calls, asked.tokens, strict=True):
        held = {"structured_outputs": {"choice": [held_to]}} if tokens == HELD_TOKENS else {}
        given = {"max_tokens": tokens, **options, **held}
        found.append(plain(blend, rendered(blend, messages), **given))
    return found


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


def few(names: Iterable[str], always: Sequence[str]) -> list[Any]:
    """All of them, but only some without the slow tests."""
    return [pytest.param(n, marks=[] if n in always else [pytest.mark.slow]) for n in names]


@pytest.mark.parametrize("name", few(CASES, ("compact", "router")))
def test_ids_and_answers_are_those_of_plain_vllm(
    name: str, real: CacheBlend, asked: Calls, results: list[BlendResult]
) -> None:
    llm = CacheBlendLLM.from_engine(real, max_tokens=TOKENS, sampling=EXACT)
    asked.clear()

    CASES[name].run(llm)

    assert any(result.report.blended for result in results)
    given = sorted((result.prompt_token_ids, result.text) for result in results)
    assert given == sorted(plainly(real, asked, CASES[name].answer))


class Prompts(BaseCallbackHandler):
    """Notes what LangChain gives to a model, as text."""

    def __init__(self, blend: CacheBlend) -> None:
        self.blend, self.texts = blend, list[str]()

    def on_llm_start(self, _: Any, prompts: list[str], **__: Any) -> None:
        self.texts += prompts

    def on_chat_model_start(self, _: Any, messages: list[list[BaseMessage]], **__: Any) -> None:
        roles = {"human": "user", "ai": "assistant", "system": "system"}
        for row in messages:
            plain = [{"role": roles[m.type], "content": str(m.content)} for m in row]
            self.texts.append(rendered(self.blend, plain))


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
@pytest.mark.parametrize("name", few(CHAINS, ("LCEL, streaming",)))
def test_ids_and_answers_of_chains_are_those_of_plain_vllm(
    name: str, real: CacheBlend, results: list[BlendResult]
) -> None:
    prompts = Prompts(real)
    given: dict[str, Any] = {"max_tokens": TOKENS, "sampling": EXACT, "callbacks": [prompts]}
    chat, llm = ChatCacheBlend.from_engine(real, **given), Completion.from_engine(real, **given)
    CacheBlendIngestion(
        chat, document_prompt=document_prompt(name), show_progress=False
    ).transform_documents(documents())

    CHAINS[name](chat, llm)

    assert any(result.report.blended for result in results)
    expected = sorted(plain(real, text) for text in prompts.texts)
    assert sorted((result.prompt_token_ids, result.text) for result in results) == expected


def test_a_chain_streams_the_answer_of_plain_vllm(
    real: CacheBlend, results: list[BlendResult]
) -> None:
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


# --- at once --------------------------------------------------------------------------------------


def longest_chunks(llm: CacheBlendLLM) -> list[BaseNode]:
    """Eight small chunks, ingested."""
    nodes = sorted(split(64), key=lambda node: -len(node.get_content()))[:8]
    ingest(llm, nodes)
    return nodes


@pytest.mark.slow
async def test_32_queries_at_once(real: CacheBlend, asked: Calls) -> None:
    llm = CacheBlendLLM.from_engine(real, max_tokens=16, sampling={**EXACT, "ignore_eos": True})
    engines = [engine(llm, [node], streaming=True) for node in longest_chunks(llm)]
    asked.clear()
    order: list[int] = []  # whose piece came, one after the other

    async def ask(number: int) -> str:
        answer = await engines[number % 8].aquery(f"Question {number}: what is {number}?")
        text = ""
        async for piece in answer.async_response_gen():
            text += piece
            order.append(number)
        return text

    answers = await asyncio.wait_for(asyncio.gather(*map(ask, range(32))), 240)

    expected = {}
    for messages, alone in zip(asked.calls, plainly(real, asked, ignore_eos=True), strict=True):
        [number] = re.findall(r"Question (\d+):", messages[-1]["content"])
        expected[int(number)] = alone.text
    assert dict(enumerate(answers)) == expected
    # None is starved: they begin about in the order they came, and none that has begun waits while
    # others get much further. And they take turns.
    begun = list(dict.fromkeys(order))
    assert max(abs(place - number) for place, number in enumerate(begun)) <= 8
    for number in range(32):
        places = [place for place, other in enumerate(order) if other == number]
        assert max(b - a for a, b in itertools.pairwise(places)) <= 3 * 32
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
    prompts = [
        [ChatMessage(content=f"{node.get_content()}\n\nQuestion {i}: what is {i}?")]
        for i, node in enumerate(longest_chunks(llm))
    ]
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
