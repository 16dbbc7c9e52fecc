"""Every family we accept is exact at ratio 1, and blends as an independent reference does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import untried
from blending import PARTS, PREFIX, PROMPT, QUESTION, agree, blends_as_the_reference, forget_prompts
from engines import EXACT, FULL_LOGPROBS, logprobs, selected, start_in_process
from reference import Reference
from renamed import RENAMED, make_renamed
from tiny import FAMILIES, MORE_FAMILIES, VARIANTS, make

from cacheblend_rag import CacheBlend
from cacheblend_rag.engine import rows as step_rows
from cacheblend_rag.engine.rows import StepRows
from cacheblend_rag.select import create_selector

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]


Record = Callable[[str, object], None]


# An older vLLM, as a GPU may have it, can't load these, or its own full prefill is not that of
# transformers.
SINCE_0_32 = {
    "cohere2", "hunyuan_v1_dense", "hunyuan_v1_moe", "laguna", "mellum", "ministral3", "olmo3",
    "phi",
}  # fmt: skip
CPU_LATENT = "CPU_MLA"  # where there is AMX, vLLM's own choice is bf16
# see ``ModelHandle``
UNTRIED = {"gemma3n": "shared_kv", "gemma4": "kv_heads"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def skip_what_this_gpu_cannot_load(name: str, path: Path, options: dict[str, Any]) -> None:
    """On a CPU, nothing is skipped."""
    if not torch.cuda.is_available():
        return
    if options.get("attention_backend") == CPU_LATENT:
        pytest.skip("a GPU needs 16 bits for latent attention: test_16_bits_on_a_gpu.py")
    what = next((kind for family, kind in UNTRIED.items() if name.startswith(family)), None)
    if what is not None:
        untried.skip(what)
    if name in SINCE_0_32 or name in RENAMED:
        untried.skip_if(untried.too_old(name))
    config = path / "config.json"
    about = json.loads(config.read_text()) if config.exists() else {}
    if any(about.get(key) for key in EXPERTS) and not name.endswith("-dense"):
        untried.skip_if(untried.lacks_experts())


class Family(NamedTuple):
    """An engine that has stored the chunks, and the reference over the same weights."""

    blend: CacheBlend
    reference: Reference


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[Family]:
    """One family's engine at a time in this process, for all tests of that family."""
    name, _, compiled = request.param.partition(" ")
    options: dict[str, Any] = {"enforce_eager": False} if compiled else {}
    takes_images = False
    if name in RENAMED:
        path, model, takes_images = make_renamed(name, tiny_models)
        options |= RENAMED[name].options
    else:
        path = model = make(name, tiny_models)
    if name.startswith("deepseek"):
        options["attention_backend"] = CPU_LATENT
    skip_what_this_gpu_cannot_load(name, path, options)
    reference = Reference(model, PREFIX, takes_images=takes_images)
    with start_in_process(path, prefix=PREFIX, **options) as blend:
        assert blend.model_check.passed, blend.model_check.detail
        blend.ingest([p.ids for p in PARTS if p.stored], progress=False)
        yield Family(blend, reference)


@pytest.fixture(autouse=True)
def nothing_cached(family: Family) -> None:
    """No test is answered from what an earlier one left in vLLM's prefix cache."""
    forget_prompts(family.blend)


def of(*names: str, compiled: bool = False) -> pytest.MarkDecorator:
    params = [f"{name} compiled" if compiled else name for name in names]
    return pytest.mark.parametrize("family", params, indirect=True)


# what is new about these, another family of the list has too
AGAIN = {
    "mistral", "mixtral", "granite", "olmo2", "phi3", "stablelm", "qwen2", "cohere", "starcoder2",
    "exaone4", "laguna", "ministral3", "llama3-scaling",
}  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [pytest.param(n, marks=[pytest.mark.slow] if n in AGAIN else []) for n in FAMILIES],
    indirect=True,
)
def test_family(family: Family, record_property: Record) -> None:
    record_property("ratio 1", blends_as_the_reference(*family))


