"""Chat messages to token ids by the server that this is a part of, as its own endpoints do it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import cached_property
from typing import Any

from cacheblend_rag.engine import compat, parsers
from cacheblend_rag.engine.base import NO_PARSERS, ParserNames
from cacheblend_rag.engine.chat import VllmChat, naming_refusals, text_ids
from cacheblend_rag.errors import PromptError, PromptTooLongError
from cacheblend_rag.tools import ToolUse

TOO_LONG = "maximum context length"  # in what vLLM says of such a prompt
Run = Callable[[Coroutine[Any, Any, Any]], Any]  # on the server's event loop, in another thread


class ServedChat(VllmChat):
    """Prompts of chat requests as the server computes them: with its template, the arguments that
    it sets for all requests, and what else its options do to them.

    Args:
        online: vLLM's ``OnlineRenderer``, which its endpoints share.
        run: waits for what that returns.
        names: of the parsers that read answers.
    """

    def __init__(self, online: Any, run: Run, names: ParserNames = NO_PARSERS) -> None:
        super().__init__(online.renderer, names, online.chat_template)
        self._online, self._run = online, run

    @cached_property
    def available(self) -> bool:
        if self._renderer.tokenizer is None:
            return False
        try:
            self.render([{"role": "user", "content": "Hello"}], {})
        except PromptError as error:
            return not isinstance(error.__cause__, compat.no_chat_template())
        return True

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        tools: ToolUse | None = None,
        timeless: bool = False,
    ) -> tuple[int, ...]:
        if timeless:  # of ingest prefixes, which are no requests
            arguments = {**self.known(self._online.default_chat_template_kwargs), **arguments}
            return super().render(messages, arguments, tools=tools, timeless=True)
        self._check(arguments)
        return self._asked_ids(parsers.chat_request(self._renderer, messages, arguments, tools, {}))

    def _asked_ids(self, asked: Any) -> tuple[int, ...]:
        with naming_refusals(asked.messages):
            try:
                found = self._run(self._online.render_chat(asked))
            except compat.refusals() as error:
                if TOO_LONG not in str(error):
                    raise
                raise PromptTooLongError(
                    f"{error}. Retrieve fewer or shorter chunks, or start the server with a longer "
                    "--max-model-len if the model allows it"
                ) from error
        if not isinstance(found, tuple):  # vLLM's ErrorResponse
            raise PromptError(str(found.error.message))
        _, (prompt,) = found
        return text_ids(prompt)
