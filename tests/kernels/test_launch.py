"""The launcher keeps what Triton compiled, by what it was compiled for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="this platform has no Triton")
from cacheblend_kernels.launch import Launcher

pytestmark = pytest.mark.anywhere

GRID = (3, 2, 1)


class Compiled:
    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, *args))


class Kernel:
    """Counts what is compiled, as Triton would where nothing was compiled before."""

    arg_names = ("x", "n", "SIZE", "NEOX")

    def __init__(self, *, is_interpreted: bool = False) -> None:
        self.compiled: list[Compiled] = []
        self.first: list[tuple[Any, ...]] = []
        self._is_interpreted = is_interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, **constants: Any) -> Compiled | None:
            self.first.append((grid, *args, *constants.values(), num_warps))
            if self._is_interpreted:
                return None
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return launch


def launch(launcher: Launcher, x: torch.Tensor, n: int, size: int = 16, warps: int = 4) -> None:
    launcher(GRID, (x, n), {"SIZE": size, "NEOX": True}, num_warps=warps)


def test_what_was_compiled_is_launched_with_every_argument() -> None:
    kernel = Kernel()
    launcher, x, y = Launcher(kernel), torch.zeros(8), torch.ones(8)
    for some, n in ((x, 7), (y, 9), (x, 11)):
        launch(launcher, some, n)
    assert kernel.first == [(GRID, x, 7, 16, True, 4)]
    assert kernel.compiled[0].launches == [(GRID, y, 9, 16, True), (GRID, x, 11, 16, True)]


def test_whatever_triton_may_compile_anew_is_asked_of_triton() -> None:
    kernel = Kernel()
    launcher, x = Launcher(kernel), torch.zeros(64, dtype=torch.float32)
    assert x.data_ptr() % 16 == 0
    others: list[tuple[Any, ...]] = [
        (x, 7), (x[1:], 7), (x.half(), 7), (x, 1), (x, 32), (x, 1 << 40), (x, 7, 32), (x, 7, 16, 8),
    ]  # fmt: skip
    for number, arguments in enumerate(others, 1):
        launch(launcher, *arguments)
        assert len(kernel.compiled) == number
    for arguments in others:
        launch(launcher, *arguments)
    assert len(kernel.compiled) == len(others)
    assert [len(each.launches) for each in kernel.compiled] == [1] * len(others)


def test_an_interpreted_kernel_is_interpreted_each_time() -> None:
    kernel = Kernel(is_interpreted=True)
    launcher = Launcher(kernel)
    for _ in range(3):
        launch(launcher, torch.zeros(8), 7)
    assert len(kernel.first) == 3


def test_constants_come_in_the_order_of_the_kernel() -> None:
    with pytest.raises(AssertionError, match="another order"):
        Launcher(Kernel())(GRID, (torch.zeros(8), 7), {"NEOX": True, "SIZE": 16}, num_warps=4)
