"""LlamaIndex over CacheBlend: an LLM for query and chat engines, and what computes chunks for it."""

from llama_index_cacheblend.ingestion import CacheBlendIngestion
from llama_index_cacheblend.llm import CacheBlendLLM

__all__ = ["CacheBlendIngestion", "CacheBlendLLM"]
