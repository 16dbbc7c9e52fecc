"""vLLM's own parsers of answers, for calls of tools and for reasoning, as its server uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.mistral import is_mistral_tokenizer

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.base import ChatTurn, EngineOutput, ParserNames
from cacheblend_rag.errors import ConfigError, PromptError
from cacheblend_rag.options import unknown_option
from cacheblend_rag.tools import ToolCallPiece, ToolUse

# the sampling parameters that a parser may need otherwise than they were asked for
_ADJUSTED = ("structured_outputs", "skip_special_tokens", "spaces_between_special_tokens")
# what vLLM's recipes start servers of these model types with; only for the message of a refusal
_USUAL = {
    "deepseek_v3": "deepseek_v3",
    "granite": "granite",
    "llama": "llama3_json",
    "mistral": "mistral",
    "phi3": "phi4_mini_json",
    "qwen2": "hermes",
    "qwen2_moe": "hermes",
    "qwen3": "hermes",
    "qwen3_moe": "hermes",
}


def check_names(
    names: ParserNames, tool_plugin: str | None = None, reasoning_plugin: str | None = None
) -> None:
    """That vLLM has these parsers.

    Args:
        names: of the parsers.
        tool_plugin, reasoning_plugin: files of parsers of the user's own, which are loaded.

    Raises:
        ConfigError: it has not; names those that it has.
    """
    tools, reasoning = _managers()
    if tool_plugin:
        tools.import_tool_parser(tool_plugin)
    if reasoning_plugin:
        reasoning.import_reasoning_parser(reasoning_plugin)
    options = ("tool_call_parser", "reasoning_parser")
    both = zip((tools, reasoning), options, names, strict=True)
    for manager, option, name in both:
        known = manager.list_registered() if name else []
        if name and name not in known:
            raise unknown_option(name, known, f"vLLM's {option}")


def _managers() -> tuple[Any, Any]:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    return ToolParserManager, ReasoningParserManager


def tokenizes(renderer: Any) -> bool:
    """Whether the template itself is to return token ids."""
    return bool(
        is_mistral_tokenizer(renderer.tokenizer) or renderer.model_config.enable_prompt_embeds
    )


def chat_request(
    renderer: Any,
    messages: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    tools: ToolUse | None,
    sampling: Mapping[str, Any],
) -> Any:
    """The request that vLLM's server would have got, as far as it is about prompt and parsers.

    Raises:
        PromptError: vLLM does not take the messages or the tools.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    given = {name: sampling[name] for name in _ADJUSTED if sampling.get(name) is not None}
    body = {**given, "messages": [dict(message) for message in messages]}
    if arguments:
        body["chat_template_kwargs"] = dict(arguments)
    if tools is not None:
        body |= tools.body()
    try:
        request = ChatCompletionRequest(**body)
        if is_mistral_tokenizer(renderer.tokenizer):
            compat.fit_to_mistral(request)
    except compat.refusals() as error:  # pydantic's are ValueErrors
        raise PromptError(f"vLLM refuses these messages or tools: {_first_lines(error)}") from error
    return request


def chat_params(renderer: Any, request: Any, template: str | None = None) -> Any:
    """How a request's messages are rendered: vLLM's ChatParams.

    Args:
        template: in the place of the model's own.
    """
    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    own = {"tools": tools, "tokenize": tokenizes(renderer)}
    return request.build_chat_params(template, "auto").with_defaults(own)


def turn(
    renderer: Any,
    names: ParserNames,
    request: Any,
    ids: tuple[int, ...],
    tools: ToolUse | None,
    sampling: Mapping[str, Any],
) -> ChatTurn:
    """A rendered request, ready for the engine.

    Args:
        renderer: vLLM's.
        names: of the parsers.
        request: see ``chat_request``; adjusted.
        ids: its prompt.
        tools: those that it offers.
        sampling: the caller's parameters.

    Raises:
        ConfigError: no parser reads this model's calls.
    """
    check_can_call(names, tools, str(renderer.model_config.hf_config.model_type))
    kind = _parser_class(renderer, names)
    if kind is None:  # tools that are not to be called, and nothing to read
        return ChatTurn(ids, sampling, lambda piece: piece, {})
    arguments = request.build_chat_params(None, "auto").chat_template_kwargs

    def make() -> Any:
        about = {"model_config": renderer.model_config, "chat_template_kwargs": arguments}
        made = kind(renderer.tokenizer, request.tools, **about)
        compat.tell_prompt(made, ids)
        return made

    before = {name: getattr(request, name) for name in _ADJUSTED}
    parser = make()
    if (
        request.tool_choice != "none"
        or kind.reasoning_parser_cls is not None
        or compat.is_always_adjusted(kind, renderer.tokenizer)
    ):
        parser.adjust_request(request=request)
    after = {name: getattr(request, name) for name in _ADJUSTED}
    changed = {name: value for name, value in after.items() if value != before[name]}
    reader = _Reader(make(), request, ids, tools)
    reasoning = _reasoning(parser, request, ids, arguments)
    return ChatTurn(ids, {**sampling, **changed}, reader.read, reasoning)


