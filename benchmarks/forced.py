"""A vLLM logits processor that makes a request say given tokens; raw log-probabilities stay."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_KEY = "forced_tokens"  # in SamplingParams.extra_args


class ForcedTokens(AdapterLogitsProcessor):
    """Requests with FORCED_KEY say those tokens, one a step; others are left alone."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Every list of tokens will do."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        forced = (params.extra_args or {}).get(FORCED_KEY)
        if forced is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            keep = forced[min(len(output_ids), len(forced) - 1)]
            value = logits[keep].clone()
            logits.fill_(-torch.inf)
            logits[keep] = value
            return logits

        return force
