"""vLLM's ExampleConnector, which keeps KV by its tokens, as one that hands it from request to
request: by vLLM's own protocol, as NixlConnector does, and through a folder. Needs vLLM.

Importing it, as each of vLLM's processes does that has one, lets it stand with ours.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
    ExampleConnector,
    ExampleConnectorMetadata,
    align_to_block_size,
)

from cacheblend_rag.engine import connectors

connectors.HAND_OVER |= {"HandOverConnector"}


class HandOverConnector(ExampleConnector):
    """Saves what has ``do_remote_decode``, and loads what has ``do_remote_prefill``."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._live: dict[str, Any] = {}

    def on_new_request(self, request: Any) -> None:
        self._live[request.request_id] = request

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not (request.kv_transfer_params or {}).get("do_remote_prefill"):
            return 0, False
        there = align_to_block_size(len(request.prompt_token_ids) - 1, self._block_size)
        return max(0, there - num_computed_tokens), False

    def build_connector_meta(self, scheduler_output: Any) -> ExampleConnectorMetadata:
        meta = ExampleConnectorMetadata()
        for new in scheduler_output.scheduled_new_reqs:
            params = self._live[new.req_id].kv_transfer_params or {}
            loads = new.req_id in self._requests_need_load
            if not loads and not params.get("do_remote_decode"):
                continue
            name = params["remote_request_id"] if loads else new.req_id
            meta.add_request(
                token_ids=new.prompt_token_ids,
                block_ids=new.block_ids[0],
                block_size=self._block_size,
                is_store=not loads,
                mm_hashes=[name],  # a part of what files are called
            )
        self._requests_need_load.clear()
        return meta

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._live.pop(request.request_id, None)
        if not (request.kv_transfer_params or {}).get("do_remote_decode"):
            return False, None
        return False, {"do_remote_prefill": True, "remote_request_id": request.request_id}
