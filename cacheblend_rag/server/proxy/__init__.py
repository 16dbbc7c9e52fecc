"""A proxy in front of any OpenAI-compatible servers, which sends requests where their text is warm.

``app.py`` puts the parts together. ``cacheblend route`` starts it; vLLM is not needed.
"""
