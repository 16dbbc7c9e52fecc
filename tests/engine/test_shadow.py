"""What the shadow finds is what an exact, teacher-forced run of vLLM's own says, and nobody else
notices it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import EAGER_AND_COMPILED, EXACT, logprobs, start_in_process
from shadows import CHUNKS, CONFIG, PREFIX, PROMPT, SAMPLING, computed, forced
from tiny import Words, make

from cacheblend_rag import BlendConfig, CacheBlend, ConfigError
from cacheblend_rag.engine.blends import Scheduled
from cacheblend_rag.engine.link import Link
from cacheblend_rag.engine.shadow import ShadowWorker, why_not
from cacheblend_rag.engine.watching import Watch, Watching
from cacheblend_rag.shadow import Drawn, ShadowJob
from cacheblend_rag.shadow.report import ShadowReport

pytestmark = [pytest.mark.vllm, pytest.mark.anywhere]


words = Words(13)


@pytest.fixture(scope="module", params=EAGER_AND_COMPILED)
def blend(request: pytest.FixtureRequest, tiny_models: Path) -> Iterator[CacheBlend]:
    options = {"enforce_eager": False} if request.param == "compiled" else {}
    with start_in_process(make("llama", tiny_models), config=CONFIG, **options) as opened:
        opened.ingest(CHUNKS, progress=False)
        yield opened


def test_the_figures_are_those_of_an_exact_run_forced_to_say_the_answer(blend: CacheBlend) -> None:
    # others have rows in the same steps
    _, result, _ = blend.generate([words(33), PROMPT, words(50)], **SAMPLING)
    assert result.report.blended and result.report.shadow is not None
    assert result.report.shadow.state == "waiting"
    found = computed(blend, result)
    exact, blended = forced(blend, PROMPT, result.token_ids), logprobs(result)
    kl = (exact.exp() * (exact - blended)).sum(-1).mean().item()
    same = exact.argmax(-1) == blended.argmax(-1)
    chosen = exact.argmax(-1) == torch.tensor(result.token_ids)
    assert kl > 50 * EXACT and not same.all()  # the model is such that blending shows
    assert found == ShadowReport(
        state="done",
        template=found.template,
        tokens=12,
        kl=pytest.approx(kl, rel=1e-3, abs=EXACT),
        agreement=pytest.approx(chosen.float().mean().item()),
        changed=True,
        first_changed=not bool(same[0]),
    )


def test_an_answer_at_ratio_one_is_unchanged(blend: CacheBlend) -> None:
    found = computed(blend, blend.generate(PROMPT, recompute_ratio=1.0, **SAMPLING))
    assert found.kl == pytest.approx(0, abs=EXACT) and found.agreement == 1
    assert found.changed is False and found.first_changed is False


def test_exact_answers_meanwhile_are_those_without_a_shadow(
    blend: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shadow stands still in the middle of its forward while others are answered."""
    exact = blend.generate(PROMPT, mode="full", **SAMPLING)
    shadows = blend._shadows
    assert shadows is not None
    monkeypatch.setattr(shadows, "wake", lambda: None)  # this test goes on slice by slice
    result = blend.generate(PROMPT, recompute_ratio=0.1, **SAMPLING)
    steps = blend.engine.rpc("cacheblend_shadow", 1, -1)[0]
    assert steps["waiting"] == 1 and steps["seconds"] == 0
    begun = blend.engine.rpc("cacheblend_shadow", 3, steps["steps"])[0]
    assert begun["waiting"] == 1 and begun["done"] is None
    again = blend.generate(PROMPT, mode="full", **SAMPLING)
    assert again.token_ids == exact.token_ids
    assert torch.equal(logprobs(again), logprobs(exact))
    # the engine made steps meanwhile, so nothing is computed until it was seen to rest
    refused = blend.engine.rpc("cacheblend_shadow", 1000, begun["steps"])[0]
    assert refused["waiting"] == 1 and refused["seconds"] == 0 and refused["done"] is None
    done = blend.engine.rpc("cacheblend_shadow", 1000, refused["steps"])[0]
    assert done["waiting"] == 0 and done["done"][:1] == [""]
    found = blend.shadow(result)
    assert found is not None and found.state == "done"
    # it is in vLLM's own cache now, and no blend begins
    other = blend.generate(PROMPT, recompute_ratio=0.1, **SAMPLING)
    assert other.report.shadow is None


