"""How many rows of blends a step takes, on a GPU.

More blends together save a GPU little: it computes each one's rows. And they cost. A step above
vLLM's captured sizes is launched kernel by kernel, and each blend adds kernels to each layer. Those
fill the queue of launches. Then the host waits for the GPU where it could begin the blends that
follow, and the GPU waits for the host afterwards. Streams and first tokens wait for the whole step.
So the blends of a step are few. The others come with the next one, which vLLM builds while this one
runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_LEAST_ROWS = 2048  # the largest step that ``start.graph_sizes`` has captured


class Room:
    """The rows of blends under way, by request.

    Args:
        most: rows at a time, unless one blend has more by itself; None: any number.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._rows: dict[str, int] = {}
        self._is_full = False  # for the step being built

    def has(self, rows: int) -> bool:
        """Whether a blend of so many rows may begin with this step."""
        under_way = sum(self._rows.values())
        # Once one has no room, none behind it has: small ones would pass a large one for ever.
        self._is_full |= bool(
            self._most is not None and under_way and under_way + rows > self._most
        )
        return not self._is_full

    def end_of_step(self, done: Iterable[str] = ()) -> None:
        """The step was built, within which these blends are done."""
        self._is_full = False
        for name in done:
            self.free(name)

    def take(self, name: str, rows: int) -> None:
        """A blend begins, or goes on: so many of its rows are yet to be scheduled."""
        self._rows[name] = rows

    def free(self, name: str) -> None:
        """All rows of a blend are scheduled, or it ended before that."""
        self._rows.pop(name, None)


def most_rows(vllm_config: Any, *, is_cpu: bool, by_group: bool = False) -> int | None:
    """``Room``'s ``most`` of an engine. On a CPU nothing runs beside the host's own work.

    Args:
        by_group: blends are computed before a step, whose tokens vLLM does not count with these.
    """
    if by_group:
        return int(vllm_config.scheduler_config.max_num_batched_tokens)
    if is_cpu:
        return None
    sizes: Sequence[int] = vllm_config.compilation_config.cudagraph_capture_sizes or ()
    return max([_LEAST_ROWS, *sizes])
