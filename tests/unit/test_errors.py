"""Our exceptions are nothing but ours."""

from __future__ import annotations

import inspect

from cacheblend_rag import errors


def test_no_exception_of_ours_is_also_a_builtin_one() -> None:
    """Frameworks take a ValueError of a model for an answer that can't be parsed, and go on."""
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert errors.PromptError in found
    for kind in found:
        others = [c.__name__ for c in kind.__mro__ if not issubclass(c, errors.CacheBlendError)]
        assert others == ["Exception", "BaseException", "object"], kind
