"""The endpoints under ``/v1/cacheblend`` of vLLM's own server. Only this folder imports FastAPI.

``plugin.py`` is found by vLLM as an entry point; ``cacheblend serve`` starts the server.
"""
