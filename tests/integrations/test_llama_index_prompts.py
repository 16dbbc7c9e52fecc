"""LlamaIndex's prompts reach the engine unchanged, and the chunks in them are found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_engine import MODEL, FakeEngine, index_of, plans, sent
from llama_matrix import CASES, Calls, listen

from llama_index_cacheblend import CacheBlendLLM


@pytest.fixture(scope="module")
def asked() -> Calls:
    return listen()


@pytest.fixture
def llm(engines: list[FakeEngine]) -> Iterator[CacheBlendLLM]:
    with CacheBlendLLM(model=str(MODEL), engine_args={"max_model_len": 8192}) as made:
        yield made


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_found(
    name: str, llm: CacheBlendLLM, engines: list[FakeEngine], asked: Calls
) -> None:
    case, blend = CASES[name], llm.blend
    engines[0].answers = [case.answer] if case.answer else []
    asked.clear()

    texts = case.run(llm)

    requests = sent(blend)
    located = [index_of(blend).locate(request.token_ids) for request in requests]
    found = sum(match.end - match.start for matches in located for match in matches)
    share = found / sum(len(llm.encode(text)) for text in texts)
    assert case.at_least <= share <= 1
    for plan, matches in zip(plans(blend), located, strict=True):
        assert (plan is not None) == bool(matches)

    tokenizer = blend.tokenizer
    plain = [
        tokenizer.encode(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )
        for messages in asked.calls
    ]
    assert sorted(list(request.token_ids) for request in requests) == sorted(plain)
