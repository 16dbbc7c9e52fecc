"""Speculative decoding beside blends: drafts change when tokens come, never which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import untried
from blending import IDS, PARTS, PREFIX, QUESTION, agree
from drafts import TARGETS, make_drafting
from engines import EXACT, FULL_LOGPROBS, logprobs, selected, start, start_in_process
from reference import Part, Reference
from tiny import Words, make

from cacheblend_rag import CacheBlend
from cacheblend_rag.config import PROPAGATION_LENGTH

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.anywhere]

STEPS = 12
ASKED: dict[str, Any] = {**FULL_LOGPROBS, "max_tokens": STEPS}
WHOLE_BLOCKS = Words(3)(64)
FRESH = [i for i, stored in enumerate(p.stored for p in PARTS for _ in p.ids) if not stored]


class Speculating(NamedTuple):
    """An engine that has stored the chunks, and the reference."""

    blend: CacheBlend
    reference: Reference

    @property
    def drafted(self) -> dict[str, int]:
        """How many tokens were drafted so far, and taken."""
        llm: Any = self.blend._engine._llm  # type: ignore[attr-defined]
        return {
            metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
        }

    def forget(self) -> None:
        """Nothing is answered from what an earlier request left in vLLM's prefix cache."""
        llm: Any = self.blend._engine._llm  # type: ignore[attr-defined]
        assert llm.reset_prefix_cache()


# what a GPU's user gets: steps that are one graph, with several rows a request
COMPILED = [pytest.param(f"{name} compiled", marks=pytest.mark.gpu) for name in TARGETS]


@pytest.fixture(scope="module", params=[*TARGETS, *COMPILED])
def speculating(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[Speculating]:
    """In a process of its own: once vLLM has looked n-grams up, no other engine starts in it."""
    method, _, compiled = request.param.partition(" ")
    untried.skip(method.partition("-")[0])
    if method == "mtp":
        untried.skip_if(untried.lacks_experts())
    path, spec = make_drafting(method, tiny_models)
    reference = Reference(make(TARGETS[method], tiny_models), PREFIX)
    options = {
        "speculative_config": spec, "disable_log_stats": False, "async_scheduling": False
    }  # fmt: skip
    if compiled:
        options["enforce_eager"] = False
    begin = start_in_process if untried.TRIED else start
    with begin(path, prefix=PREFIX, **options) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        blend.ingest([WHOLE_BLOCKS, *(p.ids for p in PARTS if p.stored)], progress=False)
        yield Speculating(blend, reference)


@pytest.fixture(autouse=True)
def nothing_cached(speculating: Speculating) -> None:
    speculating.forget()


def test_answers_are_those_without_speculation(
    speculating: Speculating, record_property: Callable[[str, object], None]
) -> None:
    blend, reference = speculating
    prompt = IDS + QUESTION
    full, before = reference.full(prompt, STEPS), speculating.drafted
    agree(blend.generate(prompt, mode="off", **ASKED), full)
    plain = speculating.drafted
    for options in ({"mode": "full"}, {"recompute_ratio": 1.0}):
        agree(blend.generate(prompt, **options, **ASKED), full)
    naive = blend.generate(prompt, mode="reuse", **ASKED)
    assert naive.report.blended, naive.report.detail
    agree(naive, reference.blend(PARTS, QUESTION, FRESH, STEPS))
    for selector in ("query", "hkvd"):
        some = blend.generate(prompt, recompute_ratio=0.2, selector=selector, **ASKED)
        rows = selected(blend, some)
        assert set(FRESH) < set(rows)
        agree(
            some,
            reference.blend(PARTS, QUESTION, rows, STEPS, propagation_length=PROPAGATION_LENGTH),
        )
    now = speculating.drafted
    for name, first, last in (("plain", before, plain), ("others", plain, now)):
        counts = [last[key] - first[key] for key in ("draft_tokens", "accepted_tokens")]
        record_property(name, "{} drafts, {} taken".format(*counts))
        assert counts[0], "no step had a draft"


def test_a_prompt_of_which_all_but_one_token_are_there(speculating: Speculating) -> None:
    """vLLM adds rows to it, for drafts that it does not have yet."""
    blend, reference = speculating
    parts, question = [Part(WHOLE_BLOCKS, True)], QUESTION[:1]
    prompt = WHOLE_BLOCKS + question
    naive = blend.generate(prompt, mode="reuse", **ASKED)
    assert naive.report.blended, naive.report.detail
    assert selected(blend, naive) == []
    agree(naive, reference.blend(parts, question, [], STEPS))


def test_requests_beside_one_another(speculating: Speculating) -> None:
    blend = speculating.blend
    prompts = [IDS + QUESTION[:n] for n in (40, 17, 5)] + [WHOLE_BLOCKS + QUESTION[:1]]
    prompts += [QUESTION + IDS[:n] for n in (3, 50)]
    options = {"recompute_ratio": 0.2, "propagation_length": 0, **ASKED}
    alone = []
    for prompt in prompts:
        speculating.forget()
        alone.append(blend.generate(prompt, **options))
    speculating.forget()
    for one, beside in zip(alone, blend.generate(prompts, **options), strict=True):
        assert one.report.blended is beside.report.blended
        assert one.token_ids == beside.token_ids
        torch.testing.assert_close(logprobs(beside), logprobs(one), atol=2 * EXACT, rtol=0)
