"""Which KV connectors may stand beside ours, under vLLM's MultiConnector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.worker_state import WorkerSide
from cacheblend_rag.reason import Reason, Why

# They hand the KV of one request to one other request, which was told of it. Nobody finds it who
# merely asks the same. Only what was run is here.
HAND_OVER = frozenset({"NixlConnector", "NixlPullConnector"})  # two names of one
_BY_TOKENS = ("ExampleConnector", "LMCacheConnector", "LMCacheConnectorV1", "LMCacheMPConnector")
_INSTEAD = "NixlConnector may stand beside ours"


def all_of(group: Any) -> Sequence[Any]:
    """The connectors of an engine: those within vLLM's MultiConnector, or the only one."""
    return list(getattr(group, "_connectors", ())) or [group]


def ours(group: Any) -> WorkerSide:
    """That of this package, of an engine's connectors."""
    found: WorkerSide = next(c for c in all_of(group) if hasattr(c, "worker_state"))
    return found


def refusal(connector: WorkerSide, group: Any, vllm_config: Any) -> Why | None:
    """Why nothing may be blended beside an engine's other connectors; None if it may.

    Args:
        connector: ours, of a worker.
        group: what vLLM calls: ours, or the connector that holds it.
        vllm_config: the engine's own, not the copy that a connector within another one gets.
    """
    others = [other for other in all_of(group) if other is not connector]
    if not others:
        return None
    for other in others:
        if why_not := _why_not(other):
            return Why(Reason.OTHER_CONNECTORS, f"{why_not}; {_INSTEAD}")
    if not compat.was_run("hand_over"):
        return Why(Reason.OTHER_CONNECTORS, "other connectors beside ours were run on a CPU only")
    # What could not be written must not be read. Within another connector, ours has a copy of the
    # engine's options, and can't set them.
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "fail":
        fix = 'set "kv_load_failure_policy": "fail" beside "kv_connector": "MultiConnector"'
        return Why(Reason.OTHER_CONNECTORS, f"blocks that can't be loaded would be computed: {fix}")
    return None


def _why_not(other: Any) -> str:
    """Why one may not stand beside ours; empty if it may."""
    name = type(other).__name__
    if name in _BY_TOKENS:
        return f"{name} keeps KV by its tokens, and would hand blended KV on as exact"
    if name not in HAND_OVER:
        return f"{name} was not tested beside ours"
    return ""
