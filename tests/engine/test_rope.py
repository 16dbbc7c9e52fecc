"""Re-rotation with the model's own tables equals vLLM's RoPE at the new position, every variant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheblend_rag.engine import selfcheck
from cacheblend_rag.engine.forward import UnsupportedModelError
from cacheblend_rag.engine.isolated import LayerKV
from cacheblend_rag.engine.rope import Rerotator, Table, tables_of
from cacheblend_rag.reason import Reason

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
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
    "dynamic-alpha": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.5},
    "yarn-scaled": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
        "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False,
    },
    "mrope": {"rope_type": "default", "mrope_section": [16, 8, 8]},
    "mrope-yarn": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
        "mrope_section": [12, 10, 10], "mrope_interleaved": True,
    },
    # turns a part of the pairs of a whole key
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}  # fmt: skip


class SwitchedTables(torch.nn.Module):
    """Shaped like a LongRoPE whose tables switch with the length of a sequence."""

    cos_sin_cache = torch.zeros(1)
    long_factor = short_factor = (1.0,)

    def _compute_cos_sin_cache(self, positions: int, rescale: float) -> torch.Tensor:
        raise AssertionError("must not be called")


class UnknownTables(torch.nn.Module):
    """Its tables need an argument that we do not know."""

    cos_sin_cache = torch.zeros(1)

    def _compute_cos_sin_cache(self, something: int) -> torch.Tensor:
        raise AssertionError("must not be called")


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


@contextlib.contextmanager
def patched_length(tokens: int) -> Iterator[None]:
    """The engine's ``max_model_len``, which decides on the table of LongRoPE."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=tokens)
    with set_current_vllm_config(config):
        yield


def make_rope(parameters: dict[str, Any], *, is_neox: bool) -> Any:
    from vllm.model_executor.layers.rotary_embedding import get_rope

    return get_rope(
        64, 4096, is_neox_style=is_neox, rope_parameters=BASE | parameters, dtype=torch.float32
    )


def one(rope: Any) -> Rerotator:
    """All keys by the first table that is found."""
    tables = tables_of(torch.nn.ModuleList([rope]), 4096, 64)
    return Rerotator(tables[:1], [0], CPU)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_moved_keys_equal_keys_rotated_there(name: str, is_neox: bool) -> None:
    rope = make_rope(VARIANTS[name], is_neox=is_neox)
    moved_equal_rotated_there(rope, one(rope))


@pytest.mark.parametrize("is_long", [True, False])
def test_long_rope_of_this_engine(is_long: bool) -> None:
    from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding

    factors = [1.0 + i / 8 for i in range(32)], [2.0 + i for i in range(32)]
    with patched_length(9000 if is_long else 4096):
        rope = Phi3LongRoPEScaledRotaryEmbedding(
            64, 64, 16384, 4096, 10000.0, True, torch.float32, *factors
        )
    assert rope.use_long_rope is is_long
    rope.forward_native = rope.forward
    mover = one(rope)
    assert mover.positions == (16384 if is_long else 4096)
    moved_equal_rotated_there(rope, mover)


def moved_equal_rotated_there(rope: Any, mover: Rerotator) -> None:
    torch.manual_seed(0)
    raw = torch.randn(200, 2 * 64)
    old, new = torch.randint(0, 4000, (200,)), torch.randint(0, 4000, (200,))
    new[:20] = old[:20]
    query = torch.zeros_like(raw)
    stored = rope.forward_native(old, query, raw.clone())[1].view(200, 2, 64)
    expected = rope.forward_native(new, query, raw.clone())[1].view(200, 2, 64)
    moved = mover.apply(stored, mover.delta(old, new), 0)
    torch.testing.assert_close(moved, expected, atol=5e-5, rtol=1e-4)
    assert torch.equal(moved[:20], stored[:20]), "unmoved keys stay bit for bit"
    assert (stored[20:] - expected[20:]).abs().max() > 0.1, "the test must be able to fail"


def test_each_layer_turns_by_its_own_table() -> None:
    ropes = [make_rope(VARIANTS[n], is_neox=True) for n in ("default", "large-theta")]
    found = tables_of(torch.nn.ModuleList([*ropes, ropes[0]]), 4096, 64)
    assert len(found) == 3, "each once, and one that does not rotate"
    both = Rerotator(found, [0, 2, 1], CPU)
    k_KNGD = torch.randn(3, 50, 2, 64)
    old, new = torch.randint(0, 4000, (2, 50))
    delta = both.delta(old, new)
    turned = both.apply(k_KNGD, delta, slice(0, 3))
    assert torch.equal(turned[1], k_KNGD[1])
    for layer, rope in ((0, ropes[0]), (2, ropes[1])):
        alone = one(rope)
        expected = alone.apply(k_KNGD[layer], alone.delta(old, new), 0)
        assert torch.equal(turned[layer], expected)
        assert torch.equal(both.apply(k_KNGD[layer], delta, layer), expected)
    indices = [both.layers(table, range(1, 3)) for table in range(3)]
    assert [index.tolist() for index in indices] == [[], [2], [1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0, 32])
