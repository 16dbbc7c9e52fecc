"""``llama_index_cacheblend`` under the name that LlamaIndex gives to its LLMs."""

from llama_index_cacheblend import (
    CacheBlendIngestion,
    CacheBlendLLM,
    CacheBlendVectorStore,
    watch_retrieval,
)

__all__ = ["CacheBlendIngestion", "CacheBlendLLM", "CacheBlendVectorStore", "watch_retrieval"]
