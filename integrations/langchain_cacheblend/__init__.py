"""LangChain over CacheBlend: chat model, LLM, and what computes chunks for them at ingestion."""

from langchain_cacheblend.chat_models import ChatCacheBlend
from langchain_cacheblend.ingestion import CacheBlendIngestion
from langchain_cacheblend.llms import CacheBlendLLM
from langchain_cacheblend.retrieval import RetrievalHandler
from langchain_cacheblend.vectorstores import CacheBlendVectorStore

__all__ = [
    "CacheBlendIngestion",
    "CacheBlendLLM",
    "CacheBlendVectorStore",
    "ChatCacheBlend",
    "RetrievalHandler",
]