def test_the_table_of_each_layer_is_found(first: int, dtype: torch.dtype) -> None:
    ropes = [make_rope(VARIANTS[n], is_neox=True) for n in ("default", "large-theta")]
    found = tables_of(torch.nn.ModuleList(ropes), 4096, 96)
    right = [table._replace(first=first) for table in found[:2]]
    right.append(right[0].still())
    used = [0, 2, 1, 1]
    truth, at = Rerotator(right, used, CPU), torch.arange(40)
    keys = torch.randn(4, 40, 2, 96)
    home = [LayerKV(k.to(dtype), k.to(dtype)) for k in keys]
    moved = []
    for shift in (37, 4096 - 40):
        delta = truth.delta(at, at + shift)
        there = [truth.apply(keys[layer], delta, layer).to(dtype) for layer in range(4)]
        moved.append(selfcheck.Moved(shift, [LayerKV(k, k) for k in there]))
    tables, of_layer = selfcheck._explanation(found, home, moved)
    assert all(tables[t].same(right[u]) for t, u in zip(of_layer, used, strict=True))
    rope = Rerotator(tables, of_layer, CPU)
    worst = max(
        selfcheck._key_error(rope, layer, home[layer], m.layers[layer], m.shift)
        for m in moved
        for layer in range(4)
    )
    assert worst < (1e-5 if dtype is torch.float32 else 1e-2)
    swapped = Rerotator(tables, [*of_layer[1:], of_layer[0]], CPU)
    wrong = selfcheck._key_error(swapped, 0, home[0], moved[0].layers[0], 37)
    assert wrong > 0.15, "half precision's tolerance must tell one table from another"


def test_layers_may_rotate_different_parts_of_a_key() -> None:
    ropes = [make_rope(VARIANTS[n], is_neox=True) for n in ("default", "partial")]
    whole, part = (tables_of(torch.nn.ModuleList([rope]), 4096, 64)[0] for rope in ropes)
    assert (whole.layout[0], part.layout[0]) == (32, 8)
    found = tables_of(torch.nn.ModuleList(ropes), 4096, 64)
    truth, at = Rerotator([whole, part], [0, 1, 0], CPU), torch.arange(40)
    keys = torch.randn(3, 40, 2, 64)
    delta = truth.delta(at, at + 37)
    there = truth.apply(keys, delta, slice(0, 3))
    for layer, rope in enumerate((ropes[0], ropes[1], ropes[0])):
        alone = one(rope)
        assert torch.equal(there[layer], alone.apply(keys[layer], alone.delta(at, at + 37), 0))
        assert torch.equal(there[layer], truth.apply(keys[layer], delta, layer))
    moved = [selfcheck.Moved(37, [LayerKV(k, k) for k in there])]
    tables, of_layer = selfcheck._explanation(found, [LayerKV(k, k) for k in keys], moved)
    assert [tables[t].layout for t in of_layer] == [x.layout for x in (whole, part, whole)]
    assert not Rerotator(tables, of_layer, CPU).has_one_layout
    unrotated = [selfcheck.Moved(37, [LayerKV(k, k) for k in [there[0], keys[1], there[2]]])]
    tables, of_layer = selfcheck._explanation(found, [LayerKV(k, k) for k in keys], unrotated)
    assert Rerotator(tables, of_layer, CPU).has_one_layout, "kernels take no other"


def test_names_tell_assignments_apart() -> None:
    ropes = [make_rope(VARIANTS[n], is_neox=True) for n in ("default", "large-theta")]
    tables = tables_of(torch.nn.ModuleList(ropes), 4096, 64)[:2]
    samples = [
        Rerotator(tables[:1], [0, 0], CPU),
        Rerotator(tables[1:], [0, 0], CPU),
        Rerotator(tables, [0, 1], CPU),
        Rerotator(tables, [1, 0], CPU),
        Rerotator([tables[0]._replace(first=8)], [0, 0], CPU),
        Rerotator([tables[0], tables[1]._replace(first=8)], [0, 1], CPU),
    ]
    assert len({str(rope.sample()) for rope in samples}) == len(samples)


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotated_dimensions_may_be_a_keys_last(is_neox: bool) -> None:
    rope = make_rope(VARIANTS["default"], is_neox=is_neox)
    tables = tables_of(torch.nn.ModuleList([rope]), 4096, 96)
    assert [table.first for table in tables] == [0, 32, 0, 32]
    at_end = Rerotator([tables[1]], [0], CPU)
    k_NGD = torch.randn(50, 2, 96)
    old, new = torch.randint(0, 4000, (2, 50))
    moved = at_end.apply(k_NGD, at_end.delta(old, new), 0)
    assert torch.equal(moved[..., :32], k_NGD[..., :32])
    plain = one(rope)
    expected = plain.apply(k_NGD[..., 32:], plain.delta(old, new), 0)
    assert torch.equal(moved[..., 32:], expected)


def test_what_has_no_tables_is_refused() -> None:
    for module, says in (
        (SwitchedTables(), "switch with a sequence's length"),
        (UnknownTables(), "more than one table"),
        (torch.nn.Linear(2, 2), "no rotary"),
        (make_rope(VARIANTS["default"], is_neox=True), "no rotary"),  # of larger heads
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            tables_of(torch.nn.ModuleList([module]), 4096, 32)


def test_prompts_longer_than_the_table_are_refused() -> None:
    """Of dynamic scaling, vLLM serves longer ones than its table has positions."""
    table = torch.ones(256, 4), torch.zeros(256, 4)
    rope = Rerotator([Table(*table, True)], [0], torch.device("cpu"))
    rope.check_reaches(256)
    with pytest.raises(UnsupportedModelError, match="max_model_len=256") as refused:
        rope.check_reaches(257)
    assert refused.value.why.reason is Reason.ROPE_TABLES
