"""The question's pass by our kernels, where Triton interprets them: no engine, no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_kernels import masked_attention
from cacheblend_kernels.paged import PagedKV
from cacheblend_rag.engine.kernel_pass import NEVER, NOWHERE, PassRows, QuestionPass
from cacheblend_rag.select import AskedLayers

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("window", [None, 6])
def test_below_the_layers_that_see_the_context_a_pass_sees_only_itself(window: int | None) -> None:
    torch.manual_seed(4)
    heads, groups, dim = 4, 2, 32
    at = [0, 1, 2, 3, 40, 41, 90, 91, 92]
    rows, spare = len(at), 3
    q, k, v = (torch.randn(rows + spare, n, dim, device=DEVICE) for n in (heads, groups, groups))
    unread = torch.full((8, 16, groups, dim), float("nan"), device=DEVICE)
    table = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    cache = PagedKV(unread, unread, table, torch.tensor([90], dtype=torch.int32, device=DEVICE), 90)

    def padded(values: list[int], filler: int) -> torch.Tensor:
        return torch.tensor(values + [filler] * (rows + spare - len(values)), device=DEVICE)

    asking = [NOWHERE] * 6 + at[6:]
    pass_rows = PassRows(
        padded([7] * rows, 0), padded(at, NOWHERE), padded(asking, NOWHERE),
        padded([NEVER] * 6 + at[6:], NEVER), padded([], NOWHERE),
    )  # fmt: skip
    score = torch.zeros(groups, 90, device=DEVICE)
    layers = AskedLayers((2,), 2)
    step = QuestionPass(None, lambda index: cache, pass_rows, None, score, layers)  # type: ignore[arg-type]
    layer: Any = SimpleNamespace(impl=SimpleNamespace(scale=dim**-0.5), sliding_window=window)
    out = torch.full_like(q, float("nan"))
    step.attend(1, layer, q, k, v, out)
    positions = torch.tensor(at, device=DEVICE)
    distance = positions[:, None] - positions[None]
    sees = (distance >= 0) & (distance < (window or 1 << 20))
    expected = masked_attention(q[:rows], k[:rows], v[:rows], sees, scale=dim**-0.5)
    torch.testing.assert_close(out[:rows], expected, atol=2e-5, rtol=2e-5)
    assert not out[rows:].any() and not score.any()
