"""Ray itself, which is an extra."""

from __future__ import annotations

import importlib
import os
from typing import Any

from cacheblend_rag.errors import MissingExtraError


def ray_module(name: str = "ray") -> Any:
    """A module of Ray's.

    Raises:
        MissingExtraError: Ray is not installed, or without this part.
    """
    # Ray reports how it is used unless it is told not to, when it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} (for {name})", "ray") from error
