"""LlamaIndex's and LangChain's classes with ``url=``: what they do with an engine here, they do
with a server.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Fault
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.messages import HumanMessage
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Document as LlamaDocument
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import ChatMessage
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TextNode
from servers import free_port

import langchain_cacheblend
import llama_index_cacheblend
from cacheblend_rag import (
    BlendConfig,
    CacheBlend,
    ClosedError,
    ConfigError,
    PromptError,
    ServerError,
)
from cacheblend_rag.client import SharedServer
from cacheblend_rag.shared import SharedEngine
from langchain_cacheblend import ChatCacheBlend
from llama_index_cacheblend import CacheBlendLLM

OVER_HTTP = (
    "langchain_ingestion",
    "langchain_models",
    "llama_index_errors",
    "llama_index_ingestion",
    "llama_index_llm",
)
ROOT = Path(__file__).parents[2]
STORY = "The story of {}. " * 12
DOCUMENTS = [Document(page_content=STORY.replace("{}", n), id=n) for n in "abc"]


@pytest.fixture
def server(server: FakeServer) -> Iterator[FakeServer]:
    yield server
    SharedEngine.close_all()


# ---- LangChain -----------------------------------------------------------------------------------


async def test_langchains_chat_model(server: FakeServer) -> None:
    chat = ChatCacheBlend(url=server.url, max_tokens=9)
    message = chat.invoke("Hello")
    assert message.text == "A short answer."
    assert message.response_metadata["cacheblend"]["reason"] == "no_chunk_found"
    assert message.response_metadata["model_name"] == server.blend.info.model
    assert message.usage_metadata is not None
    assert [piece.text for piece in chat.stream("Hello")] == ["A", " short", " answer", "."]
    assert (await chat.ainvoke("Hello")).text == message.text
    assert [piece.text async for piece in chat.astream("Hello")][:2] == ["A", " short"]
    assert server.bodies[0]["max_tokens"] == 9
    with_logprobs = chat.invoke([HumanMessage("Hello")], logprobs=1)
    assert len(with_logprobs.response_metadata["logprobs"]["content"]) == 4


async def test_langchains_llm(server: FakeServer) -> None:
    llm = langchain_cacheblend.CacheBlendLLM(url=server.url)
    assert llm.invoke("Hello") == await llm.ainvoke("Hello") == "A short answer."
    assert len(llm.generate(["one", "two"]).generations) == 2
    assert llm.get_token_ids("Hello ship") == server.blend.tokenizer.encode("Hello ship")


def test_structured_output_reaches_the_server(server: FakeServer, behind: CacheBlend) -> None:
    engine: Any = behind.engine
    engine.answers.append('{"year": 1874}')
    schema = {"title": "Year", "type": "object", "properties": {"year": {"type": "integer"}}}
    answer = ChatCacheBlend(url=server.url).with_structured_output(schema).invoke("When?")
    assert answer == {"year": 1874}
    assert server.bodies[0]["structured_outputs"]["json"] == schema


def test_langchains_vector_store_keeps_kv_in_step(server: FakeServer, behind: CacheBlend) -> None:
    chat = ChatCacheBlend(url=server.url)
    ingestion = langchain_cacheblend.CacheBlendIngestion(chat, show_progress=False)
    inner = InMemoryVectorStore(DeterministicFakeEmbedding(size=8))
    store = langchain_cacheblend.CacheBlendVectorStore(inner, ingestion)
    store.add_documents(DOCUMENTS)
    assert behind.stored() == {behind.key(d.page_content) for d in DOCUMENTS}
    store.delete(["a"])
    assert behind.stored() == {behind.key(d.page_content) for d in DOCUMENTS[1:]}
    prompt = f"{DOCUMENTS[1].page_content}\n\nWhat is this?"
    assert chat.invoke(prompt).response_metadata["cacheblend"]["blended"]


# ---- event loops ---------------------------------------------------------------------------------


async def llama_index_pieces(url: str) -> list[str | None]:
    stream = await CacheBlendLLM(url=url).astream_chat([ChatMessage(content="Hello")])
    return [response.delta async for response in stream]


async def chat_pieces(url: str) -> list[str | None]:
    return [str(piece.text) async for piece in ChatCacheBlend(url=url).astream("Hello", logprobs=1)]


async def llm_pieces(url: str) -> list[str | None]:
    return [piece async for piece in langchain_cacheblend.CacheBlendLLM(url=url).astream("Hello")]


async def whole_answers(url: str) -> list[str | None]:
    """Whose log-probabilities have the server's tokenizer name tokens."""
    asked = [
        ChatCacheBlend(url=url).ainvoke("Hello", logprobs=1),
        langchain_cacheblend.CacheBlendLLM(url=url).ainvoke("Hello", logprobs=1),
        CacheBlendLLM(url=url).acomplete("Hello", logprobs=1),
    ]
    return ["A", " short", *map(str, await asyncio.gather(*asked))]


