"""What graphs are captured over, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cacheblend_rag.engine.graphs import longest_table
from cacheblend_rag.engine.kernel_executor import KernelCache

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("parts", [1, 4, 16])
@pytest.mark.parametrize("most", [63, 64, 1025, 4096])
def test_the_table_has_room_for_any_request(most: int, parts: int) -> None:
    """A backend may cut the scheduler's blocks into smaller ones: their whole blocks count."""
    size = 16
    block_size = parts * size
    cache: Any = KernelCache.__new__(KernelCache)
    cache._block_size = block_size
    cache._views = [(SimpleNamespace(shape=(9, size, 1, 1)), None)]
    blocks = range(1, -(-most // block_size) + 1)  # as many as the longest request takes
    assert len(cache.table(blocks)) <= longest_table(most, block_size, size)
