"""Whether a model's weights are those that it was started with.

vLLM can have them changed in the running engine. What was computed with the old ones is of another
model then, and the fingerprint, which is made of files, does not tell. So a sample of all weights
is kept, and compared where it matters.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cacheblend_rag.engine.ranks import Ranks
from cacheblend_rag.reason import Reason, Why

CHANGED = Why(
    Reason.WEIGHTS_CHANGED,
    "the model's weights were changed since the engine started. Restart it with the new ones",
)
_SUSPECT = Why(
    Reason.NOT_READY, "vLLM's caches were reset: whether the model's weights changed is looked up"
)
_SAMPLES = 128  # bytes of each tensor


class Weights:
    """Those of a model, as they are when this is made.

    Args:
        model: the part of it that this rank has.
        ranks: that have the others. All of them ask together.
        moves_experts: vLLM exchanges experts between ranks. Those are not looked at.
        moves_layers: vLLM brings layers' weights as a forward needs them. Those are not looked at,
            but what is before and behind the layers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ranks: Ranks,
        *,
        moves_experts: bool = False,
        moves_layers: bool = False,
    ) -> None:
        self._model, self._ranks = model, ranks
        moved = {"experts": moves_experts, "layers": moves_layers}
        self._moved = {part for part, is_moved in moved.items() if is_moved}
        self._first = self._sample()

    def are_changed(self) -> bool:
        """Whether any byte of the sample is another one, on any rank; waits for a GPU."""
        return self._ranks.any([self._sample() != self._first])[0]

    def _sample(self) -> bytes:
        by_device: dict[torch.device, list[torch.Tensor]] = {}
        for some in self._some():
            by_device.setdefault(some.device, []).append(some)
        # One copy a device, not one a tensor.
        return b"".join(torch.cat(some).cpu().numpy().tobytes() for some in by_device.values())

    def _some(self) -> Iterator[torch.Tensor]:
        """Bytes of each tensor, spread over it."""
        for name, tensor in self._model.named_parameters():
            if self._moved.intersection(name.split(".")):
                continue
            storage = tensor.untyped_storage()
            count = storage.nbytes()
            if count and not tensor.is_meta:
                # By storage: a transposed weight would have to be copied to be looked at in order.
                # An odd step, or only one byte of each number would be seen.
                every = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                yield every[:: max(1, count // _SAMPLES) | 1][:_SAMPLES]


class Suspicion:
    """The scheduler's side: after vLLM's caches were reset, nothing is blended until the workers
    have said whether the weights were changed.
    """

    def __init__(self) -> None:
        self._number = 0  # of the resets
        self._asked = self._answered = 0  # for which of them
        self._are_changed = False

    def fault(self, of_plans: Why | None) -> Why | None:
        """Why nothing is blended now, even if it was planned; None where weights are no reason.

        ``of_plans``: why nothing is planned: an ingestion looks at the weights, too.
        """
        is_known = of_plans is not None and of_plans.reason is CHANGED.reason
        if self._are_changed or is_known:
            return CHANGED
        return _SUSPECT if self._answered < self._number else None

    def begin(self) -> None:
        """The caches were reset."""
        self._number += 1

    def ask(self, *, has_rows: bool) -> int:
        """The number of the reset for which the workers are to answer with this step; 0: of none.

        ``has_rows``: the step computes something. Others are made while an engine is paused, before
        its weights are changed, or sleeps and has none.
        """
        if not has_rows or self._asked == self._number:
            return 0
        self._asked = self._number
        return self._number

    def take(self, number: int, *, changed: bool) -> None:
        """An answer came."""
        self._answered = max(self._answered, number)
        self._are_changed |= changed