@pytest.mark.parametrize("ask", [llama_index_pieces, chat_pieces, llm_pieces, whole_answers])
async def test_a_server_that_is_slow_to_tell_holds_up_no_event_loop(
    server: FakeServer, ask: Callable[[str], Awaitable[list[str | None]]]
) -> None:
    assert CacheBlendLLM(url=server.url).metadata  # which LlamaIndex asks for first
    beats = list[float]()

    async def beat() -> None:
        while True:
            beats.append(time.monotonic())
            await asyncio.sleep(0.01)

    server.slow = {"requests": 0.6, "detokenize": 0.6, "tokenize": 0.6}
    beside = asyncio.ensure_future(beat())
    pieces = await ask(server.url)
    beside.cancel()
    assert pieces[:2] == ["A", " short"]
    gaps = [later - before for before, later in itertools.pairwise(beats)]
    assert len(gaps) > 20 and max(gaps) < 0.4


# ---- LlamaIndex ----------------------------------------------------------------------------------


async def test_llama_indexs_llm(server: FakeServer) -> None:
    llm = CacheBlendLLM(url=server.url)
    assert llm.metadata.context_window == server.blend.info.max_model_len
    assert llm.metadata.is_chat_model
    messages = [ChatMessage(content="Hello")]
    assert llm.complete("Hello").text == (await llm.acomplete("Hello")).text == "A short answer."
    assert llm.chat(messages).raw["cacheblend"]["mode"] == "blend"  # type: ignore[index]
    assert [r.delta for r in llm.stream_chat(messages)] == ["A", " short", " answer", "."]
    assert [r.delta async for r in await llm.astream_chat(messages)][:1] == ["A"]
    assert llm.encode("Hello") == server.blend.tokenizer.encode("Hello")


def test_llama_indexs_ingestion(server: FakeServer, behind: CacheBlend) -> None:
    llm = CacheBlendLLM(url=server.url)
    hook = llama_index_cacheblend.CacheBlendIngestion(llm, show_progress=False)
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=64, chunk_overlap=0), hook]
    )
    document = LlamaDocument(text=STORY.replace("{}", "d"), doc_id="d")
    nodes = pipeline.run(documents=[document], show_progress=False)
    assert behind.stored() == {behind.key(hook.text_of(node)) for node in nodes}
    assert behind.registered_documents(["d"]) == {"d"}
    assert hook.forget("d") == len({hook.text_of(node) for node in nodes})
    assert not behind.stored()
    with pytest.raises(PromptError, match="never ingested"):
        hook.forget("d")
    assert hook.ingest([TextNode(text=STORY)]).computed == 1


def test_the_servers_ingest_prefix_counts(server: FakeServer, behind: CacheBlend) -> None:
    """The server computes chunks behind their documents, so it is told what stands before them."""
    hook = llama_index_cacheblend.CacheBlendIngestion(
        CacheBlendLLM(url=server.url), show_progress=False
    )
    texts = [STORY.replace("{}", name) for name in "xy"]
    nodes = [TextNode(text=text, id_=str(i)) for i, text in enumerate(texts)]
    engine: Any = behind.engine
    engine.behind.clear()
    hook.ingest(nodes)
    alone = set(engine.behind.values())
    assert len(alone) == 1  # nothing is known of what stands before them
    server.reset()
    langchain_cacheblend.CacheBlendIngestion(
        ChatCacheBlend(url=server.url), show_progress=False
    ).ingest([Document(page_content=t, metadata={"source": "s"}) for t in texts])
    assert engine.behind[behind.key(texts[1])] not in alone


# ---- one server for all --------------------------------------------------------------------------


def test_objects_of_a_server_share_it_and_say_so_when_it_is_left(server: FakeServer) -> None:
    first, second = ChatCacheBlend(url=server.url), CacheBlendLLM(url=server.url + "/v1")
    assert first.engine is second.engine is copy.deepcopy(first).engine
    assert ChatCacheBlend(url=server.url, timeout=5).engine is not first.engine
    first.close()
    with pytest.raises(ClosedError):
        second.complete("Hello")
    assert ChatCacheBlend(url=server.url).invoke("Hello").text


