"""LoRA: chunks of an adapter are blended as by the model that the adapter makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from adapters import make_adapter
from blending import PARTS, PREFIX, PROMPT, blends_as_the_reference, forget_prompts
from engines import FULL_LOGPROBS, logprobs, start_in_process
from reference import Reference
from tiny import make
from vllm.distributed.kv_transfer import get_kv_transfer_group

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine.adapters import Adapters
from cacheblend_rag.engine.slices import SlicedIngestor
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.reason import Reason

pytestmark = pytest.mark.vllm

CHUNKS = [p.ids for p in PARTS if p.stored]
CONFIG = BlendConfig(ingest_prefix=PREFIX, blend_if="always")


class Fronts(NamedTuple):
    """One engine: the model alone, and two adapters, each with the reference of what it makes."""

    plain: CacheBlend
    adapters: list[CacheBlend]
    references: list[Reference]
    base: Reference


@pytest.fixture(scope="module")
def fronts(tiny_models: Path) -> Iterator[Fronts]:
    from vllm.lora.request import LoRARequest

    path = make("llama", tiny_models)
    made = [make_adapter(path, seed) for seed in (1, 2)]
    references = [Reference(merged, PREFIX) for _, merged in made]
    base = Reference(path, PREFIX)
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with start_in_process(path, prefix=PREFIX, **options) as plain:
        assert plain.model_check.passed, plain.model_check.detail
        adapters = [
            plain.with_config(CONFIG, LoRARequest(f"adapter-{n}", n, str(folder)))
            for n, (folder, _) in enumerate(made, 1)
        ]
        for front in (plain, *adapters):
            assert front.ingest(CHUNKS, progress=False).computed == len(set(CHUNKS))
        yield Fronts(plain, adapters, references, base)


@pytest.fixture(autouse=True)
def nothing_cached(fronts: Fronts) -> None:
    forget_prompts(fronts.plain)


@pytest.mark.parametrize("number", [0, 1])
def test_an_adapters_chunks_blend_as_the_merged_model(fronts: Fronts, number: int) -> None:
    blends_as_the_reference(fronts.adapters[number], fronts.references[number])


def test_the_model_alone_blends_beside_adapters(fronts: Fronts) -> None:
    blends_as_the_reference(fronts.plain, fronts.base)


def test_each_adapter_has_keys_of_its_own(fronts: Fronts) -> None:
    keys = {front.key_space.key(CHUNKS[0]) for front in (fronts.plain, *fronts.adapters)}
    assert len(keys) == 3


def test_requests_of_one_step_keep_their_adapters(fronts: Fronts) -> None:
    """Each blend's own forwards say what theirs is, and put back what the step's rows need. (Rows
    of the model alone are none of these: vLLM's CPU kernels take the last adapter for them there.)
    """
    both = fronts.adapters
    options = {"recompute_ratio": 0.2, **FULL_LOGPROBS}
    alone = [front.generate(PROMPT, **options) for front in both]
    forget_prompts(fronts.plain)
    prepared = [front._prepare(PROMPT, options) for front in both]
    together = fronts.plain._engine.generate([one.request for one in prepared])
    for front, one, pieces, expected in zip(both, prepared, together, alone, strict=True):
        result = front._finish(one, pieces, 0.0)
        assert result.report.blended and expected.report.blended, result.report.detail
        assert result.token_ids == expected.token_ids
        torch.testing.assert_close(logprobs(result), logprobs(expected), atol=1e-4, rtol=0)
    first, second = logprobs(alone[0]), logprobs(alone[1])
    assert (first - second).abs().max() > 1e-2, "the adapter must change something"


def test_another_adapter_than_that_of_the_chunks_is_not_blended(fronts: Fronts) -> None:
    one, other = fronts.adapters
    for front, request in ((one, other._lora), (fronts.plain, one._lora), (one, None)):
        result = front.generate(PROMPT, lora_request=request, **FULL_LOGPROBS)
        assert not result.report.blended and result.report.reason is Reason.LORA
        owner = next(f for f in (fronts.plain, *fronts.adapters) if f._lora is request)
        forget_prompts(fronts.plain)
        plain = owner.generate(PROMPT, mode="full", **FULL_LOGPROBS)
        torch.testing.assert_close(logprobs(result), logprobs(plain), atol=1e-4, rtol=0)
        forget_prompts(fronts.plain)


@pytest.mark.parametrize("computes", ["the model alone", "an adapter"])
def test_a_slice_goes_on_with_its_own_adapter(fronts: Fronts, computes: str) -> None:
    """Between two slices of an ingestion a step has another one, or none."""
    plain, (one, other) = fronts.plain, fronts.adapters
    state = get_kv_transfer_group().worker_state  # type: ignore[attr-defined]
    handle = state.parts[0]
    request = None if computes == "the model alone" else one._lora
    sliced, keys = SlicedIngestor(handle, state.heads), ["0" * 64]

    def compute() -> Any:
        with handle.adapters.using(request):
            number = 0 if request is None else request.lora_int_id
            return state.ingestor.compute(CHUNKS[:1], PREFIX, [()], number)

    def go_on(parts: int) -> bool:
        with handle.adapters.using(request):
            return sliced.go_on("a", parts)

    [expected] = compute()
    sliced.begin("a", keys, CHUNKS[:1], PREFIX, [()])
    while not go_on(1):
        other.generate(PROMPT[:20], mode="full", max_tokens=2)
        if request is not None:
            plain.generate(PROMPT[:20], mode="full", max_tokens=2)
    _, [computed] = sliced.take()
    assert torch.equal(computed.kv_L2NHD, expected.kv_L2NHD)


def test_an_adapter_that_lost_its_slot_is_not_put_back() -> None:
    """Ours took it: that of the step before is loaded again by the step that wants it."""
    from vllm.lora.request import LoRARequest

    set_to: list[Any] = []
    layers = SimpleNamespace(
        _last_mapping=SimpleNamespace(index_mapping=(1,), prompt_mapping=(1,)),
        lora_index_to_id=[1],
        set_adapter_mapping=set_to.append,
    )

    def activate(requests: Any, mapping: Any) -> None:
        layers.lora_index_to_id = [request.lora_int_id for request in requests] or [1]
        layers._last_mapping = mapping

    manager = SimpleNamespace(_adapter_manager=layers, set_active_adapters=activate)
    adapters = Adapters(SimpleNamespace(lora_manager=manager))
    before = layers._last_mapping
    with adapters.using(None), adapters.during(3):
        assert layers._last_mapping.index_mapping == (0, 0, 0)
    assert set_to == [before]
    layers._last_mapping = before
    with adapters.using(LoRARequest("two", 2, "/none")), adapters.during(3):
        pass
    assert set_to == [before]


def test_a_folder_without_an_adapter_is_refused(fronts: Fronts, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(ConfigError, match="holds no LoRA adapter"):
        fronts.plain.with_config(CONFIG, LoRARequest("none", 9, str(tmp_path)))
