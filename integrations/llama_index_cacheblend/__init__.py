"""LlamaIndex over CacheBlend: an LLM, and what computes chunks for it at ingestion."""

from llama_index_cacheblend.ingestion import CacheBlendIngestion
from llama_index_cacheblend.llm import CacheBlendLLM

__all__ = ["CacheBlendIngestion", "CacheBlendLLM"]
