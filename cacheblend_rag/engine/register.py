"""vLLM's general plugin: found by its entry point, called in each of vLLM's processes."""

from __future__ import annotations

NAMES = ("CacheBlendConnector", "CacheBlendHybridConnector")


def register() -> None:
    """Make the connectors known by their names, so that ``--kv-transfer-config`` needs no module
    path. Does nothing on a second call.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in NAMES:
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "cacheblend_rag.engine.connector", name)
