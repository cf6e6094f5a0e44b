"""Tools through the openai client and LangChain: a model that writes nonsense, held to calls by the server; and scripted answers."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.api.conftest import Client, ScriptedEngine
from tests.api.test_clients import Served
from tests.server.process import serving
from tests.text.samples import write_calls
from tests.tiny import tiny_model

TEMPLATE = pathlib.Path(__file__).with_name("tool_chat.jinja")
ASK = "What is it?"


@tool
def weather(city: Literal["Rome", "Oslo"], fine: bool) -> str:
    """The weather of a city."""
    return f"{city}: {fine}"


class Light(BaseModel):
    """A traffic light."""

    color: Literal["red", "green"]
    is_on: bool


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server"), "--chat-template", str(TEMPLATE), model_path=str(tiny_model(max_len=1024))) as server:
        yield f"{server.url}/v1"


@pytest.fixture(scope="module")
def llm(url: str) -> ChatOpenAI:
    options: dict[str, Any] = {"api_key": "EMPTY", "max_tokens": 300, "temperature": 1.0, "seed": 1, "max_retries": 0}
    return ChatOpenAI(model="tiny", base_url=url, **options)


def test_required_call_comes_and_its_result_goes_back(llm: ChatOpenAI) -> None:
    bound = llm.bind_tools([weather], tool_choice="required", parallel_tool_calls=False)
    messages: list[BaseMessage] = [HumanMessage(ASK)]
    for _ in range(2):
        answer = bound.invoke(messages)
        assert isinstance(answer, AIMessage)
        assert answer.response_metadata["finish_reason"] == "tool_calls"
        assert answer.content == ""
        (call,) = answer.tool_calls
        result = weather.invoke(call)
        assert result.content in ("Rome: True", "Rome: False", "Oslo: True", "Oslo: False")
        messages += [answer, ToolMessage(result.content, tool_call_id=call["id"] or "")]


def test_streamed_call_is_the_same_call(llm: ChatOpenAI) -> None:
    bound = llm.bind_tools([weather], tool_choice="weather")
    whole = bound.invoke(ASK)
    chunks = list(bound.stream(ASK))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert isinstance(whole, AIMessage)
    assert isinstance(total, AIMessageChunk)
    assert [(call["name"], call["args"]) for call in total.tool_calls] == [(call["name"], call["args"]) for call in whole.tool_calls]
    assert len(whole.tool_calls) == 1


def test_structured_output_by_function_calling(llm: ChatOpenAI) -> None:
    light = llm.with_structured_output(Light, method="function_calling").invoke(ASK)
    assert isinstance(light, Light)


def test_tools_are_rendered_and_accepted_with_auto(url: str, llm: ChatOpenAI) -> None:
    assert isinstance(llm.bind_tools([weather]).bind(max_tokens=5).invoke(ASK), AIMessage)
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
    options: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": ASK}], "max_tokens": 1}
    plain = client.chat.completions.create(**options)
    tools: Any = [{"type": "function", "function": {"name": "weather"}}]
    with_tools = client.chat.completions.create(**options, tools=tools)
    assert plain.usage is not None
    assert with_tools.usage is not None
    assert with_tools.usage.prompt_tokens > plain.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options, tools=tools, tool_choice={"type": "function", "function": {"name": "none"}})
    assert caught.value.param == "tool_choice.function.name"


@pytest.fixture
def scripted() -> Iterator[Served]:
    engine = ScriptedEngine(tool_call_parser="hermes", reasoning_parser="qwen3")
    engine.served.max_len = 4000
    calls = write_calls("hermes", [("weather", {"city": "Rome", "fine": True}), ("weather", {"city": "Oslo", "fine": False})])
    engine.replies = [f"<think>hm</think>Let me see.\n{calls}", "<think>so</think>Fine in Rome."]
    server = Served(Client(engine))
    yield server
    server.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_langchain_agent_goes_round(scripted: Served, stream: bool) -> None:
    options: dict[str, Any] = {"api_key": "x", "max_retries": 0}
    llm = ChatOpenAI(model="org/byte-model", base_url=f"http://127.0.0.1:{scripted.port}/v1", streaming=stream, **options)
    bound = llm.bind_tools([weather])
    messages: list[BaseMessage] = [HumanMessage(ASK)]
    answer = bound.invoke(messages)
    assert isinstance(answer, AIMessage)
    assert answer.content == "Let me see."
    assert [call["args"] for call in answer.tool_calls] == [{"city": "Rome", "fine": True}, {"city": "Oslo", "fine": False}]
    results = [weather.invoke(call) for call in answer.tool_calls]
    final = bound.invoke([*messages, answer, *results])
    assert final.content == "Fine in Rome."
    shown = scripted.engine.chat.calls[1]["messages"]
    assert [message["role"] for message in shown] == ["user", "assistant", "tool", "tool"]
    assert shown[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "fine": True}
    assert [message["tool_call_id"] for message in shown[2:]] == [call["id"] for call in answer.tool_calls]


def test_openai_stream_helper_assembles_calls_and_reasoning(scripted: Served) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{scripted.port}/v1", api_key="x", max_retries=0)
    tools: Any = [openai.pydantic_function_tool(Light)]
    with client.chat.completions.stream(model="org/byte-model", messages=[{"role": "user", "content": ASK}], tools=tools) as stream:
        names = {event.name for event in stream if event.type == "tool_calls.function.arguments.done"}
        choice = stream.get_final_completion().choices[0]
    assert names == {"weather"}
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    found = [json.loads(call.function.arguments) for call in choice.message.tool_calls or ()]
    assert found == [{"city": "Rome", "fine": True}, {"city": "Oslo", "fine": False}]
    final: Any = client.chat.completions.create(model="org/byte-model", messages=[{"role": "user", "content": ASK}])
    assert (final.choices[0].message.content, final.choices[0].message.reasoning_content) == ("Fine in Rome.", "so")
