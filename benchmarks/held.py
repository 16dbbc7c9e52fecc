"""Answers that are held to one which was given, at the model's output layer.

vLLM's V2 model runner takes no logits processors, so this stands between the model and its sampler
in either runner. The engine has to be in this process, and answers one request at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class HeldAnswers:
    """Keeps the logits of one answer, and makes others of the same prompt say its tokens.

    Args:
        tokens: of an answer that are kept and compared.
    """

    def __init__(self, tokens: int) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self._tokens, self._wish, self._number = tokens, "", 0
        self._kept: list[torch.Tensor] = []
        self._compared: list[torch.Tensor] = []
        model = get_kv_transfer_group().rows.handle.model
        self._inner, model.compute_logits = model.compute_logits, self._logits

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Of the answer that is given meanwhile, keep the logits of each token."""
        self._kept = []
        with self._wishing("keep"):
            yield
        assert len(self._kept) == self._tokens, "an answer of another length was given"

    @contextmanager
    def force(self) -> Iterator[list[float]]:
        """Have the answer that is given meanwhile say the kept one's tokens. The list has
        KL(kept || this) of each token afterwards, in nats, over the whole vocabulary.
        """
        self._compared = []
        found = list[float]()
        with self._wishing("force"):
            yield found
        found += torch.stack(self._compared).tolist()
        assert len(found) == self._tokens, "an answer of another length was given"

    @contextmanager
    def _wishing(self, wish: str) -> Iterator[None]:
        self._wish, self._number = wish, 0
        try:
            yield
        finally:
            self._wish = ""

    def _logits(self, hidden_RE: torch.Tensor, *args: Any, **options: Any) -> Any:
        logits_RV = self._inner(hidden_RE, *args, **options)
        # a step that was scheduled ahead of the answer's end comes behind the last token
        if not self._wish or self._number == self._tokens:
            return logits_RV
        assert len(logits_RV) == 1, "another request was in the step"
        number, self._number = self._number, self._number + 1
        if self._wish == "keep":
            self._kept.append(logits_RV[0].float().clone())
            return logits_RV
        from cacheblend_rag.engine.answers import compare

        kept_V = self._kept[number]
        self._compared.append(compare(kept_V, logits_RV[0])[0])
        forced_RV = torch.full_like(logits_RV, -torch.inf)
        return forced_RV.index_fill_(1, kept_V.argmax(0, True), 0.0)
