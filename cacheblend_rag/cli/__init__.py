"""The command ``cacheblend``: ingest documents, ask, check a model, look into a store, a demo.

People read tables on stdout and progress on stderr. With ``--json``, stdout carries one JSON object
and nothing else; what people read then goes to stderr.
"""

from __future__ import annotations

from cacheblend_rag.cli.main import main

__all__ = ["main"]
