"""What LlamaIndex asks of an LLM that calls tools, and answers of a given form."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.utils import parse_partial_json
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import BaseTool
from llama_index.core.types import PydanticProgramMode

from cacheblend_rag.tools import ToolCall, choice_by_name


class CallingLLM(FunctionCallingLLM):
    """Tools go through the chat template, and vLLM's parser reads the calls.

    Structured output needs no tools: the prompt asks for it in words, as LlamaIndex does, and
    decoding is held to the schema.
    """

    pydantic_program_mode: PydanticProgramMode = Field(
        default=PydanticProgramMode.LLM,
        description="llm holds decoding to the schema; function has the model call a tool.",
    )

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            if isinstance(user_msg, str):
                user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
            messages.append(user_msg)
        choice = _choice(kwargs.pop("tool_choice", None), tool_required)
        if not tools:
            return {"messages": messages, **kwargs}
        return {
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls of an answer, or of as much of it as a stream has brought.

        Raises:
            ValueError: there is none, or one of a whole answer is no JSON: LlamaIndex takes that
                for an answer that can't be parsed.
        """
        is_whole = response.raw is not None
        blocks = [b for b in response.message.blocks if isinstance(b, ToolCallBlock)]
        if not blocks and error_on_no_tool_call:
            raise ValueError("the model called no tool, and one was expected")
        return [_selection(block, is_whole) for block in blocks]

    # ---- structured output ---------------------------------------------------------------------

    def structured_predict(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        held = self._held(output_cls, llm_kwargs)
        return super().structured_predict(output_cls, prompt, held, **prompt_args)

    async def astructured_predict(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Any:
        held = self._held(output_cls, llm_kwargs)
        return await super().astructured_predict(output_cls, prompt, held, **prompt_args)

    def stream_structured_predict(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Any, None, None]:
        held = self._held(output_cls, llm_kwargs)
        return super().stream_structured_predict(output_cls, prompt, held, **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Any],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Any, None]:
        held = self._held(output_cls, llm_kwargs)
        return await super().astream_structured_predict(output_cls, prompt, held, **prompt_args)

    def _held(self, output_cls: type[BaseModel], call: Mapping[str, Any] | None) -> dict[str, Any]:
        """A call's options, with decoding held to the schema where it is not asked for by tools."""
        if self.pydantic_program_mode != PydanticProgramMode.LLM:
            return dict(call or {})
        return {"structured_outputs": {"json": output_cls.model_json_schema()}, **(call or {})}


def block_of(call: ToolCall) -> ToolCallBlock:
    """A call as LlamaIndex has it; arguments that are no JSON, or not yet, stay text."""
    kwargs = call.kwargs()
    return ToolCallBlock(
        tool_call_id=call.id,
        tool_name=call.name,
        tool_kwargs=call.arguments if kwargs is None else kwargs,
    )


def _choice(choice: Any, is_required: bool) -> Any:
    """In OpenAI's form."""
    if choice is None:
        return "required" if is_required else "auto"
    return choice_by_name(choice)


def _selection(block: ToolCallBlock, is_whole: bool) -> ToolSelection:
    found = block.tool_kwargs
    if isinstance(found, str) and is_whole:
        raise ValueError(
            f"the arguments of a call of {block.tool_name!r} are no JSON object: {found!r}. If the "
            "answer was cut off, raise max_tokens"
        )
    kwargs = _partial(found) if isinstance(found, str) else found
    name, call_id = block.tool_name, block.tool_call_id or ""
    return ToolSelection(tool_id=call_id, tool_name=name, tool_kwargs=kwargs)


def _partial(text: str) -> dict[str, Any]:
    try:
        found = parse_partial_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
