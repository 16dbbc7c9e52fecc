"""A family that cannot blend is served as vLLM alone serves it, and says why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import FULL_LOGPROBS, logprobs, plain_engine, start
from tiny import REFUSED, Words, make

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.forward import ModelHandle
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.reason import Reason, RefusedError

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("in_process")]

words = Words(1)
PREFIX = words(4)
CHUNKS = [words(size) for size in (37, 50, 130, 38)]
PROMPT = words(9) + CHUNKS[2] + CHUNKS[0] + words(3) + CHUNKS[1] + CHUNKS[3] + words(40)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "gemma4-shared" else []) for n in REFUSED],
)
def test_refused_family_answers_exactly(name: str, tiny_models: Path) -> None:
    path = make(name, tiny_models)
    dtype = "bfloat16"  # all that vLLM's CPU kernels take
    options = {"prefix": PREFIX, "block_size": None, "dtype": dtype}
    try:
        with plain_engine(path, dtype) as plain:
            expected = plain(PROMPT)
    except Exception as error:
        with pytest.raises(CacheBlendError):
            start(path, **options)
        torch.set_default_dtype(torch.float32)  # vLLM's failed loading leaves the model's behind
        pytest.skip(f"this vLLM can't serve it without us either: {error}")
    with start(path, **options) as blend:
        assert not blend.model_check.passed
        report = blend.ingest(CHUNKS, progress=False)
        assert report.computed == 0 and report.reason is blend.model_check.reason is not None
        result = blend.generate(PROMPT, **FULL_LOGPROBS)
        assert not result.report.blended and result.report.detail == blend.model_check.detail
        got = logprobs(result)
    assert result.token_ids == expected.tokens
    torch.testing.assert_close(got, expected.logprobs, atol=0, rtol=0)


@pytest.mark.parametrize("config", [{"index_topk": 64}, {}])
def test_latent_attention_over_chosen_keys_is_refused(config: dict[str, int]) -> None:
    """Keys that an indexer picks have a cache of their own."""
    model: Any = SimpleNamespace(use_mla=True, hf_text_config=SimpleNamespace(**config))
    refused = compat.model_refusal(model)
    assert (refused is None) is (not config)
    assert refused is None or refused.reason is Reason.MLA


def test_several_groups_are_refused_where_they_were_not_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        SlidingWindowSpec,
    )

    shape: Any = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    full, window = FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=64)
    chunks = ChunkedLocalAttentionSpec(**shape, attention_chunk_size=64)
    larger = FullAttentionSpec(**{**shape, "block_size": 32})

    def refused(*specs: Any, is_off: bool = False, ranks: int = 1, **changes: Any) -> str:
        options: dict[str, Any] = {"speculative_config": None, "lora_config": None, **changes}
        config: Any = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector=options.pop("connector", "ours")),
            scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=is_off),
            parallel_config=SimpleNamespace(world_size=ranks),
            **options,
        )
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        return compat.groups_refusal(config, SimpleNamespace(kv_cache_groups=groups))

    monkeypatch.setattr(compat, "is_cpu", lambda: True)
    assert not refused(full, window) and not refused(full, window, window)
    assert not refused(chunks, is_off=True, ranks=2), "of one group, others judge"
    assert "hybrid manager off" in refused(full, window, is_off=True)
    assert "several ranks" in refused(full, window, ranks=2)
    assert "speculative" in refused(full, window, speculative_config=object())
    assert "LoRA" in refused(full, window, lora_config=object())
    assert "connectors" in refused(full, window, connector="MultiConnector")
    assert "other layers" in refused(full, chunks)
    assert "several sizes" in refused(window, larger)
    monkeypatch.setattr(compat, "is_cpu", lambda: False)
    assert ("GPU" in refused(full, window)) is ("kv_groups" in compat.NOT_RUN_ON_A_GPU)
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in (window, full)]
    caches: Any = SimpleNamespace(kv_cache_groups=groups)
    assert compat.longest_blend(caches) is None
    plain: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1), speculative_config=None
    )
    assert "several KV cache groups" in compat.refinement_refusal(plain, caches)


@pytest.mark.parametrize("is_ahead", [True, False])
@pytest.mark.parametrize("is_cpu", [True, False])
@pytest.mark.parametrize("method", [*compat.TESTED_DRAFTS, "dflash"])
def test_speculation_is_refused_where_it_was_not_tested(
    method: str, is_cpu: bool, is_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that is ahead of its drafts' fate has lengths that they may not come to."""
    monkeypatch.setattr(compat, "is_cpu", lambda: is_cpu)
    monkeypatch.setattr(compat, "NOT_RUN_ON_A_GPU", frozenset({"ngram"}))
    options: Any = SimpleNamespace(
        lora_config=None,
        speculative_config=SimpleNamespace(method=method),
        scheduler_config=SimpleNamespace(async_scheduling=is_ahead),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1),
    )
    refused = compat.engine_refusal(options)
    is_tested = method != "dflash" and (is_cpu or method != "ngram")
    assert (refused is None) is (is_tested and not is_ahead)
    assert refused is None or refused.reason is Reason.SPECULATIVE_DECODING


def test_layers_of_a_draft_model_are_none_of_the_models() -> None:
    names = {"model.layers.4.self_attn.attn"}
    v1 = SimpleNamespace(drafter=SimpleNamespace(_draft_attn_layer_names=names))
    v2 = SimpleNamespace(speculator=SimpleNamespace(draft_attn_layer_names=names))
    by_ids = SimpleNamespace(drafter=object())  # as n-grams are
    assert compat.draft_layers(v1) == compat.draft_layers(v2) == names
    assert compat.draft_layers(by_ids) == compat.draft_layers(SimpleNamespace()) == set()


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"per_layer_embeddings": torch.zeros(64, 4, 8)}, Reason.ENCODER_INPUTS),
        ({"get_model_state_cls": object}, Reason.OWN_INPUTS),
    ],
)
def test_a_model_that_gets_more_than_tokens_and_positions_is_refused(
    more: dict[str, Any], reason: Reason
) -> None:
    """Gemma 3n with images, LongCat's n-grams: our forwards have other rows than vLLM's step."""
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(is_multimodal_model=True),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    with pytest.raises(RefusedError) as refused:
        ModelHandle(SimpleNamespace(**more), config, torch.device("cpu"))
    assert refused.value.why.reason is reason
