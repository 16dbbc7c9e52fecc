"""LlamaIndex over CacheBlend: an LLM, and what computes chunks for it at ingestion."""

from llama_index_cacheblend.ingestion import CacheBlendIngestion
from llama_index_cacheblend.llm import CacheBlendLLM
from llama_index_cacheblend.retrieval import watch_retrieval
from llama_index_cacheblend.vector_store import CacheBlendVectorStore

__all__ = ["CacheBlendIngestion", "CacheBlendLLM", "CacheBlendVectorStore", "watch_retrieval"]
