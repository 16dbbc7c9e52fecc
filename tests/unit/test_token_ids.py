"""What counts as token ids: one rule for prompts, chunks, and what stands before a chunk."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from fake_engine import fake_blend, sent

from cacheblend_rag import BlendConfig, CacheBlend, PromptError

IDS = tuple(range(500, 600))


@pytest.fixture
def blend(monkeypatch: pytest.MonkeyPatch) -> CacheBlend:
    return fake_blend(monkeypatch, config=BlendConfig(ingest_prefix="document"))


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        lambda ids: np.array(ids, dtype=np.uint16),
        torch.tensor,
        lambda ids: list(np.array(ids)),
        lambda ids: list(torch.tensor(ids)),
        lambda ids: array("i", ids),
        lambda _: range(500, 600),
    ],
    ids=[
        "list",
        "tuple",
        "numpy",
        "uint16",
        "torch",
        "numpy items",
        "torch items",
        "array",
        "range",
    ],
)
def test_whole_numbers_of_any_kind(blend: CacheBlend, make: Callable[..., Any]) -> None:
    ids = make(IDS)
    assert blend.generate(ids).prompt_token_ids == IDS
    assert [r.prompt_token_ids for r in blend.generate([ids, ids])] == [IDS, IDS]
    assert {type(token) for token in sent(blend)[0].token_ids} == {int}
    assert blend.key(ids) == blend.key(IDS)
    assert blend.ingest([ids], progress=False).keys == [blend.key(IDS)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (b"Wie geht's", "decode"),
        (bytearray(b"Wie geht's"), "decode"),
        (memoryview(b"Wie geht's"), "decode"),
        ([1.0, 2.0], "1.0"),
        ([1, 2.5], "2.5"),
        ([True, False], "True"),
        ([1, True], "True"),
        (np.array([1.0, 2.0]), "1.0"),
        (np.array([True]), "True"),
        (torch.tensor([1.0]), "1.0"),
        ([1, torch.tensor(True)], "True"),
        ([1, np.float32(2)], "2.0"),
        (np.array([[1, 2], [3, 4]]), "row"),
        ([1, "x"], "'x'"),
        ([1, None], "None"),
        ({1, 2}, "set|list of such prompts"),
        (frozenset(IDS), "set|list of such prompts"),
    ],
    ids=lambda value: type(value).__name__,  # not repr: it holds addresses
)
def test_what_is_not_a_whole_number_is_refused(blend: CacheBlend, ids: Any, message: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: blend.generate(ids),
        lambda: blend.generate(["a text", ids]),
        lambda: blend.ingest([ids], progress=False),
        lambda: blend.key(ids),
        lambda: blend.forget([ids]),
        lambda: blend.prefetch([ids]),
        lambda: blend.delete_except([ids]),
        lambda: blend.ingest([IDS], left_context=[ids], progress=False),
    ]
    for use in uses:
        with pytest.raises(PromptError, match=message):
            use()
    assert not sent(blend)


def test_bytes_are_not_a_list_of_chunks_either(blend: CacheBlend) -> None:
    for texts in (b"Wie geht's", [1, 2, 3], None, [None], {"text": "a"}, [{"text": "a"}], 7):
        with pytest.raises(PromptError):
            blend.ingest(texts, progress=False)  # type: ignore[arg-type]
