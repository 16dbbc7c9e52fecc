"""Selection by KV deviation: the CacheBlend paper's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cacheblend_rag.select.base import Evidence, KVDeviation, Selector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class HKVDSelector(Selector):
    """Recompute the tokens of highest KV deviation (CacheBlend, section 4.2).

    All tokens are prefilled through the layers below ``check_layer``; there, the squared distance
    between their fresh keys and the reused ones is the score. Layer 0 is exact, so layer 1 is the
    first that tells something.

    Attributes:
        check_layer: where the deviation is measured.
        deviation: ``k`` (keys, as released implementations do) or ``kv`` (keys and values).
    """

    name: ClassVar[str] = "hkvd"
    check_layer: int = 1
    deviation: Literal["k", "kv"] = "k"

    def validate(self) -> None:
        if self.check_layer < 1:
            raise ValueError("check_layer must be at least 1: layer 0 has no deviation")
        if self.deviation not in ("k", "kv"):
            raise ValueError(f"deviation must be 'k' or 'kv', got {self.deviation!r}")

    @property
    def evidence(self) -> KVDeviation:
        return KVDeviation(self.check_layer, self.deviation == "kv")

    def score(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.deviation_N is not None
        return evidence.deviation_N
