"""Starting engines over tiny models, and reading their answers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import VOCAB

from cacheblend_rag import BlendConfig, BlendResult, CacheBlend
from cacheblend_rag.plan import PARAMS_KEY, Plan
from cacheblend_rag.planner import Planner

# a fixed cache, so that engines of several test processes fit beside one another, and none spends
# a second on filling more with zeros; vLLM 0.26 gives sliding-window layers blocks of 16 on a GPU,
# and all layers need the same without its hybrid manager
SHARE: dict[str, Any] = (
    {
        "kv_cache_memory_bytes": 1 << 29,
        "gpu_memory_utilization": 0.05,
        "enforce_eager": True,
        "block_size": 16,
    }
    if torch.cuda.is_available()
    else {"num_gpu_blocks_override": 512}  # so they are called on a CPU too
)
FLASH_DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"  # FlashAttention has no other
EXACT = 1e-3 if torch.cuda.is_available() else 1e-4  # a GPU's kernels round by batch shape
# fixtures over both: tests run eagerly, and a GPU's user gets compiled models in CUDA graphs
EAGER_AND_COMPILED = ["eager", pytest.param("compiled", marks=pytest.mark.gpu)]
GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
FULL_LOGPROBS: dict[str, Any] = {**GREEDY, "logprobs": -1}


def start(
    path: Path, *, prefix: tuple[int, ...] = (), engine: str = "batch", **changes: Any
) -> CacheBlend:
    """A float32 engine on token ids with small blocks and full log-probabilities."""
    freeze_what_is_imported()
    config = changes.pop("config", None) or BlendConfig(ingest_prefix=prefix, blend_if="always")
    options = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_logprobs": VOCAB,
        "block_size": 32,
        **SHARE,
        **changes,
    }
    return CacheBlend(path, config=config, engine=engine, **options)


@contextlib.contextmanager
def start_in_process(path: Path, **options: Any) -> Iterator[CacheBlend]:
    """``start`` in this process, where a test can look inside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        with start(path, **options) as opened:
            yield opened


def freeze_what_is_imported() -> None:
    """Spare vLLM the better part of a start: it collects garbage again and again, each time through
    all of PyTorch's objects and its own. A closing engine undoes this, as it undoes its own freeze.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def planner(blend: CacheBlend) -> Planner:
    """The scheduler's side of an engine in this process, which has heard all that was said."""
    engine: Any = blend._engine
    planning = engine._llm.llm_engine.engine_core.engine_core.scheduler.connector.claims.planning
    planning._learn()
    return planning.planner  # type: ignore[no-any-return]


def planned(blend: CacheBlend, ids: tuple[int, ...], **options: Any) -> Plan:
    """What an engine in this process would do for a prompt."""
    params = blend._prepare(ids, options).request.params
    assert params is not None
    plan = planner(blend).plan(ids, params[PARAMS_KEY]).plan
    assert isinstance(plan, Plan)
    return plan


def logprobs(result: BlendResult) -> torch.Tensor:
    """float32 [steps, vocab] of a result asked for with FULL_LOGPROBS."""
    assert result.logprobs is not None
    return torch.tensor([[at[token] for token in range(VOCAB)] for at in result.logprobs])


def selected(blend: CacheBlend, result: BlendResult) -> list[int]:
    """The positions that the engine recomputed for ``result``."""
    [outcome] = blend._engine.rpc("cacheblend_outcome", result.request_id, True)
    return list(outcome["selected"])


class PlainAnswer(NamedTuple):
    """What vLLM alone answers."""

    tokens: tuple[int, ...]
    logprobs: torch.Tensor


@contextlib.contextmanager
def plain_engine(path: Path, dtype: str = "float32") -> Iterator[Callable[..., PlainAnswer]]:
    """vLLM without anything of ours, to compare with."""
    from vllm import LLM, SamplingParams

    freeze_what_is_imported()
    llm = LLM(
        str(path),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_logprobs=VOCAB,
        **{"enforce_eager": True, **SHARE},
    )
    params = SamplingParams(detokenize=False, **FULL_LOGPROBS)

    def answer(ids: tuple[int, ...]) -> PlainAnswer:
        [output] = llm.generate([{"prompt_token_ids": list(ids)}], params, use_tqdm=False)
        piece = output.outputs[0]
        rows = [[at[token].logprob for token in range(VOCAB)] for at in piece.logprobs]
        return PlainAnswer(tuple(piece.token_ids), torch.tensor(rows))

    try:
        yield answer
    finally:
        llm.llm_engine.engine_core.shutdown()
