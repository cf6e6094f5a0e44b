"""The openai client's responses: sync, async, streaming, parsed, continued, with tools, in the background."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.server.process import wait_until

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string"}},
        "required": ["location"],
        "additionalProperties": False,
    },
    "strict": True,
}
SAID = "Hello! How can I help you?"


class Person(pydantic.BaseModel):
    name: str
    age: int


class Joke(pydantic.BaseModel):
    setup: str
    punchline: str


@pytest.fixture(scope="module")
def client(witty: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=witty, api_key="secret", max_retries=0) as client:
        yield client


def test_response_is_made_read_and_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hello", instructions="Be kind.")
    assert (made.output_text, made.status) == (SAID, "completed")
    assert made.usage is not None
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert client.responses.retrieve(made.id).output_text == SAID
    (item,) = client.responses.input_items.list(made.id)
    assert item.type == "message"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_limit_makes_a_response_incomplete(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hello", max_output_tokens=2)
    assert made.status == "incomplete"
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"


def test_stream_is_the_response(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="hello", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SAID
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    with client.responses.stream(model="tiny", input="hello") as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_text == SAID
    assert "response.output_text.done" in kinds


def test_async_client_makes_and_streams(witty: str) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=witty, api_key="secret", max_retries=0) as client:
            made = await client.responses.create(model="tiny", input="hello")
            stream = await client.responses.create(model="tiny", input="hello", stream=True)
            kinds = [event.type async for event in stream]
        assert made.output_text == SAID
        assert kinds[-1] == "response.completed"

    asyncio.run(run())


def test_output_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    assert client.responses.parse(model="tiny", input="Who was Ada?", text_format=Person).output_parsed == Person(
        name="Ada Lovelace", age=36
    )
    with client.responses.stream(model="tiny", input="Tell a joke", text_format=Joke) as stream:
        parsed = stream.get_final_response().output_parsed
    assert isinstance(parsed, Joke)


@pytest.mark.parametrize("stored", [True, False])
def test_tool_is_called_and_its_result_answered(client: openai.OpenAI, stored: bool) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in San Francisco?"}]
    first = client.responses.create(model="tiny", input=question, tools=[WEATHER], tool_choice="required", store=stored)
    (call,) = first.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"location": "San Francisco, CA"})
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    if stored:
        second = client.responses.create(model="tiny", input=[result], previous_response_id=first.id, tools=[WEATHER])
    else:
        items: Any = [*question, *first.output, result]
        second = client.responses.create(model="tiny", input=items, tools=[WEATHER])
    assert second.output_text == "That is all that I wanted to know."


def test_streamed_call_is_put_together(client: openai.OpenAI) -> None:
    with client.responses.stream(model="tiny", input="What is the weather in San Francisco?", tools=[WEATHER]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 1


def test_logprobs_come_with_the_text(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hello", include=["message.output_text.logprobs"], top_logprobs=2)
    message: Any = made.output[0]
    assert all(len(entry.top_logprobs) == 2 for entry in message.content[0].logprobs)
    assert len(message.content[0].logprobs) > 5


def test_background_response_is_polled_and_another_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hello", background=True)
    assert made.status == "queued"
    done = wait_until(lambda: (found := client.responses.retrieve(made.id)).status == "completed" and found, "the response is complete")
    assert done.output_text == SAID
    events = client.responses.create(model="tiny", input="hello", background=True, stream=True)
    queued = next(iter(events))
    events.close()
    assert queued.type == "response.created"
    rest = list(client.responses.retrieve(queued.response.id, stream=True, starting_after=queued.sequence_number))
    assert [event.sequence_number for event in rest] == list(range(1, len(rest) + 1))
    assert rest[-1].type == "response.completed"
    endless = client.responses.create(model="tiny", input="hello", background=True, extra_body={"ignore_eos": True, "min_tokens": 900})
    assert client.responses.cancel(endless.id).status == "cancelled"
    assert client.responses.retrieve(endless.id).status == "cancelled"


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"model": "nobody/else"}, openai.NotFoundError, "model"),
        ({"previous_response_id": "resp_0"}, openai.BadRequestError, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type"),
        ({"max_output_tokens": 100_000}, openai.BadRequestError, "max_output_tokens"),
    ],
)
def test_errors_are_of_the_clients_own_classes(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.responses.create(**{"model": "tiny", "input": "hello", **options})
    assert caught.value.param == param
