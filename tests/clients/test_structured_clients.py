"""Clients that ask for objects: instructor in its modes, pydantic-ai's agents, and the openai client's parse."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import instructor
import openai
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, Tool
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

ASK = "Who was Ada Lovelace, and how old did she become?"


class Person(BaseModel):
    """Someone."""

    name: str
    age: int


ADA = Person(name="Ada Lovelace", age=36)


@pytest.fixture
def client(witty: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=witty, api_key="secret", max_retries=0)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA], ids=lambda mode: mode.value)
def test_instructor_fills_a_model(client: openai.OpenAI, mode: instructor.Mode) -> None:
    patched = instructor.from_openai(client, mode=mode)
    messages: Any = [{"role": "user", "content": ASK}]
    found = patched.chat.completions.create(model="tiny", response_model=Person, messages=messages, max_retries=0)
    assert found.model_dump() == ADA.model_dump()
    partial = list(patched.chat.completions.create_partial(model="tiny", response_model=Person, messages=messages, max_retries=0))
    assert partial[-1].model_dump() == ADA.model_dump()


def test_instructor_works_on_the_async_client(witty: str) -> None:
    async def ask() -> Person:
        async with openai.AsyncOpenAI(base_url=witty, api_key="secret", max_retries=0) as client:
            patched = instructor.from_openai(client)
            messages: Any = [{"role": "user", "content": ASK}]
            return await patched.chat.completions.create(model="tiny", response_model=Person, messages=messages, max_retries=0)

    assert asyncio.run(ask()).model_dump() == ADA.model_dump()


def test_openai_parse_fills_a_model(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": ASK}]
    parsed = client.chat.completions.parse(model="tiny", messages=messages, response_format=Person)
    assert parsed.choices[0].message.parsed == ADA
    with client.chat.completions.stream(model="tiny", messages=messages, response_format=Person) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == ADA
    tools: Any = [openai.pydantic_function_tool(Person)]
    called = client.chat.completions.parse(model="tiny", messages=messages, tools=tools, tool_choice="required")
    assert called.choices[0].message.tool_calls is not None
    assert called.choices[0].message.tool_calls[0].function.parsed_arguments == ADA


def with_model(witty: str, ask: Callable[[OpenAIChatModel], Awaitable[Any]]) -> Any:
    """What `ask` answers, given a model of pydantic-ai."""

    async def inside() -> Any:
        async with openai.AsyncOpenAI(base_url=witty, api_key="secret", max_retries=0) as client:
            return await ask(OpenAIChatModel("tiny", provider=OpenAIProvider(openai_client=client)))

    return asyncio.run(inside())


def test_pydantic_ai_goes_round_with_a_tool(witty: str) -> None:
    seen: list[str] = []

    def get_weather(location: str) -> str:
        """The weather of a place."""
        seen.append(location)
        return "sunny"

    def ask(model: OpenAIChatModel) -> Awaitable[Any]:
        agent = Agent(model, tools=[Tool(get_weather, strict=True)], system_prompt="Be brief.", model_settings=ModelSettings(temperature=0))
        return agent.run("What is the weather in San Francisco?")

    result = with_model(witty, ask)
    assert seen == ["San Francisco, CA"]
    assert result.output == "That is all that I wanted to know."
    assert result.usage.requests == 2
    assert result.usage.output_tokens > 0


@pytest.mark.parametrize("output", [Person, NativeOutput(Person)], ids=["tool", "native"])
def test_pydantic_ai_fills_a_model(witty: str, output: Any) -> None:
    assert with_model(witty, lambda model: Agent(model, output_type=output).run(ASK)).output == ADA


def test_pydantic_ai_streams(witty: str) -> None:
    async def ask(model: OpenAIChatModel) -> list[str]:
        async with Agent(model).run_stream("Hello") as result:
            return [text async for text in result.stream_text(debounce_by=None)]

    texts = with_model(witty, ask)
    assert len(texts) > 3
    assert texts[-1] == "Hello! How can I help you?"
