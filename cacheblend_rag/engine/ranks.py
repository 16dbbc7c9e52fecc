"""Ranks of a tensor parallel group that stay in step, whatever happens to one of them.

A rank that fails between two collectives would leave the others waiting in the next one, and meet
them there in another one. So each thing that ranks do together begins with a vote, and a rank that
fails casts its vote where the others cast theirs: all of them stop at the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from cacheblend_rag.reason import RefusedError

_T = TypeVar("_T")


class PeerError(Exception):
    """Another rank failed; its log has the cause."""


class Ranks:
    """This rank's voice. Votes are among CPUs: no GPU waits for them."""

    def __init__(self) -> None:
        self.alone = get_tensor_model_parallel_world_size() == 1

    def agree(self, *, failed: bool = False) -> None:
        """Come to where all ranks go on together, or stop.

        Raises:
            PeerError: another rank has failed since they last agreed.
        """
        if self._any([failed])[0] and not failed:
            raise PeerError("another rank failed, its log has the cause")

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of ``flags`` are set on any rank."""
        self.agree()
        return self._any(flags)

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Over the ranks, each of which has some of the heads."""
        if self.alone:
            return value
        self.agree()
        total: torch.Tensor = get_tp_group().all_reduce(value)
        return total

    def all_or_none(self, work: Callable[[], _T]) -> _T:
        """``work``, after which all ranks have done theirs, or each raises. A refusal is not voted
        on: ranks refuse by what they have agreed on.
        """
        try:
            result = work()
        except (PeerError, RefusedError):
            raise
        # Whatever it was, the others are told before it goes on, or they would wait for this rank.
        except Exception:
            self.agree(failed=True)
            raise
        self.agree()
        return result

    def _any(self, flags: Sequence[bool]) -> list[bool]:
        if self.alone:
            return list(flags)
        # Over the CPU's group: one over the GPUs would wait for all that they have queued.
        votes = torch.tensor(flags, dtype=torch.int32)
        group = get_tp_group().cpu_group
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group)
        return [bool(vote) for vote in votes.tolist()]
