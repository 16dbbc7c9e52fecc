"""Re-rotation with the model's own tables equals vLLM's RoPE at the new position, every variant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm

BASE = {"rope_theta": 10000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "large-theta": {"rope_type": "default", "rope_theta": 1e6},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.25},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1024},
}


class TwoTables(torch.nn.Module):
    """Shaped like vLLM's LongRoPE, which needs a whole model's configuration to be made."""

    cos_sin_cache = torch.zeros(1)

    def _compute_cos_sin_cache(self, max_position_embeddings: int, rescale: float) -> torch.Tensor:
        raise AssertionError("must not be called")


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def make_rope(parameters: dict[str, Any], *, is_neox: bool) -> Any:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    return get_rope(
        64, 4096, is_neox_style=is_neox, rope_parameters=BASE | parameters, dtype=torch.float32
    )


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_moved_keys_equal_keys_rotated_there(name: str, is_neox: bool) -> None:
    from cacheblend_rag.engine.rope import Rerotator

    rope = make_rope(VARIANTS[name], is_neox=is_neox)
    mover = Rerotator(torch.nn.ModuleList([rope]), 4096, torch.device("cpu"))
    torch.manual_seed(0)
    raw = torch.randn(200, 2 * 64)
    old, new = torch.randint(0, 4000, (200,)), torch.randint(0, 4000, (200,))
    new[:20] = old[:20]
    query = torch.zeros_like(raw)
    stored = rope.forward_native(old, query, raw.clone())[1].view(200, 2, 64)
    expected = rope.forward_native(new, query, raw.clone())[1].view(200, 2, 64)
    moved = mover.apply(stored, mover.turn(old, new))
    torch.testing.assert_close(moved, expected, atol=5e-5, rtol=1e-4)
    assert torch.equal(moved[:20], stored[:20]), "unmoved keys stay bit for bit"
    assert (stored[20:] - expected[20:]).abs().max() > 0.1, "the test must be able to fail"


def test_two_tables_are_refused() -> None:
    from cacheblend_rag.engine.forward import UnsupportedModelError
    from cacheblend_rag.engine.rope import Rerotator

    ropes = [make_rope(VARIANTS[n], is_neox=True) for n in ("default", "large-theta")]
    with pytest.raises(UnsupportedModelError, match="different RoPE"):
        Rerotator(torch.nn.ModuleList(ropes), 4096, torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="more than one table"):
        Rerotator(torch.nn.ModuleList([TwoTables()]), 4096, torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="no rotary"):
        Rerotator(torch.nn.ModuleList([torch.nn.Linear(2, 2)]), 4096, torch.device("cpu"))