def test_requests_that_are_not_blended_have_no_shadow(blend: CacheBlend) -> None:
    result = blend.generate(PROMPT, mode="full", **SAMPLING)
    assert result.report.shadow is None and blend.shadow(result) is None
    assert blend.generate(words(50), **SAMPLING).report.shadow is None


def test_a_second_front_draws_only_where_the_first_does(blend: CacheBlend) -> None:
    quiet = blend.with_config(BlendConfig(ingest_prefix=PREFIX, blend_if="always"))
    result = quiet.generate(PROMPT, **SAMPLING)
    assert result.report.blended and result.report.shadow is None
    blend.config, before = BlendConfig(), blend.config
    try:
        with pytest.raises(ConfigError, match="give it to the first CacheBlend"):
            blend.with_config(CONFIG)
    finally:
        blend.config = before


# ---- without an engine ---------------------------------------------------------------------------


DRAWN = Drawn("", "t", "s/t", most_tokens=4, most_waiting=16)


def request(name: str = "r", prompt: int = 100, answer: int = 0) -> Any:
    ids = list(range(prompt))
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=prompt,
        prompt_token_ids=ids,
        output_token_ids=list(range(answer)),
    )


def test_rows_of_watched_answers_are_numbered_from_the_first_token() -> None:
    watching = Watching(Link())
    assert watching.begin(request(), "name", 0.15, DRAWN)
    assert watching.has_any(["x", "r"]) and not watching.has_any(["x"])
    other = Scheduled(0, 7)
    assert watching.step({"r": Scheduled(40, 50), "x": other}) is None  # within the prompt
    first = watching.step({"r": Scheduled(90, 10), "x": other})
    assert first == Watch({"r": 10, "x": 7}, {"r": 0})
    assert watching.step({"r": Scheduled(102, 1)}) == Watch({"r": 1}, {"r": 3})
    assert watching.step({"r": Scheduled(103, 1)}) is None  # no more than are compared


def test_few_are_watched_at_a_time_and_what_failed_is_not_computed() -> None:
    link = Link()
    watching = Watching(link)
    begun = [watching.begin(request(f"r{n}"), f"n{n}", 0.15, DRAWN) for n in range(10)]
    assert begun == [True] * 8 + [False] * 2
    assert watching.begin(request("r0"), "n0", 0.15, DRAWN)  # again, after a preemption
    watching.ended(request("r0", answer=9), blended=True)
    watching.ended(request("r1", answer=9), blended=False)
    watching.ended(request("r2", answer=0), blended=True)  # it was aborted before a token came
    watching.ended(request("r9", answer=9), blended=True)  # not watched
    [job] = watching.take()
    assert (job.name, job.prompt_tokens, job.token_ids[100:]) == ("n0", 100, (0, 1, 2, 3))
    link.has_worker = True
    watching.ended(request("r3", answer=1), blended=True)
    assert watching.take() == [] and len(link.take_shadows()) == 1  # the worker takes it itself


def test_the_oldest_goes_where_too_many_wait() -> None:
    handle: Any = SimpleNamespace(model=None, device=torch.device("cpu"))
    recent: OrderedDict[str, Any] = OrderedDict(n3={"shadow": {}}, n4={})
    worker = ShadowWorker(handle, Any, 100, recent)  # type: ignore[arg-type]
    jobs = [ShadowJob(f"r{n}", f"n{n}", (1, 2), 1, 0.15, DRAWN) for n in range(20)]
    worker.add(jobs)
    assert worker.news() == {"waiting": 16, "tokens": 2, "dropped": {"others_came": 4}}
    assert worker.news()["dropped"] == {}
    assert recent["n3"]["shadow"]["state"] == "dropped" and recent["n4"] == {}


def test_engines_that_can_not_have_a_shadow_say_why() -> None:
    def refusal(sharing: tuple[str, ...] = (), groups: int = 1, **config: Any) -> str:
        parallel = SimpleNamespace(enable_batch_sharded_sampling=False)
        plain = {"lora_config": None, "speculative_config": None, "parallel_config": parallel}
        options = SimpleNamespace(**plain | config)
        handle: Any = SimpleNamespace(sharing=sharing, groups=groups, config=options)
        return why_not(handle)

    assert refusal() == ""
    assert "LoRA" in refusal(lora_config=object())
    assert "speculative" in refusal(speculative_config=object())
    assert "share KV" in refusal(sharing=("layer",))
    assert "KV cache groups" in refusal(groups=2)
    sharded = SimpleNamespace(enable_batch_sharded_sampling=True)
    assert "batch-sharded" in refusal(parallel_config=sharded)
