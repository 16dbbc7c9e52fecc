"""Sampling parameters that vLLM's front end takes, and at which its core's input thread ends: no
later request of anybody would be heard.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
from fake_engine import fake_blend, sent

from cacheblend_rag import BlendConfig, CacheBlend, ConfigError


@pytest.fixture
def blend(monkeypatch: pytest.MonkeyPatch) -> CacheBlend:
    return fake_blend(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"min_tokens": 1.5},
        {"seed": 1.5},
        {"logprobs": 1.5},
        {"temperature": True},
        {"ignore_eos": "yes"},
        {"skip_special_tokens": 3},
        {"allowed_token_ids": [1.5]},
        {"allowed_token_ids": [True]},
        {"allowed_token_ids": b"ab"},
        {"stop_token_ids": [True]},
        {"logit_bias": {1.5: 1}},
        {"logit_bias": {"5": 1}},
        {"stop": ["\udce9"]},
        {"bad_words": ["\udce9"]},
        {"max_tokens": np.int64(3)},
        {"allowed_token_ids": [np.int64(1)]},
        {"extra_args": {"a": object}},
        {"extra_args": {"a": "\udce9"}},
    ],
    ids=lambda options: "-".join(f"{n}-{v!r}" for n, v in options.items()),
)
def test_values_of_another_type_are_refused(blend: CacheBlend, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        blend.generate("a text", **options)
    with pytest.raises(ConfigError, match=next(iter(options))):
        list(blend.stream("a text", **options))
    with pytest.raises(ConfigError, match=next(iter(options))):
        asyncio.run(blend.agenerate("a text", **options))
    assert not sent(blend)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "top_p": 1},
        {"logit_bias": {5: 1}},
        {"allowed_token_ids": (1, 2), "stop_token_ids": [3]},
        {"stop": "x", "bad_words": ["y"]},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"extra_args": {"a": [1, "x", None, {"b": 2.5}]}},
    ],
    ids=lambda options: "-".join(options),
)
def test_what_is_right_passes(blend: CacheBlend, options: dict[str, Any]) -> None:
    assert blend.generate("a text", **options).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector_options": 7}, "selector_options"),
        ({"selector_options": [1]}, "selector_options"),
        ({"learn_options": 7}, "learn_options"),
        ({"min_chunk_tokens": "40"}, "min_chunk_tokens"),
        ({"min_chunk_tokens": 40.5}, "min_chunk_tokens"),
        ({"namespace": "caf\udce9"}, "namespace"),
        ({"system_prompt": "caf\udce9"}, "system_prompt.*surrogate"),
        ({"likely_system_prompt": "caf\udce9"}, "likely_system_prompt.*surrogate"),
    ],
    ids=str,
)
def test_values_of_the_configuration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlendConfig(**options)
