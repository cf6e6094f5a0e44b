"""litellm, by both of the names under which its users reach a vLLM server."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

# Read at import; else it asks the network for its table of prices.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm
from litellm import exceptions

ASK: Any = [{"role": "user", "content": "Hello"}]
HELLO = "Hello! How can I help you?"
PARAMETERS = {"type": "object", "properties": {"input": {"type": "integer"}}, "required": ["input"]}
TOOLS: Any = [{"type": "function", "function": {"name": "magic_function", "parameters": PARAMETERS}}]
# Its logging is a background task, which asyncio.run ends before it has begun.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine 'Logging.async_success_handler' was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pydantic"),
]


@pytest.fixture(params=["hosted_vllm/tiny", "openai/org/tiny"])
def options(request: pytest.FixtureRequest, witty: str) -> dict[str, Any]:
    return {"model": request.param, "api_base": witty, "api_key": "secret", "num_retries": 0}


def test_completion_answers_with_usage(options: dict[str, Any]) -> None:
    answer: Any = litellm.completion(messages=ASK, temperature=0, **options)
    assert answer.choices[0].message.content == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0
    asked: Any = asyncio.run(litellm.acompletion(messages=ASK, **options))
    assert asked.choices[0].message.content == HELLO


def test_stream_adds_up_and_brings_usage(options: dict[str, Any]) -> None:
    chunks: list[Any] = list(litellm.completion(messages=ASK, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == HELLO
    assert [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)] != []
    built: Any = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == HELLO


def test_parameters_that_litellm_does_not_know_are_forwarded(options: dict[str, Any]) -> None:
    answer: Any = litellm.completion(messages=ASK, extra_body={"min_tokens": 40, "ignore_eos": True, "top_k": 1}, max_tokens=40, **options)
    assert answer.usage.completion_tokens == 40


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(options: dict[str, Any], stream: bool) -> None:
    ask = [{"role": "user", "content": "What is magic_function(3)?"}]
    answer: Any = litellm.completion(messages=ask, tools=TOOLS, tool_choice="required", stream=stream, **options)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments.replace(" ", "")) == ("magic_function", '{"input":3}')


def test_text_completion_works(options: dict[str, Any]) -> None:
    # By "hosted_vllm/" litellm sends text completions to the chat's path.
    answer: Any = litellm.text_completion(prompt="Hello", max_tokens=5, **options)
    assert answer.usage.completion_tokens == 5


def test_errors_are_litellms_own(options: dict[str, Any]) -> None:
    with pytest.raises(exceptions.AuthenticationError):
        litellm.completion(messages=ASK, **{**options, "api_key": "wrong"})
    with pytest.raises(exceptions.BadRequestError):
        litellm.completion(messages=ASK, n=999, **options)
    with pytest.raises(exceptions.NotFoundError):
        litellm.completion(messages=ASK, **{**options, "model": options["model"] + "-not"})
