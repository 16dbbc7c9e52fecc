"""LangChain over CacheBlend."""
