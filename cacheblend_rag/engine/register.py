"""vLLM's general plugin: found by its entry point, called in each of vLLM's processes."""

from __future__ import annotations

NAME = "CacheBlendConnector"


def register() -> None:
    """Make the connector known by its name, so that ``--kv-transfer-config`` needs no module path.
    Does nothing on a second call.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "cacheblend_rag.engine.connector", NAME)
