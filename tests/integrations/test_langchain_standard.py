"""LangChain's own suites for chat models, over a real engine, and over scripted answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_models import with_tools
from fake_engine import MODEL, fake_blend
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from scripted import call, script

from cacheblend_rag import CacheBlend
from cacheblend_rag.shared import SharedEngine
from langchain_cacheblend import ChatCacheBlend

OF_A_SERVER = ("api_key", "max_retries")
NOWHERE = "http://127.0.0.1:9"  # nothing is asked of it


class Settings(ChatModelUnitTests):
    """No engine starts here, and no server is asked: that is what these tests are about."""

    __test__ = False

    @property
    def chat_model_class(self) -> type[ChatCacheBlend]:
        return ChatCacheBlend

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True


class TestUnit(Settings):
    """With an engine in this process, which has no use for keys and retries, and says so."""

    __test__ = True

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(MODEL), "engine_args": {"tool_call_parser": "hermes"}}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        standard = super().standard_chat_model_params
        return {name: value for name, value in standard.items() if name not in OF_A_SERVER}


class TestUnitOfAServer(Settings):
    __test__ = True

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(MODEL), "url": NOWHERE}


class Answers(ChatModelIntegrationTests):
    __test__ = False
    engine: SharedEngine

    @property
    def chat_model_class(self) -> type[ChatCacheBlend]:
        return ChatCacheBlend

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        standard = {**super().standard_chat_model_params, "max_tokens": 128}
        return {name: value for name, value in standard.items() if name not in OF_A_SERVER}

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {"invoke": [], "stream": []}


@pytest.mark.vllm
@pytest.mark.slow
class TestIntegration(Answers):
    """Over SmolLM2-135M, which writes what it says itself. It is too small to call tools."""

    __test__ = True

    @pytest.fixture(autouse=True)
    def _engine(self, real: CacheBlend) -> None:
        type(self).engine = SharedEngine.from_running(real)

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # so small a model repeats itself for ever where nothing stops it
        return {"engine": self.engine, "sampling": {"repetition_penalty": 1.2}}

    @property
    def has_tool_calling(self) -> bool:
        return False


JOKE = '{"setup": "Why do cats sit on ships?", "punchline": "To be near the mice."}'
SCRIPT = {  # by what the user said last
    "magic_function_no_args": call("magic_function_no_args"),
    "magic_function(3)": call("magic_function", input=3),
    "Hello!": call("magic_function", input=1),
    "Pirate": call("greeting_generator", answer_style="Pirate"),
    "你好啊集团": call("unicode_customer", customer_name="你好啊集团", description="Technology"),
    "こんにちは": call(
        "unicode_customer", customer_name="こんにちは株式会社", description="Technology"
    ),
    "What is 3 + 4": call("my_adder_tool", a=3, b=4),
    "weather in San Francisco": call("get_weather", location="San Francisco, CA"),
    "joke": JOKE,
}


def answer(prompt: str) -> str | None:
    """What the model writes. Where a tool spoke last, it says something in words."""
    said = prompt.rpartition("<|im_start|>user\n")[2]
    if "<tool_response>" in said:
        return None
    return next((told for words, told in SCRIPT.items() if words in said), None)


class TestTools(Answers):
    """The model's answers are scripted: no model that fits here calls tools reliably. All else is
    real: vLLM's own chat template renders the prompt, tools and histories with calls included, and
    vLLM's own parser for Hermes and Qwen reads the answers, token by token.
    """

    __test__ = True

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _engine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        folder: Path = with_tools(tmp_path_factory.mktemp("standard"))
        with pytest.MonkeyPatch.context() as patch:
            blend = fake_blend(patch, model=folder, tool_call_parser="hermes")
            script(blend, answer)
            cls.engine = SharedEngine.from_running(blend)
            yield

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True
