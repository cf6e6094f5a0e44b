"""LangChain's own standard tests for chat models, run on ChatOpenAI with our server behind it.

They skip what the model says it lacks: images, audio, PDFs; and what needs recordings of past runs.
"""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from pydantic import SecretStr

pytestmark = [
    pytest.mark.asyncio(loop_scope="class"),
    pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio' but it is not an async function"),
]


class TestStandard(ChatModelIntegrationTests):
    """The suite."""

    @pytest.fixture(autouse=True)
    def _find_server(self, witty: str) -> None:
        type(self).url = witty

    url = ""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "model": "tiny", "base_url": self.url, "api_key": SecretStr("secret"), "max_retries": 0, "temperature": 0, "stream_usage": True,
        }  # fmt: skip

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "org/tiny"
