"""Structured output: the engine lets the model write only what fits a JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from cacheblend_rag import ConfigError

METHODS = ("json_schema", "function_calling", "json_mode")


def structured(
    model: BaseChatModel,
    schema: dict[str, Any] | type,
    *,
    include_raw: bool,
    method: str,
    call: Mapping[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """``model`` and then a parser; see ``ChatCacheBlend.with_structured_output``."""
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    form = convert_to_json_schema(schema)
    bound = model.bind(
        structured_outputs={"json": form},
        ls_structured_output_format={"kwargs": {"method": method}, "schema": form},
        **call,
    )
    parser = _parser(schema)
    if not include_raw:
        return bound | parser

    def parse(found: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**found, "parsed": parser.invoke(found["raw"]), "parsing_error": None}
        except ValueError as error:  # as LangChain's parsers and pydantic raise
            return {**found, "parsed": None, "parsing_error": error}

    raw: Runnable[Any, Any] = RunnablePassthrough.assign(raw=itemgetter("input") | bound)
    ask: Runnable[LanguageModelInput, Any] = RunnableLambda(lambda given: {"input": given})
    return ask | raw | RunnableLambda(parse) | _without_input


def _without_input(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "input"}


def _parser(schema: dict[str, Any] | type) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):  # of pydantic 2 or 1
        parser: type[Any] = _WholePydantic
        return parser(pydantic_object=schema)  # type: ignore[no-any-return]
    return _WholeJson()


class _Whole(BaseOutputParser[Any]):
    """LangChain's parsers complete JSON that was cut off, which would make 18 of 1874."""

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        message = result[0].message if isinstance(result[0], ChatGeneration) else None
        if not partial and message and message.response_metadata.get("finish_reason") == "length":
            raise OutputParserException(
                f"the answer was cut off after max_tokens: {message.text!r}; raise max_tokens"
            )
        return super().parse_result(result, partial=partial)


class _WholePydantic(_Whole, PydanticOutputParser[Any]):
    """For pydantic classes."""


class _WholeJson(_Whole, JsonOutputParser):
    """For everything else."""
