"""LangChain's own suites for chat models, over a real engine."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import MODEL
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from cacheblend_rag import CacheBlend
from cacheblend_rag.shared import SharedEngine
from langchain_cacheblend import ChatCacheBlend


class TestUnit(ChatModelUnitTests):
    """No engine starts here: that is what these tests are about."""

    @property
    def chat_model_class(self) -> type[ChatCacheBlend]:
        return ChatCacheBlend

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": str(MODEL)}

    @property
    def has_tool_calling(self) -> bool:
        return False  # refused, see bind_tools

    @property
    def has_structured_output(self) -> bool:
        return True


@pytest.mark.vllm
@pytest.mark.slow
class TestIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _engine(self, real: CacheBlend) -> None:
        type(self).engine = SharedEngine.from_running(real)

    engine: SharedEngine

    @property
    def chat_model_class(self) -> type[ChatCacheBlend]:
        return ChatCacheBlend

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # so small a model repeats itself for ever where nothing stops it
        return {"engine": self.engine, "sampling": {"repetition_penalty": 1.2}}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {**super().standard_chat_model_params, "max_tokens": 128}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[str, list[str]]:
        return {"invoke": [], "stream": []}