def test_a_model_that_is_named_needs_no_server_yet() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    chat = ChatCacheBlend("some/model", url=url)
    with pytest.raises(ServerError, match="no server answers"):
        chat.invoke("Hello")
    with pytest.raises(ServerError, match="no server answers"):
        CacheBlendLLM(url=url)


def test_another_model_than_the_servers_is_refused(server: FakeServer) -> None:
    assert ChatCacheBlend("served-name", url=server.url).invoke("Hello").text
    with pytest.raises(ConfigError, match=r"serves .*served-name, not another/model"):
        ChatCacheBlend("another/model", url=server.url).invoke("Hello")
    with pytest.raises(ConfigError, match="not an-adapter"):
        ChatCacheBlend("an-adapter", url=server.url, timeout=3).invoke("Hello")


@pytest.mark.parametrize("kind", [ChatCacheBlend, CacheBlendLLM])
def test_an_engine_of_ones_own_and_a_server_is_one_too_many(kind: Any, server: FakeServer) -> None:
    with pytest.raises(ConfigError, match="engine_args"):
        kind(url=server.url, engine_args={"max_model_len": 9})
    with pytest.raises(ConfigError, match="name a model"):
        kind()


def test_keys_are_sent_and_not_shown(server: FakeServer) -> None:
    server.api_key = "secret-1"
    chat = ChatCacheBlend(url=server.url, api_key="secret-1")
    llm = CacheBlendLLM(url=server.url, api_key="secret-1")
    assert chat.invoke("Hello").text
    assert llm.complete("Hello").text
    shown = f"{chat!r}{llm!r}{llm.to_dict()}{chat._identifying_params}"
    assert "secret-1" not in shown
    with pytest.raises(ConfigError, match="API key"):
        ChatCacheBlend(url=server.url)


def test_a_configuration_of_requests(server: FakeServer) -> None:
    chat = ChatCacheBlend(url=server.url, blend_config=BlendConfig(mode="off"))
    assert chat.invoke("Hello").response_metadata["cacheblend"]["reason"] == "mode"
    assert ChatCacheBlend(url=server.url).engine is not chat.engine


def test_identity_follows_server_keys_and_store(server: FakeServer) -> None:
    shared = SharedServer.at(server.url)
    assert shared.identity() == shared.identity()
    other = SharedServer.at(server.url, timeout=7)
    assert other.identity() != shared.identity()  # memory: nobody says whether it was emptied


def test_a_front_that_is_connected_already(server: FakeServer) -> None:
    with CacheBlend.connect(server.url) as remote:
        chat, llm = ChatCacheBlend.from_engine(remote), CacheBlendLLM.from_engine(remote)
        assert chat.engine is llm.engine
        assert chat.invoke("Hello").text == llm.complete("Hello").text
        assert chat.engine.identity()
        assert pickle.loads(pickle.dumps(llm)).complete("Hello").text
        hook = llama_index_cacheblend.CacheBlendIngestion(remote, show_progress=False)
        assert hook.ingest([TextNode(text=STORY)]).computed == 1


def test_pickles_connect_in_another_process(server: FakeServer, tmp_path: Path) -> None:
    llm = CacheBlendLLM(url=server.url, blend_config=BlendConfig(mode="off"))
    again = pickle.loads(pickle.dumps(llm))
    assert again.engine is llm.engine
    (tmp_path / "llm").write_bytes(pickle.dumps(llm))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).complete('Hello').text)"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "llm"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "A short answer.\n"


async def test_a_server_that_is_busy_for_a_moment(server: FakeServer) -> None:
    chat = ChatCacheBlend(url=server.url)
    server.next("/completions", Fault(429), Fault(429))
    assert (await asyncio.gather(chat.ainvoke("Hello"), chat.ainvoke("Hello")))[1].text


@pytest.mark.slow
def test_the_tests_of_the_integrations_hold_over_http() -> None:
    """Those about models and ingestion, each fake engine behind a server: see ``over_http.py``."""
    files = [str(ROOT / f"tests/integrations/test_{name}.py") for name in OVER_HTTP]
    options = ["-q", "-x", "-p", "over_http", "-p", "no:cacheprovider", "--timeout=60"]
    path = os.pathsep.join([str(ROOT / "tests/helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
