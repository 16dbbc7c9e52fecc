# mypy: allow-untyped-defs, allow-incomplete-defs
"""Launch a Triton kernel that was launched like this before, without Triton's own preparation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_ALIGNMENT = 16  # bytes, and what whole numbers are divided by: what Triton specialises for
_INT32 = 1 << 31


class Launcher:
    """Launches one kernel. What Triton compiled for one kind of arguments is kept.

    For each launch Triton binds and inspects all arguments, and writes a key of them. For 30
    arguments that takes the host several times as long as the launch itself. A key of our own
    tells the same kinds apart, and more.

    Args:
        kernel: made by ``triton.jit``; its constants are its last parameters.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        values: tuple[torch.Tensor | int | float, ...],
        constants: Mapping[str, Any],
        num_warps: int,
    ) -> Any:
        """Queue the kernel on the current stream.

        Args:
            grid: programs by dimension.
            values: its arguments that are no constants, in order.
            constants: the others, in the order of its parameters.

        Returns:
            The kernel as Triton compiled it, which takes all of its arguments in order; None where
            Triton interprets it.
        """
        kind = (
            torch.cuda.current_device() if torch.cuda.is_available() else -1,
            num_warps,
            *constants.values(),
            *map(_kind, values),
        )
        compiled = self._compiled.get(kind)
        if compiled is not None:
            compiled[grid](*values, *constants.values())
            return compiled
        names = list(self._kernel.arg_names)
        assert list(constants) == names[len(values) :], f"{names} are called in another order"
        # None where Triton interprets the kernel: nothing was compiled then.
        compiled = self._kernel[grid](*values, **constants, num_warps=num_warps)
        if compiled is not None:
            self._compiled[kind] = compiled
        return compiled


def _kind(value: torch.Tensor | int | float) -> object:
    """What Triton may compile anew for: the type, divisibility by 16, the number 1."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % _ALIGNMENT == 0
    if isinstance(value, int):
        return value == 1, value % _ALIGNMENT == 0, -_INT32 <= value < _INT32
    return type(value)
