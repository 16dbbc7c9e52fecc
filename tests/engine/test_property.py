"""Any prompt over any chunks: ratio 1 is a full prefill, and a batch changes nobody's answer."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import logprobs, start_in_process
from tiny import VOCAB, make

from cacheblend_rag import BlendResult, CacheBlend

pytestmark = pytest.mark.vllm

NUM_PROMPTS, BATCH, MAX_TOKENS = 200, 8, 700
SAMPLING: dict[str, Any] = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True, "logprobs": -1}
Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def blend(tiny_models: Path) -> Iterator[CacheBlend]:
    options: dict[str, Any] = {"max_num_batched_tokens": 512, "max_num_seqs": BATCH}
    with start_in_process(make("llama", tiny_models), prefix=(7, 9, 11), **options) as opened:
        assert opened.model_check.passed
        yield opened


class Draw:
    """Random chunks and prompts, repeatable."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def words(self, low: int, high: int) -> Ids:
        return tuple(self.random.randrange(2, VOCAB) for _ in range(self.random.randint(low, high)))

    def chunks(self) -> list[Ids]:
        """Chunks of 24 to 200 tokens, and for some of them a near duplicate."""
        own = [self.words(24, 200) for _ in range(12)]
        return own + [self.nearly(chunk) for chunk in own[:5]]

    def nearly(self, ids: Ids) -> Ids:
        """A few tokens differ."""
        changed = list(ids)
        for _ in range(self.random.randint(1, 4)):
            changed[self.random.randrange(len(ids))] = self.random.randrange(2, VOCAB)
        return tuple(changed)

    def piece(self, chunks: Sequence[Ids]) -> Ids:
        """A chunk: whole, cut at either end, slightly changed; or a gap."""
        ids = self.random.choice(chunks)
        kind = self.random.choice(["whole"] * 4 + ["head", "tail", "both", "nearly", "gap"])
        if kind == "gap":
            return self.words(1, 60)
        if kind == "nearly":
            return self.nearly(ids)
        start = self.random.randint(1, len(ids) // 2) if kind in ("head", "both") else 0
        end = len(ids) - (self.random.randint(1, len(ids) // 3) if kind in ("tail", "both") else 0)
        return ids[start:end]

    def prompt(self, chunks: Sequence[Ids]) -> Ids:
        pieces = [self.piece(chunks) for _ in range(self.random.randint(1, 5))]
        head = self.words(1, 20) if self.random.random() < 0.8 else ()
        question = self.words(1, 40) if self.random.random() < 0.85 else ()
        return (head + tuple(itertools.chain(*pieces)) + question)[:MAX_TOKENS]


def reset(blend: CacheBlend) -> None:
    core = blend._engine._llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    assert core.scheduler.reset_prefix_cache()


def assert_same(a: BlendResult, b: BlendResult) -> None:
    """Equal up to rounding: where two tokens are equally likely, either may come."""
    rows_a, rows_b = logprobs(a), logprobs(b)
    for step, (one, other) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
        torch.testing.assert_close(rows_a[step], rows_b[step], atol=2e-4, rtol=0)
        if one != other:
            assert abs(rows_a[step][one] - rows_a[step][other]) < 4e-4
            return  # the answers part here


def check_counts(result: BlendResult) -> None:
    r = result.report
    parts = r.tokens_reused + r.tokens_recomputed + r.tokens_fresh + r.tokens_prefix_cached
    assert parts == r.tokens_total
    bounds = [0, *(s.end for s in r.segments)]
    assert bounds[:-1] == [s.start for s in r.segments] and bounds[-1] == r.tokens_total


def test_random_prompts(blend: CacheBlend, record_property: Any) -> None:
    draw = Draw(2024)
    chunks = draw.chunks()
    report = blend.ingest(chunks, progress=False)
    assert report.computed > 10 and report.computed + report.too_short == len(chunks)
    prompts = [draw.prompt(chunks) for _ in range(NUM_PROMPTS)]
    blended = reused = 0
    ways = itertools.cycle(("query", "hkvd"))
    for first, selector in zip(range(0, NUM_PROMPTS, BATCH), ways, strict=False):
        batch = prompts[first : first + BATCH]
        plain = blend.generate(batch, mode="full", **SAMPLING)
        exact = blend.generate(batch, recompute_ratio=1.0, **SAMPLING)
        # without propagation: what that changes depends on where vLLM cuts a prompt into steps
        options = {"selector": selector, "propagation_length": 0, **SAMPLING}
        reset(blend)
        together = blend.generate(batch, **options)
        for ids, one, other, mixed in zip(batch, plain, exact, together, strict=True):
            assert_same(one, other)
            reset(blend)
            alone = blend.generate(ids, **options)
            for result in (one, other, mixed, alone):
                check_counts(result)
            if mixed.report.tokens_prefix_cached == 0:  # it shared no plan with another one
                assert mixed.report.blended == alone.report.blended
                assert mixed.report.tokens_recomputed == alone.report.tokens_recomputed
            assert_same(mixed, alone)
            blended += alone.report.blended
            reused += alone.report.tokens_reused
    total = sum(map(len, prompts))
    counts = {"prompts": NUM_PROMPTS, "tokens": total, "blended": blended, "reused": reused}
    for name, value in counts.items():
        record_property(name, value)
    assert blended > NUM_PROMPTS * 0.8 and reused > total * 0.4


@pytest.mark.slow
def test_exact_answers_beside_blended_ones(blend: CacheBlend, record_property: Any) -> None:
    """500 requests in random company and order, of prompts that begin alike: with the cache left
    on, who asks for no blend gets what a plain prefill gives, whoever was there before.
    """
    draw = Draw(77)
    chunks = draw.chunks()
    blend.ingest(chunks, progress=False)
    stems = [draw.prompt(chunks)[:400] for _ in range(6)]
    prompts = [(*draw.random.choice(stems), *draw.words(0, 60))[:MAX_TOKENS] for _ in range(40)]
    plain = [blend.generate(ids, mode="full", **SAMPLING) for ids in prompts]
    asked = exact = cached = blended = 0
    while asked < 500:
        chosen = [draw.random.randrange(len(prompts)) for _ in range(draw.random.randint(1, BATCH))]
        ratios = [draw.random.choice([None, None, 0.1, 0.5, 1.0]) for _ in chosen]
        requests = []
        for number, ratio in zip(chosen, ratios, strict=True):
            mode = {"mode": "off"} if ratio is None else {"recompute_ratio": ratio}
            requests.append(blend._prepare(prompts[number], {**SAMPLING, **mode}))
        start = time.perf_counter()
        answers = blend._engine.generate([r.request for r in requests])
        for number, ratio, one, pieces in zip(chosen, ratios, requests, answers, strict=True):
            result = blend._finish(one, pieces, start)
            check_counts(result)
            asked += 1
            blended += result.report.blended
            if ratio is None or ratio == 1.0:
                assert_same(plain[number], result)
                exact += 1
                cached += ratio is None and result.report.tokens_prefix_cached > 0
    for name, value in {"exact": exact, "of cache": cached, "blended": blended}.items():
        record_property(name, value)
    assert exact > 200 and cached > 50 and blended > 50
