"""GDSF with admission: for stores that are filled by use, not by ingestion."""

from __future__ import annotations

from typing import ClassVar

from cacheblend_rag.store.evict.gdsf import GDSF


class StrictGDSF(GDSF):
    """As GDSF, but a chunk that is colder than what it would push out is not even written. It gets
    in once it was put often enough; what is ingested ahead of use may stay out of a full store.
    """

    name: ClassVar[str] = "gdsf-strict"
    refuses: ClassVar[bool] = True
