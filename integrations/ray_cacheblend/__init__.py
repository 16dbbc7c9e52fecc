"""CacheBlend on Ray: ingestion as a step of Ray Data, serving on Ray Serve LLM."""

from ray_cacheblend.ingestion import HttpIngestor, Ingestor, ingest, totals

__all__ = ["HttpIngestor", "Ingestor", "ingest", "totals"]
