"""In which order layers come to a GPU, and how much memory that takes. Numbers only: anywhere."""

from __future__ import annotations

import weakref
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.engine import staging as module
from cacheblend_rag.engine.staging import Staging, Transfer, _groups

pytestmark = pytest.mark.vllm
MIB = 1 << 20


@given(st.data())
def test_wanted_layers_come_first_and_each_comes_once(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    start = data.draw(st.integers(0, count - 1))
    first = range(start, data.draw(st.integers(start + 1, count)))
    most = data.draw(st.integers(1, 9))
    groups = _groups(count, first, most)
    order = [layer for group in groups for layer in group]
    assert order == [*first, *range(first.start), *range(first.stop, count)]
    assert all(0 < len(group) <= most for group in groups)
    # layers of a group follow one another, and as many as may come together do
    for one, two in pairwise(groups):
        starts_a_stretch = two.start in (0, first.stop) or two.start != one.stop
        assert starts_a_stretch or len(one) == most


@given(count=st.integers(1, 20), most=st.integers(1, 6), step=st.integers(1, 3))
def test_pieces_are_those_of_their_groups(count: int, most: int, step: int) -> None:
    transfer: Any = Transfer.__new__(Transfer)
    transfer._groups = _groups(count, range(count // 3, count // 2 + 1), most)
    pieces = transfer._cut(torch.arange(count * step), step)
    for group, piece in zip(transfer._groups, pieces, strict=True):
        assert piece.tolist() == list(range(group.start * step, group.stop * step))


def of(nbytes: int, num_layers: int) -> Any:
    staging: Any = Staging.__new__(Staging)
    staging.nbytes, staging.num_layers = nbytes, num_layers
    staging._under_way = weakref.WeakSet()
    return staging


class Held(SimpleNamespace):
    """In place of buffers: as weak sets need it."""

    __hash__ = object.__hash__


def test_all_transfers_of_a_step_share_a_bound() -> None:
    """6 x 1024 tokens of Llama 8B: 24 MiB a layer. Sixteen at once."""
    staging, a_layer, held = of(1400 * MIB, 32), 24 * MIB, []
    rooms = []
    for _ in range(16):
        count, layers = staging.room(a_layer)
        rooms.append((count, layers))
        held.append(Held(count=count, nbytes=layers * a_layer))
        staging._under_way.add(held[-1])
    assert rooms[0] == (8, 4) and rooms[1] == (6, 4)
    assert set(rooms[2:]) == {(module._SCARCE_BUFFERS, 1)}
    assert sum(b.count * b.nbytes for b in held) < 1400 * MIB + 14 * 2 * a_layer + 1
    held.clear()
    assert staging.room(a_layer) == (8, 4), "those of transfers that ended, or were given up"


@pytest.mark.parametrize(
    ("a_layer", "room"),
    [
        (MIB, (2, 32)),  # all layers in one buffer: no third is needed
        (134 * MIB, (8, 1)),  # a layer is more than a group should be
        (537 * MIB, (2, 1)),  # a very long prompt: less than four would fit
    ],
)
def test_room_of_a_transfer_alone(a_layer: int, room: tuple[int, int]) -> None:
    assert of(1400 * MIB, 32).room(a_layer) == room