@pytest.mark.slow
@of(*MORE_FAMILIES)
def test_more_families(family: Family, record_property: Record) -> None:
    record_property("ratio 1", blends_as_the_reference(*family))


@pytest.mark.slow
@of(*VARIANTS)
def test_variants(family: Family) -> None:
    blends_as_the_reference(*family)


@pytest.mark.slow
@of(*(name for name, model in RENAMED.items() if not model.sees))
def test_renamed_families(family: Family, record_property: Record) -> None:
    record_property("ratio 1", blends_as_the_reference(*family))


@pytest.mark.gpu
@of("llama", "qwen3", "gemma2", "gemma3n", "gemma4", compiled=True)
def test_compiled_and_in_graphs(family: Family, record_property: Record) -> None:
    """What a GPU's user gets; the other tests run eagerly."""
    record_property("ratio 1", blends_as_the_reference(*family))


@of("llama", "gemma2", "stablelm")  # test_family has the default's
def test_reach_equals_the_reference(family: Family) -> None:
    blend, reference = family
    for selector in ("query", "hkvd"):
        some = {"recompute_ratio": 0.2, "selector": selector, **FULL_LOGPROBS}
        moved = blend.generate(PROMPT, propagation_length=8, **some)
        rows = selected(blend, moved)
        agree(moved, reference.blend(PARTS, QUESTION, rows, 4, propagation_length=8))
        still = blend.generate(PROMPT, propagation_length=0, **some)
        assert selected(blend, still) == rows
        agree(still, reference.blend(PARTS, QUESTION, rows, 4))
        apart = (logprobs(still) - logprobs(moved)).abs().max()
        assert apart > 1e-3, "propagation must change something"
    exact = blend.generate(PROMPT, recompute_ratio=1.0, propagation_length=8, **FULL_LOGPROBS)
    plain = blend.generate(PROMPT, mode="full", **FULL_LOGPROBS)
    torch.testing.assert_close(logprobs(exact), logprobs(plain), atol=EXACT, rtol=0)
    naive, reused = (
        blend.generate(PROMPT, mode="reuse", propagation_length=r, **FULL_LOGPROBS) for r in (8, 0)
    )
    torch.testing.assert_close(logprobs(naive), logprobs(reused), atol=0, rtol=0)


@of("llama", "gemma2")
def test_steps_that_are_one_graph(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they cannot be told is computed before them, whatever the number of rows."""
    before = StepRows._compute_before_step
    steps = []

    def seen(self: StepRows, ours: Any, batch: Any) -> None:
        steps.append([scheduled.rows for scheduled in batch.values()])
        before(self, ours, batch)

    monkeypatch.setattr(step_rows, "is_forward_context_available", lambda: False)
    monkeypatch.setattr(StepRows, "_compute_before_step", seen)
    blends_as_the_reference(*family)
    assert any(count > 1 for step in steps for count in step)


@of("llama", "gemma2", "qwen3", "gemma3", "cohere2")
@pytest.mark.parametrize(
    ("layers", "sees_from"), [((0.25, 0.75), 0.0), ((0.5, 0.75), 0.0), ((0.5, 0.75), 1.0)]
)
def test_query_scores_equal_the_reference(
    family: Family, layers: tuple[float, float], sees_from: float
) -> None:
    blend, reference = family
    options = {"layers": layers, "sees_from": sees_from, "first_share": 0.0}
    result = blend.generate(PROMPT, recompute_ratio=0.2, selector_options=options, **FULL_LOGPROBS)
    rows = selected(blend, result)
    selector = create_selector("query", options)
    asked = selector.evidence.among(reference.sees_all)
    scores = reference.question_scores(PARTS, QUESTION, *asked)
    stored = torch.tensor([p.stored for p in PARTS for _ in p.ids])
    smooth = torch.nn.functional.avg_pool1d((scores * stored)[None, None], 9, 1, 4)[0, 0]
    smooth[~stored] = -1
    count = result.report.tokens_recomputed
    expected = set(smooth.topk(count).indices.tolist())
    chosen = set(rows) - set((~stored).nonzero().flatten().tolist())
    assert chosen == expected
