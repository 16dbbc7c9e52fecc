"""A LlamaIndex ingestion pipeline that keeps KV in step with documents that change."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from llama_index.core import Document
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore

from cacheblend_rag import BlendConfig
from cacheblend_rag.models import embedded_model
from llama_index_cacheblend import CacheBlendIngestion, CacheBlendLLM

DATA = Path(__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M by default")
    args = parser.parse_args()
    documents = [Document(text=p.read_text(), id_=p.stem) for p in sorted(DATA.glob("*.md"))]
    config = BlendConfig(store=(store := TemporaryDirectory()).name)
    with store, CacheBlendLLM(args.model or embedded_model(), blend_config=config) as llm:
        ingestion = CacheBlendIngestion(llm)
        pipeline = IngestionPipeline(
            transformations=[SentenceSplitter(chunk_size=256), ingestion],
            docstore=SimpleDocumentStore(),
            vector_store=SimpleVectorStore(),
            docstore_strategy=DocstoreStrategy.UPSERTS,
        )
        print(len(pipeline.run(documents=documents)), "nodes were new")
        print(len(pipeline.run(documents=documents)), "were new in the second run")
        print(ingestion.forget(documents[0].doc_id), "chunks of one document were forgotten")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
