"""Comparing answers inside the engine, against vLLM's own log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import GREEDY, logprobs, start_in_process
from tiny import VOCAB, Words, make

from cacheblend_rag import CacheBlend
from cacheblend_rag.engine import answers
from cacheblend_rag.errors import ConfigError

pytestmark = pytest.mark.vllm

words = Words(3)
CHUNKS = [words(70), words(90), words(64)]
HEAD, QUESTIONS = words(8), [words(20), words(12)]
PROMPTS = [HEAD + CHUNKS[0] + CHUNKS[1] + CHUNKS[2] + q for q in QUESTIONS]
STEPS = 6
SAMPLING: dict[str, Any] = {**GREEDY, "max_tokens": STEPS, "logprobs": -1}


@pytest.fixture(scope="module")
def blend(tiny_models: Path) -> Iterator[CacheBlend]:
    with start_in_process(
        make("llama", tiny_models),
        logits_processors=[answers.PROCESSOR],
        max_num_batched_tokens=64,  # prompts come in parts
    ) as opened:
        assert opened.model_check.passed, opened.model_check.detail
        opened.ingest(CHUNKS, progress=False)
        yield opened


def ask(blend: CacheBlend, wish: str | None, **options: Any) -> list[Any]:
    extra = {} if wish is None else {"extra_args": {answers.KEY: wish}}
    return list(blend.generate(PROMPTS, **SAMPLING, **extra, **options))


def test_comparison_is_of_the_whole_vocabulary(blend: CacheBlend) -> None:
    plain = ask(blend, None, mode="full")
    full = ask(blend, "keep", mode="full")
    assert [r.token_ids for r in full] == [r.token_ids for r in plain]
    digests = [answers.digest(r.prompt_token_ids) for r in full]
    reuse = ask(blend, "compare", mode="reuse")
    [compared] = blend.engine.rpc("cacheblend_compared", digests)
    forced = ask(blend, "force", mode="reuse")
    [all_compared] = blend.engine.rpc("cacheblend_compared", digests)
    parted = 0
    for said, free, told, some, every in zip(
        full, reuse, forced, compared, all_compared, strict=True
    ):
        assert told.token_ids == said.token_ids
        assert len(some) == len(every) == STEPS
        # raw log-probabilities, which vLLM takes before any processor
        a, b = logprobs(said).double(), logprobs(told).double()
        expected = (a.exp() * (a - b)).sum(-1)
        assert torch.tensor([kl for kl, _ in every]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert [same for _, same in every] == (a.argmax(-1) == b.argmax(-1)).tolist()
        together = next(
            (
                i
                for i, (x, y) in enumerate(zip(said.token_ids, free.token_ids, strict=True))
                if x != y
            ),
            STEPS,
        )
        parted += together < STEPS
        upto = min(together + 1, STEPS)
        assert [kl for kl, _ in some[:upto]] == pytest.approx(
            [kl for kl, _ in every[:upto]], rel=1e-2
        )
    assert parted, "naive reuse changed nothing here: the test shows too little"
    assert sum(kl for kl, _ in all_compared[0]) > 0.01


def test_a_full_prefill_is_its_own_twin(blend: CacheBlend) -> None:
    full = ask(blend, "keep", mode="full")
    digests = [answers.digest(r.prompt_token_ids) for r in full]
    ask(blend, "compare", recompute_ratio=1.0)
    [compared] = blend.engine.rpc("cacheblend_compared", digests)
    for rows in compared:
        assert max(kl for kl, _ in rows) < 1e-5 and all(same for _, same in rows)
    assert blend.engine.rpc("cacheblend_compared", digests) == [[[], []]], "they are taken once"
    blend.engine.rpc("cacheblend_drop_answers", digests)
    ask(blend, "force", recompute_ratio=1.0)  # nothing is kept: an answer like any other
    assert blend.engine.rpc("cacheblend_compared", digests) == [[[], []]]
    blend.engine.rpc("cacheblend_drop_answers", digests)


def test_an_unknown_wish_is_refused(blend: CacheBlend) -> None:
    with pytest.raises(ConfigError, match="must be one of"):
        ask(blend, "guess", mode="full")


def test_compare_by_hand() -> None:
    even, certain = torch.zeros(VOCAB), torch.full((VOCAB,), -torch.inf)
    certain[3] = 1.0
    kl, same = answers.compare(certain, even).tolist()
    assert kl == pytest.approx(torch.tensor(VOCAB).log().item()) and same == 0.0
    assert answers.compare(certain, certain).tolist() == [0.0, 1.0]


def test_a_second_front_has_its_own_chunks(blend: CacheBlend) -> None:
    from dataclasses import replace

    other = blend.with_config(replace(blend.config, ingest_prefix=words(40)))
    prompt = words(8) + PROMPTS[0] + words(16)  # no other test asks what begins so
    assert not other.generate(prompt, mode="reuse", **GREEDY).report.blended
    other.ingest(CHUNKS, progress=False)
    before, behind = (front.generate(prompt, mode="reuse", **SAMPLING) for front in (blend, other))
    assert behind.report.blended and before.report.blended
    assert not torch.equal(logprobs(before), logprobs(behind))
    other.forget(CHUNKS)
    assert blend.generate(words(8) + prompt, mode="reuse", **GREEDY).report.blended
