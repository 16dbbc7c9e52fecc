"""A logits processor that compares answers inside the engine, where their logits are.

A request names what it wants in ``SamplingParams.extra_args[KEY]``, an answer of the same prompt
being the one it is held against:

- ``keep``: a plain answer, whose float32 logits are kept for each of its first ``LAST`` tokens;
- ``compare``: another answer of that prompt; it is compared while it says the same tokens;
- ``force``: made to say the kept answer's tokens (its arg-maxima), and compared at each.

Compared is the whole vocabulary: KL(kept || this) in nats, computed in float64 from the raw logits,
before any temperature or penalty, and whether both have the same most likely token. Only these two
numbers a token leave the device. Prompts are told apart by a digest of their token ids.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "cacheblend_answer"  # in SamplingParams.extra_args
PROCESSOR = f"{__name__}:AnswerComparison"  # for vLLM's engine argument logits_processors
WISHES = ("keep", "compare", "force")
LAST = 32  # tokens of an answer that are kept and compared


@dataclass
class _Kept:
    """One prompt's kept answer, and what the answer compared with it last came to."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # token number -> [vocab]
    compared: dict[int, torch.Tensor] = field(default_factory=dict)  # -> [KL, same arg-max]


_KEPT: dict[str, _Kept] = {}  # of this process, by prompt; the RPCs below reach it


def digest(prompt_ids: Sequence[int]) -> str:
    """What a prompt is known by."""
    return hashlib.sha256(array("q", prompt_ids).tobytes()).hexdigest()


def take_compared(prompts: Sequence[str]) -> list[list[tuple[float, bool]]]:
    """Of each prompt's last compared answer: KL and same arg-max, a token; then they are gone."""
    taken = []
    for prompt in prompts:
        kept = _KEPT.get(prompt, _Kept())
        rows = [kept.compared[i].tolist() for i in sorted(kept.compared)]
        kept.compared = {}
        taken.append([(row[0], bool(row[1])) for row in rows])
    return taken


def drop(prompts: Sequence[str]) -> None:
    """Free what was kept of these prompts."""
    for prompt in prompts:
        _KEPT.pop(prompt, None)


class AnswerComparison(AdapterLogitsProcessor):
    """Requests without ``KEY`` are left alone."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for a wish that does not exist."""
        wish = (sampling_params.extra_args or {}).get(KEY)
        if wish is not None and wish not in WISHES:
            raise ValueError(f"{KEY} is {wish!r}; it must be one of {', '.join(WISHES)}")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[..., torch.Tensor] | None:
        wish = (params.extra_args or {}).get(KEY)
        return None if wish is None else _Watch(wish)


class _Watch:
    """One request's. A step whose token vLLM drops (a part of a prompt) is simply done again."""

    def __init__(self, wish: str) -> None:
        self._wish = wish
        self._kept: _Kept | None = None

    def __call__(
        self, prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor
    ) -> torch.Tensor:
        if self._kept is None:
            self._kept = _KEPT.setdefault(digest(prompt_ids), _Kept())
        return self._step(self._kept, len(output_ids), logits)

    def _step(self, kept: _Kept, number: int, logits: torch.Tensor) -> torch.Tensor:
        if self._wish == "keep":
            if number < LAST:
                kept.logits[number] = logits.float().clone()
            return logits
        full = kept.logits.get(number)
        if full is None:
            return logits
        kept.compared[number] = compare(full, logits)
        if self._wish == "force":
            logits = torch.full_like(logits, -torch.inf).index_fill_(0, full.argmax(0, True), 0.0)
        return logits


def compare(full_V: torch.Tensor, other_V: torch.Tensor) -> torch.Tensor:
    """float64 [2] from two rows of logits [V]: KL(full || other) in nats, and 1 where both have the
    same most likely token. What no answer can contain (-inf in ``full_V``) adds nothing.
    """
    full, other = full_V.double().log_softmax(0), other_V.double().log_softmax(0)
    terms = torch.where(full.isneginf(), 0.0, full.exp() * (full - other))
    same = full_V.argmax() == other_V.argmax()
    return torch.stack([terms.sum(), same.double()])
