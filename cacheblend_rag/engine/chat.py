"""Chat messages to token ids by vLLM's own renderer, so that prompts are those of its own chat."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import cache, cached_property
from typing import Any

from vllm.renderers import ChatParams
from vllm.renderers.hf import HfRenderer
from vllm.utils.mistral import is_mistral_tokenizer

from cacheblend_rag.engine import compat, parsers
from cacheblend_rag.engine.base import NO_PARSERS, ChatRenderer, ChatTurn, ParserNames
from cacheblend_rag.errors import CacheBlendError, ConfigError, PromptError
from cacheblend_rag.tools import ToolUse

CLOCK = "strftime_now"  # what templates call to write today's date
_MISTRAL_TAKES = ("reasoning_effort",)


class VllmChat(ChatRenderer):
    """What ``LLM.chat`` and vLLM's server do with messages, whatever the tokenizer.

    Args:
        renderer: vLLM's.
        names: of the parsers that read answers.
        template: chat template in the place of the model's own; None: that one.
    """

    def __init__(
        self, renderer: Any, names: ParserNames = NO_PARSERS, template: str | None = None
    ) -> None:
        self._renderer, self.parsers, self._template = renderer, names, template

    @cached_property
    def available(self) -> bool:
        if self._renderer.tokenizer is None:
            return False
        try:
            self._ids([{"role": "user", "content": "Hello"}], self._params({}))
        # Only whether there is one is asked here. One that takes no message of a user alone raises
        # its error again with the first messages that are rendered.
        except CacheBlendError as error:
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
        self._check(arguments)
        if timeless and self._takes(CLOCK):
            arguments = {CLOCK: _some_day, **arguments}
        if tools is None and not any(map(_is_of_tools, messages)):
            return self._ids(messages, self._params(arguments))
        asked = parsers.chat_request(self._renderer, messages, arguments, tools, {})
        return self._asked_ids(asked)

    def turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        tools: ToolUse | None,
        sampling: Mapping[str, Any],
    ) -> ChatTurn:
        self._check(arguments)
        asked = parsers.chat_request(self._renderer, messages, arguments, tools, sampling)
        ids = self._asked_ids(asked)
        return parsers.turn(self._renderer, self.parsers, asked, ids, tools, sampling)

    def _check(self, arguments: Mapping[str, Any]) -> None:
        for name in arguments:
            if not self._takes(name):
                raise ConfigError(
                    f"this model's chat template has no argument {name!r}; leave it out of "
                    "chat_template_kwargs"
                )

    def _asked_ids(self, asked: Any) -> tuple[int, ...]:
        params = parsers.chat_params(self._renderer, asked, self._template)
        return self._ids(asked.messages, params)

    def _ids(self, messages: Sequence[Mapping[str, Any]], params: Any) -> tuple[int, ...]:
        with naming_refusals(messages):
            found = self._rendered([dict(message) for message in messages], params)
        return text_ids(found)

    def _params(self, arguments: Mapping[str, Any]) -> ChatParams:
        return ChatParams(
            chat_template=self._template,
            chat_template_kwargs={
                **arguments,
                "add_generation_prompt": True,
                "continue_final_message": False,
                "tokenize": parsers.tokenizes(self._renderer),
            },
        )

    def _rendered(self, messages: list[dict[str, Any]], params: ChatParams) -> Mapping[str, Any]:
        renderer = self._renderer
        tokens = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        # lengths are checked by ourselves, with our own messages
        tokens = replace(tokens, max_total_tokens=None)
        _, (found,) = renderer.render_chat([messages], params, tokens)
        return found  # type: ignore[no-any-return]

    def known(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``arguments`` that have an effect: a server's are for any template."""
        return {name: value for name, value in arguments.items() if self._takes(name)}

    def _takes(self, name: str) -> bool:
        """Whether an argument has an effect; vLLM drops others silently."""
        if is_mistral_tokenizer(self._renderer.tokenizer):
            return name in _MISTRAL_TAKES
        if type(self._renderer) is not HfRenderer:  # in Python, for one family: not known
            return name != CLOCK
        template = self._template or self._renderer.tokenizer.chat_template
        return name == "documents" or name in _words(str(template))


@contextmanager
def naming_refusals(messages: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Turn what is raised while these messages are rendered into ours."""
    try:
        yield
    except CacheBlendError:
        raise
    except compat.no_chat_template() as error:
        raise PromptError(
            "chat messages need a chat template and this model has none; pass the prompt as "
            "text instead"
        ) from error
    except Exception as error:  # templates, and renderers in Python, raise anything
        raise _refused(messages, error) from error


def text_ids(found: Mapping[str, Any]) -> tuple[int, ...]:
    """The token ids of a prompt as vLLM's renderer made it.

    Raises:
        PromptError: it has more than text.
    """
    if found["type"] != "token":
        raise PromptError("only text can be served here; leave images and sound out")
    return tuple(found["prompt_token_ids"])


def _is_of_tools(message: Mapping[str, Any]) -> bool:
    """Whether vLLM's server treats it in its own way: a call, or what a tool said."""
    return message.get("role") == "tool" or bool(message.get("tool_calls"))


def _some_day(format: str) -> str:  # templates may name the argument
    """In place of today's date, one that never changes."""
    return datetime(2024, 7, 26).strftime(format)  # the one that Llama's templates fall back to


@cache
def _words(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", template))


def _refused(messages: Sequence[Mapping[str, Any]], error: Exception) -> PromptError:
    reason = str(error).strip() or type(error).__name__
    return PromptError(
        f"the model's chat template refuses these messages: {reason.splitlines()[0].rstrip('.')}. "
        f"Their roles are: {', '.join(str(m['role']) for m in messages)}. Some templates take no "
        "system message, or want user and assistant in turn: move the system message's text to "
        "the front of the user's, merge neighbours of one role, or write the prompt yourself and "
        "pass it as text (LlamaIndex: messages_to_prompt)"
    )