def check_can_call(names: ParserNames, tools: ToolUse | None, model_type: str) -> None:
    """That a parser reads the calls of tools that are offered.

    Raises:
        ConfigError: none does, or this model's format is not one that is read here.
    """
    if model_type == "gpt_oss":
        raise ConfigError(
            "gpt-oss has a chat format of its own, which only vLLM's server reads: start "
            "cacheblend serve MODEL --enable-auto-tool-choice --tool-call-parser openai, and use "
            "it by its url; or leave tools and reasoning_parser out"
        )
    if tools is None or not tools.may_call or names.tool:
        return
    name = _USUAL.get(model_type)
    usual = f" (for models of type {model_type}, usually {name!r})" if name else ""
    raise ConfigError(
        "models write calls of tools differently, and no parser was named that reads this one's. "
        f"Name one of vLLM's{usual} as tool_call_parser, among the engine's arguments "
        '(LlamaIndex and LangChain: engine_args={"tool_call_parser": ...}); for a server: '
        "cacheblend serve MODEL --enable-auto-tool-choice --tool-call-parser ... vLLM has "
        f"{', '.join(_managers()[0].list_registered())}"
    )


def _parser_class(renderer: Any, names: ParserNames) -> Any:
    from vllm.parser import ParserManager

    try:
        return ParserManager.get_parser(
            tool_parser_name=names.tool or None,
            reasoning_parser_name=names.reasoning or None,
            enable_auto_tools=True,
            model_name=renderer.model_config.model,
        )
    except TypeError as error:
        raise ConfigError(f"vLLM's parsers can't be used: {_first_lines(error)}") from error


def _reasoning(
    parser: Any, request: Any, ids: tuple[int, ...], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """What the engine has to know where it holds an answer to a form: from which token on."""
    found: dict[str, Any] = {}
    if parser.reasoning_parser is not None:
        found["reasoning_ended"] = bool(parser.is_reasoning_end(list(ids)))
        found["reasoning_parser_kwargs"] = {"chat_template_kwargs": dict(arguments)}
    if compat.has_own_grammar(request):  # which allows for reasoning
        found["reasoning_ended"] = True
    return found


@dataclass
class _Reader:
    """One answer's parser, and what it found so far."""

    parser: Any
    request: Any
    ids: tuple[int, ...]
    tools: ToolUse | None
    has_called: bool = False

    def read(self, piece: EngineOutput) -> EngineOutput:
        """What a raw piece says; a call may be told apart only with a later one."""
        ended = piece.finish_reason is not None
        found = self.parser.parse_delta(
            delta_text=piece.text,
            delta_token_ids=list(piece.token_ids),
            request=self.request,
            prompt_token_ids=list(self.ids),
            finished=ended,
        )
        calls = () if found is None else tuple(map(_call, found.tool_calls))
        if self.tools is not None and not self.tools.parallel:
            calls = tuple(call for call in calls if call.number == 0)
        self.has_called |= bool(calls)
        return piece._replace(
            text=(found and found.content) or "",
            reasoning=(found and found.reasoning) or "",
            tool_calls=calls,
            finish_reason=self._ended_by(piece.finish_reason),
        )

    def _ended_by(self, reason: str | None) -> str | None:
        """OpenAI's reason where a call ends an answer that was free to be none."""
        is_named = self.tools is not None and isinstance(self.tools.choice, Mapping)
        return "tool_calls" if reason == "stop" and self.has_called and not is_named else reason


def _call(delta: Any) -> ToolCallPiece:
    function = delta.function
    return ToolCallPiece(
        number=int(delta.index),
        id=delta.id,
        name=function.name if function else None,
        arguments=(function.arguments if function else None) or "",
    )


def _first_lines(error: Exception) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return "; ".join(line.strip() for line in lines[:3])
