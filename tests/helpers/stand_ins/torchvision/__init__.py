"""Stands in for torchvision, whose builds for CPUs are on no package index: vLLM's models that take
images import it. Nothing here does anything: whoever uses it fails, and text does not use it.
"""

from __future__ import annotations

from typing import Any, NoReturn

__version__ = "0.28.0"


class Absent:
    """A name of torchvision; using it fails."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        absent()


def absent() -> NoReturn:
    raise RuntimeError("this is not torchvision: tests of text use a stand-in")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent
