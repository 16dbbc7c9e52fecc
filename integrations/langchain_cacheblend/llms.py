"""``CacheBlendLLM``: LangChain's model for plain text, over an engine that reuses KV of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from cacheblend_rag import AsyncBlendStream, BlendResult, BlendStream, CacheBlend
from langchain_cacheblend.fields import ModelArguments
from langchain_cacheblend.retrieval import not_found
from langchain_cacheblend.settings import EngineSettings, details, off_the_loop, usage


class CacheBlendLLM(EngineSettings, BaseLLM):
    """A completion model: prompts are texts, which no chat template is applied to.

    Args:
        model: hub name or folder; may be left out with ``url`` and ``from_engine``.
        blend_config, engine_args: how to blend, and vLLM's engine arguments.
        **fields: those of ``EngineSettings``, and LangChain's own.

    Raises:
        ConfigError: the model is in use in this process with other settings.
        ServerError: no server answers at ``url``, and no ``model`` was named.
    """

    model_config = ConfigDict(extra="forbid")

    # its own, else type checkers make one of the fields alone
    def __init__(
        self, model: str | Path | None = None, **arguments: Unpack[ModelArguments]
    ) -> None:
        super().__init__(model, **arguments)

    @property
    def _llm_type(self) -> str:
        return "cacheblend"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return {**params, "ls_provider": "cacheblend", "ls_model_name": self.model}

    def get_token_ids(self, text: str) -> list[int]:
        return list(self.blend.tokenizer.encode(text, add_special_tokens=False))

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        blend, options = self.blend, self.options(stop, kwargs)
        missing = _missing(prompts)
        if self.timeout is None:  # all of them together
            return self._results(blend, blend.generate(prompts, **options), missing)
        results = []
        for prompt in prompts:
            clock = self.deadline()
            with blend.stream(prompt, **options) as stream:
                for _ in stream:
                    clock.check()
            results.append(stream.result)
        return self._results(blend, results, missing)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        blend, options = await self.engine.ablend(), self.options(stop, kwargs)
        missing = _missing(prompts)

        async def answer(prompt: str) -> BlendResult:
            clock = self.deadline()
            async with blend.astream(prompt, **options) as stream:
                async for _ in stream:
                    clock.check()
            return stream.result

        tasks = [asyncio.ensure_future(answer(prompt)) for prompt in prompts]
        try:  # no TaskGroup: its errors are groups, which no fallback or retry knows
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return await asyncio.to_thread(self._results, blend, results, missing)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        blend, clock = self.blend, self.deadline()
        missing = not_found(prompt)
        with closing(blend.stream(prompt, **self.options(stop, kwargs))) as stream:
            for delta in stream:
                clock.check()
                chunk = self._chunk(blend, delta, stream, missing)
                if run_manager is not None:
                    run_manager.on_llm_new_token(delta, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        blend, clock = await self.engine.ablend(), self.deadline()
        missing = not_found(prompt)
        async with aclosing(blend.astream(prompt, **self.options(stop, kwargs))) as stream:
            async for delta in stream:
                clock.check()
                make = partial(self._chunk, blend, delta, stream, missing)
                chunk = await off_the_loop(stream, make)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(delta, chunk=chunk)
                yield chunk

    def _results(
        self, blend: CacheBlend, results: list[BlendResult], missing: list[str] | None
    ) -> LLMResult:
        return LLMResult(
            generations=[
                [Generation(text=result.text, generation_info=self._info(blend, result, missing))]
                for result in results
            ],
            llm_output={
                "model_name": self.model,
                "token_usage": {
                    "prompt_tokens": sum(r.report.tokens_total for r in results),
                    "completion_tokens": sum(len(r.token_ids) for r in results),
                },
            },
        )

    def _chunk(
        self,
        blend: CacheBlend,
        delta: str,
        stream: BlendStream | AsyncBlendStream,
        missing: list[str] | None,
    ) -> GenerationChunk:
        info = self._info(blend, stream.result, missing) if stream.has_ended else None
        return GenerationChunk(text=delta, generation_info=info)

    def _info(
        self, blend: CacheBlend, result: BlendResult, missing: list[str] | None
    ) -> dict[str, Any]:
        found = details(result, self.model, blend.tokenizer, missing)
        return {**found, "usage_metadata": usage(result)}


def _missing(prompts: list[str]) -> list[str] | None:
    """Of several prompts in one call nothing is known."""
    return not_found(prompts[0]) if len(prompts) == 1 else None
