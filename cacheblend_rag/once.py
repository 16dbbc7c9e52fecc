"""What is made once in a process, when it is first needed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

T = TypeVar("T")


def once(make: Callable[[], T]) -> Callable[[], T]:
    """``make`` with its first result kept. Threads that come together wait for one another, where
    ``functools.cache`` would let each of them make its own.
    """
    lock, made = Lock(), list[T]()

    @functools.wraps(make)
    def get() -> T:
        if not made:
            with lock:
                if not made:
                    made.append(make())
        return made[0]

    return get
