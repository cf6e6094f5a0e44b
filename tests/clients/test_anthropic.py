"""The anthropic client, sync, async and streaming: tools, structured output, counts and error classes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest

from tests.api.conftest import Client, ScriptedEngine
from tests.api.test_clients import Served
from tests.text.samples import write_calls

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def url(witty: str) -> str:
    return witty.removesuffix("/v1")


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, **options: Any) -> Any:
    return client.messages.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 100, **options})


def test_message_is_answered(client: anthropic.Anthropic) -> None:
    message = ask(client, system="Be kind.")
    assert (message.content[0].text, message.stop_reason) == ("Hello! How can I help you?", "end_turn")
    assert message.usage.output_tokens > 5
    assert ask(client, max_tokens=2).stop_reason == "max_tokens"
    assert ask(client, stop_sequences=["can"]).stop_sequence == "can"


def test_stream_is_the_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="tiny", messages=HELLO, max_tokens=100) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == "Hello! How can I help you?"  # type: ignore[union-attr]
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", ask(client).usage.output_tokens)


def test_async_client_answers_and_streams(url: str) -> None:
    async def run() -> None:
        async with anthropic.AsyncAnthropic(base_url=url, auth_token="secret", api_key=None, max_retries=0) as client:
            message = await client.messages.create(model="tiny", messages=HELLO, max_tokens=100)
            stream = await client.messages.create(model="tiny", messages=HELLO, max_tokens=100, stream=True)
            kinds = [event.type async for event in stream]
        assert message.content[0].type == "text"
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")

    asyncio.run(run())


def test_tool_is_called_and_its_result_answered(client: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in San Francisco?"}]
    first = ask(client, messages=messages, tools=[WEATHER], tool_choice={"type": "any"})
    assert first.stop_reason == "tool_use"
    (use,) = first.content
    assert (use.name, use.input) == ("get_weather", {"location": "San Francisco, CA"})
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "Sunny."}]},
    ]
    assert ask(client, messages=messages, tools=[WEATHER]).content[0].text == "That is all that I wanted to know."


def test_streamed_tool_input_is_put_together(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in San Francisco?"}]
    with client.messages.stream(model="tiny", messages=messages, max_tokens=100, tools=[WEATHER]) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (use,) = stream.get_final_message().content
    assert len(pieces) > 1
    assert use.input == {"location": "San Francisco, CA"}  # type: ignore[union-attr]


def test_output_is_parsed_into_a_type(client: anthropic.Anthropic) -> None:
    message = client.messages.parse(
        model="tiny", messages=[{"role": "user", "content": "Who was Ada?"}], max_tokens=100, output_format=Person
    )
    assert message.parsed_output == Person(name="Ada Lovelace", age=36)


def test_tokens_are_counted_as_they_are_used(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=HELLO, system="Be kind.", tools=[WEATHER])
    usage = ask(client, system="Be kind.", tools=[WEATHER]).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nobody/else"}, anthropic.NotFoundError),
        ({"extra_body": {"temperature": 9}}, anthropic.BadRequestError),
        ({"max_tokens": 2000}, anthropic.BadRequestError),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError),
    ],
)
def test_errors_are_of_the_clients_own_classes(
    client: anthropic.Anthropic, options: dict[str, Any], error: type[anthropic.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        ask(client, **options)
    body: Any = caught.value.body
    assert (body["type"], set(body["error"])) == ("error", {"type", "message"})


def test_wrong_key_is_an_authentication_error(url: str) -> None:
    with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client, pytest.raises(anthropic.AuthenticationError):
        ask(client)


@pytest.fixture
def thoughtful() -> Iterator[Served]:
    engine = ScriptedEngine(tool_call_parser="hermes", reasoning_parser="qwen3")
    engine.served.max_len = 4000
    calls = write_calls("hermes", [("get_weather", {"location": "Rome"}), ("get_weather", {"location": "Oslo"})])
    engine.replies = [f"<think>hm</think>Let me see.\n{calls}"]
    server = Served(Client(engine))
    yield server
    server.stop()


def test_stream_helper_puts_thinking_text_and_tools_together(thoughtful: Served) -> None:
    options: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000}
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{thoughtful.port}", api_key="x", max_retries=0) as client:
        with client.messages.stream(model="org/byte-model", messages=HELLO, tools=[WEATHER], **options) as stream:
            thinking = "".join(event.thinking for event in stream if event.type == "thinking")
            message: Any = stream.get_final_message()
        again = client.messages.create(
            model="org/byte-model", messages=[*HELLO, {"role": "assistant", "content": message.content}], tools=[WEATHER], **options
        )
    assert thinking == "hm"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.input for block in message.content[2:]] == [{"location": "Rome"}, {"location": "Oslo"}]
    assert again.stop_reason == "tool_use"
    assert thoughtful.engine.chat.calls[1]["messages"][1]["reasoning_content"] == "hm"
