"""/v1/responses: the events and objects of OpenAI's own types, whole, streamed and in the background; what is stored; what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pydantic
import pytest
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent

from jaxserve.api.responses_store import Record, ResponseStore
from jaxserve.errors import UserError
from tests.api.conftest import Connection, check_extras
from tests.text.samples import TOOLS, write_calls

if TYPE_CHECKING:
    from tests.api.conftest import Client, ScriptedEngine

ErrorOf = Callable[[httpx.Response], dict[str, Any]]
Connect = Callable[..., "Connection"]

PATH = "/v1/responses"
EVENT: Any = pydantic.TypeAdapter(ResponseStreamEvent)
FLAT: list[dict[str, Any]] = [{"type": "function", **tool["function"]} for tool in TOOLS]
TWO = write_calls("hermes", [("get_weather", {"city": "Paris"}), ("now", {})])
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
# Not in the types, but sent by OpenAI's server.
EXTRAS = frozenset({"store", "name"})


def response_of(answer: httpx.Response) -> dict[str, Any]:
    """The response object; asserts its type, strictly."""
    assert answer.status_code == 200, answer.text
    check_extras(Response.model_validate_json(answer.content, strict=True), EXTRAS)
    return answer.json()


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream; asserts their types, strictly, their order numbers and their framing."""
    frames = body.decode().split("\n\n")
    assert frames.pop() == "", "the last frame must be whole"
    found: list[dict[str, Any]] = []
    for number, frame in enumerate(frames):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        check_extras(EVENT.validate_json(data.removeprefix("data: "), strict=True), EXTRAS)
        found.append(event)
    return found


def dump(event: dict[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"])


def without_names(value: Any) -> Any:
    """The same without what differs from one answer to the next."""
    if isinstance(value, dict):
        names = {"id", "call_id", "created_at", "completed_at"}
        return {name: without_names(inner) for name, inner in value.items() if name not in names}
    return [without_names(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def ask(talkative: Callable[..., Client]) -> Callable[..., tuple[Client, httpx.Response]]:
    """A client, and its answer to a request answered with these texts."""

    def send(*replies: str, reasoning: str = "none", **options: Any) -> tuple[Client, httpx.Response]:
        client = talkative(*replies, reasoning=reasoning)
        return client, client.post(PATH, {"input": "hi", **options})

    return send


def test_response_has_the_shape_of_openai(client: Client) -> None:
    metadata = {"topic": "x"}
    found = response_of(
        client.post(PATH, {"model": "org/byte-model", "input": "hi", "instructions": "be brief", "metadata": metadata, "temperature": 0.5})
    )
    assert found["id"].startswith("resp_")
    assert (found["object"], found["status"], found["model"]) == ("response", "completed", "org/byte-model")
    assert (found["metadata"], found["instructions"], found["temperature"], found["top_p"]) == (metadata, "be brief", 0.5, 1.0)
    (item,) = found["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [
        {"type": "output_text", "text": "<system>be brief\n<user>hi\n<assistant>", "annotations": [], "logprobs": []}
    ]
    assert found["usage"]["input_tokens_details"]["cached_tokens"] == 3
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"] == 37 + 38


def test_stream_has_the_order_of_openai(client: Client) -> None:
    found = events_of(client.post(PATH, {"input": "hi", "stream": True}).content)
    kinds = [event["type"] for event in found]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.completed"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event["delta"] for event in found[4:-4]) == found[-4]["text"] == "<user>hi\n<assistant>"
    assert found[0]["response"]["status"] == found[1]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    assert len({event["item_id"] for event in found[3:-2]}) == 1


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"tools": FLAT, "parallel_tool_calls": False},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"max_output_tokens": 30},
    {"reasoning": {"effort": "low", "summary": "auto"}},
    {"include": ["reasoning.encrypted_content"]},
    {"include_reasoning": False},
    {"tools": FLAT, "tool_choice": "required"},
    {"tools": FLAT, "tool_choice": {"type": "function", "name": "now"}},
    {"stop": ["Paris"]},
    {"store": False},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reply", [TWO, f"<think>hm</think>\nWell. {TWO}", "<think>hm", "Text with < and <tool.", ""])
def test_stream_adds_up_to_the_whole_response(ask: Callable[..., Any], reply: str, options: dict[str, Any]) -> None:
    send = {"reasoning": {"effort": None}, "tools": FLAT, **options}
    whole = response_of(_ask_thinking(ask, reply, **send))
    found = events_of(_ask_thinking(ask, reply, **send, stream=True).content)
    assert without_names(found[-1]["response"]) == without_names(whole)
    assert found[-1]["type"] == f"response.{whole['status']}"
    done = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert done == found[-1]["response"]["output"]
    for place, item in enumerate(done):
        deltas = "".join(event["delta"] for event in found if event["type"].endswith(".delta") and event["output_index"] == place)
        texts = [part["text"] for part in (*item.get("content", ()), *item.get("summary", ()))]
        assert deltas == (item["arguments"] if item["type"] == "function_call" else "".join(texts))


def _ask_thinking(ask: Callable[..., Any], reply: str, **options: Any) -> httpx.Response:
    client, _ = ask(reply, reasoning="qwen3")
    return client.post(PATH, {"input": "hi", **options})


def test_calls_are_items_of_their_own(ask: Callable[..., Any]) -> None:
    _, answer = ask("Hm. " + TWO, tools=FLAT)
    found = response_of(answer)
    assert [item["type"] for item in found["output"]] == ["message", "function_call", "function_call"]
    first, second = found["output"][1:]
    assert (first["name"], json.loads(first["arguments"])) == ("get_weather", {"city": "Paris"})
    assert (second["name"], json.loads(second["arguments"])) == ("now", {})
    assert first["call_id"].startswith("call_")
    assert first["call_id"] != second["call_id"]
    assert found["status"] == "completed"


def test_reasoning_is_an_item_of_its_own_and_counted(ask: Callable[..., Any]) -> None:
    found = response_of(_ask_thinking(ask, "<think>hm</think>ok"))
    reasoning, message = found["output"]
    assert (reasoning["summary"], reasoning["content"]) == ([], [{"type": "reasoning_text", "text": "hm"}])
    assert message["content"][0]["text"] == "ok"
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] == 2


def test_reasoning_comes_as_its_summary_when_one_is_asked_for(ask: Callable[..., Any]) -> None:
    found = response_of(_ask_thinking(ask, "<think>hm</think>ok", reasoning={"summary": "detailed"}))
    assert found["output"][0]["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert found["output"][0]["content"] == []


def test_logprobs_belong_to_the_text(ask: Callable[..., Any]) -> None:
    found = response_of(_ask_thinking(ask, "<think>hm</think>ok", include=["message.output_text.logprobs"], top_logprobs=2))
    logprobs = found["output"][1]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs] == ["o", "k", "<eos>"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)


def test_response_is_incomplete_at_its_limit(client: Client) -> None:
    found = response_of(client.post(PATH, {"input": "hi", "max_output_tokens": 3}))
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["output"][0]["status"] == "incomplete"


def test_response_that_the_operator_ends_is_incomplete(connect: Connect, engine: ScriptedEngine) -> None:
    async def run() -> None:
        engine.hold = True
        connection = connect(PATH, {"input": "hi", "stream": True})
        await engine.submits.wait()
        engine.step()
        await connection.first_bytes()
        engine.submitted[0].end("abort")
        await connection.task
        last = events_of(connection.body)[-1]
        assert (last["type"], last["response"]["incomplete_details"]) == ("response.incomplete", {"reason": None})

    asyncio.run(run())


def test_format_of_text_is_enforced_and_shown(client: Client) -> None:
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    found = response_of(client.post(PATH, {"input": "hi", "text": {"format": form}}))
    assert found["text"] == {"format": form}
    (spec,) = client.engine.served.grammars.compiled
    assert (spec.json, spec.source) == (SCHEMA, "text.format")
    response_of(client.post(PATH, {"input": "hi", "text": {"format": {"type": "json_object"}}}))
    assert client.engine.served.grammars.compiled[1].json_object
    response_of(client.post(PATH, {"input": "hi", "text": {"format": {"type": "text"}}}))
    assert len(client.engine.served.grammars.compiled) == 2


def test_items_become_the_messages_of_the_template(client: Client) -> None:
    items = [
        {"role": "developer", "content": "dev"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "c"}]},
        {"type": "function_call", "call_id": "c1", "name": "now", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "noon"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "message", "role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    client.engine.served.max_len = 4000
    response_of(client.post(PATH, {"input": items, "instructions": "brief"}))
    calls = [
        {"type": "function", "id": "c1", "function": {"name": "now", "arguments": {}}},
        {"type": "function", "id": "c2", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}},
    ]
    assert client.engine.chat.calls[-1]["messages"] == [
        {"role": "system", "content": "brief"},
        {"role": "developer", "content": "dev"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_call_id": "c1", "name": "now"},
        {"role": "tool", "content": "sun", "tool_call_id": "c2", "name": "get_weather"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]


def test_last_message_of_the_assistant_goes_on_when_it_is_incomplete(client: Client) -> None:
    items = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "status": "incomplete", "content": [{"type": "output_text", "text": "b"}]},
    ]
    response_of(client.post(PATH, {"input": items}))
    assert client.engine.chat.calls[-1]["continue_final_message"]


def test_effort_goes_to_the_template(client: Client) -> None:
    response_of(client.post(PATH, {"input": "hi", "reasoning": {"effort": "none"}}))
    assert client.engine.chat.calls[-1]["kwargs"] == {"reasoning_effort": "none", "enable_thinking": False}


def test_response_continues_an_earlier_one_without_its_instructions(ask: Callable[..., Any]) -> None:
    client, answer = ask(f"<think>hm</think>{TWO}", "sunny", "bye", reasoning="qwen3", tools=FLAT, instructions="brief")
    first = response_of(answer)
    calls = [item["call_id"] for item in first["output"] if item["type"] == "function_call"]
    outputs = [{"type": "function_call_output", "call_id": call_id, "output": "sun"} for call_id in calls]
    second = response_of(client.post(PATH, {"input": outputs, "previous_response_id": first["id"]}))
    assert second["previous_response_id"] == first["id"]
    response_of(client.post(PATH, {"input": "thanks", "previous_response_id": second["id"]}))
    messages = client.engine.chat.calls[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert messages[1]["reasoning_content"] == "hm"
    assert [call["id"] for call in messages[1]["tool_calls"]] == calls
    assert messages[4]["content"] == "sunny"


def test_encrypted_reasoning_comes_back_as_reasoning(ask: Callable[..., Any]) -> None:
    client, answer = ask("<think>hm</think>ok", reasoning="qwen3", include=["reasoning.encrypted_content"], store=False)
    item = response_of(answer)["output"][0]
    sent = {"type": "reasoning", "id": item["id"], "summary": [], "encrypted_content": item["encrypted_content"]}
    response_of(client.post(PATH, {"input": [sent, {"role": "user", "content": "a"}]}))
    assert client.engine.chat.calls[-1]["messages"][0]["reasoning_content"] == "hm"


def test_stored_items_can_be_referred_to(client: Client) -> None:
    item = response_of(client.post(PATH, {"input": "a"}))["output"][0]
    response_of(client.post(PATH, {"input": [{"type": "item_reference", "id": item["id"]}, {"role": "user", "content": "b"}]}))
    assert client.engine.chat.calls[-1]["messages"][0] == {"role": "assistant", "content": "<user>a\n<assistant>"}


def test_stored_response_is_read_and_deleted(client: Client, error_of: ErrorOf) -> None:
    made = response_of(client.post(PATH, {"input": "hi"}))
    assert response_of(client.get(f"{PATH}/{made['id']}")) == made
    assert client.request("DELETE", f"{PATH}/{made['id']}").json() == {"id": made["id"], "object": "response", "deleted": True}
    gone = client.get(f"{PATH}/{made['id']}")
    assert (gone.status_code, error_of(gone)["param"]) == (404, "response_id")


def test_streamed_response_is_stored_like_a_whole_one(client: Client) -> None:
    made = events_of(client.post(PATH, {"input": "hi", "stream": True}).content)[-1]["response"]
    assert client.get(f"{PATH}/{made['id']}").json() == made


def test_response_is_not_stored_without_store(client: Client) -> None:
    made = response_of(client.post(PATH, {"input": "hi", "store": False}))
    assert client.get(f"{PATH}/{made['id']}").status_code == 404


def test_input_items_are_listed_in_pages(client: Client, error_of: ErrorOf) -> None:
    items = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = f"{PATH}/{response_of(client.post(PATH, {'input': items}))['id']}/input_items"
    page = client.get(path, params={"limit": 2, "order": "asc"}).json()
    ResponseItemList.model_validate(page, strict=True)
    assert [item["content"][0]["text"] for item in page["data"]] == ["a", "b"]
    assert page["has_more"] is True
    rest = client.get(path, params={"after": page["last_id"], "order": "asc"}).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["c"]
    assert rest["has_more"] is False
    assert [item["content"][0]["text"] for item in client.get(path).json()["data"]] == ["c", "b", "a"]
    assert error_of(client.get(path, params={"limit": "0"}))["param"] == "limit"
    assert error_of(client.get(path, params={"order": "up"}))["param"] == "order"


def in_one_loop(client: Client, steps: Callable[[httpx.AsyncClient], Any]) -> None:
    """Requests that share an event loop, as a response in the background needs."""

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as http:
            await steps(http)

    asyncio.run(run())


def test_background_response_is_polled_until_it_is_complete(client: Client, engine: ScriptedEngine) -> None:
    async def steps(http: httpx.AsyncClient) -> None:
        engine.hold = True
        made = response_of(await http.post(PATH, json={"input": "hi", "background": True}))
        path = f"{PATH}/{made['id']}"
        assert (made["status"], made["background"], made["usage"]) == ("queued", True, None)
        early = await http.post(PATH, json={"input": "more", "previous_response_id": made["id"]})
        assert early.status_code == 400
        engine.step()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert response_of(await http.get(path))["status"] == "in_progress"
        while engine.live:
            engine.step()
            await asyncio.sleep(0)
        done = response_of(await http.get(path))
        assert (done["status"], text_of(done)) == ("completed", "<user>hi\n<assistant>")
        assert (await http.post(path + "/cancel")).json() == done

    in_one_loop(client, steps)


def test_background_response_is_cancelled_in_the_engine_too(client: Client, engine: ScriptedEngine) -> None:
    async def steps(http: httpx.AsyncClient) -> None:
        engine.hold = True
        made = response_of(await http.post(PATH, json={"input": "hi", "background": True}))
        cancelled = response_of(await http.post(f"{PATH}/{made['id']}/cancel"))
        assert cancelled["status"] == "cancelled"
        assert engine.aborted == ["r0"]
        other = response_of(await http.post(PATH, json={"input": "hi", "background": True}))
        await http.delete(f"{PATH}/{other['id']}")
        assert engine.aborted == ["r0", "r1"]
        assert (await http.get(f"{PATH}/{other['id']}")).status_code == 404

    in_one_loop(client, steps)


def test_background_response_fails_with_the_engine(client: Client, engine: ScriptedEngine) -> None:
    async def steps(http: httpx.AsyncClient) -> None:
        engine.hold = True
        made = response_of(await http.post(PATH, json={"input": "hi", "background": True}))
        engine.submitted[0].end("error", "out of luck")
        await asyncio.sleep(0.01)
        failed = response_of(await http.get(f"{PATH}/{made['id']}"))
        assert (failed["status"], failed["error"]) == ("failed", {"code": "server_error", "message": "out of luck"})

    in_one_loop(client, steps)


def test_background_stream_is_followed_from_any_event_and_outlives_its_client(client: Client, engine: ScriptedEngine) -> None:
    async def steps(http: httpx.AsyncClient) -> None:
        engine.hold = True
        first = Connection(client.app, PATH, {"input": "hi", "background": True, "stream": True})
        await first.first_bytes()
        early = events_of(first.body)
        assert [event["type"] for event in early] == ["response.created", "response.queued"]
        path = f"{PATH}/{early[0]['response']['id']}"
        following = asyncio.create_task(http.get(path, params={"stream": "true", "starting_after": "1"}))
        engine.step()
        first.leave()
        await first.task
        while engine.live:
            engine.step()
            await asyncio.sleep(0)
        late = await following
        whole = events_of((await http.get(path, params={"stream": "true"})).content)
        assert whole[:2] == early
        assert late.content.decode() == "".join(f"event: {event['type']}\ndata: {dump(event)}\n\n" for event in whole[2:])
        assert whole[-1]["response"] == response_of(await http.get(path))
        assert engine.aborted == []

    in_one_loop(client, steps)


def test_background_stream_ends_when_it_is_cancelled(client: Client, engine: ScriptedEngine) -> None:
    async def steps(http: httpx.AsyncClient) -> None:
        engine.hold = True
        connection = Connection(client.app, PATH, {"input": "hi", "background": True, "stream": True})
        await connection.first_bytes()
        response_id = events_of(connection.body)[0]["response"]["id"]
        assert response_of(await http.post(f"{PATH}/{response_id}/cancel"))["status"] == "cancelled"
        await connection.task
        assert engine.aborted == ["r0"]

    in_one_loop(client, steps)


def test_only_background_responses_are_cancelled(client: Client, error_of: ErrorOf) -> None:
    made = response_of(client.post(PATH, {"input": "hi"}))
    assert error_of(client.request("POST", f"{PATH}/{made['id']}/cancel"))["param"] == "response_id"


def test_stream_that_fails_ends_with_a_failed_response(connect: Connect, engine: ScriptedEngine) -> None:
    async def run() -> None:
        engine.hold = True
        connection = connect(PATH, {"input": "hi", "stream": True})
        await engine.submits.wait()
        engine.step()
        await connection.first_bytes()
        engine.submitted[0].end("error", "out of luck")
        await connection.task
        found = events_of(connection.body)
        assert found[-1]["type"] == "response.failed"
        assert found[-1]["response"]["error"] == {"code": "server_error", "message": "out of luck"}

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_takes_the_request_and_the_response_with_it(connect: Connect, engine: ScriptedEngine, stream: bool) -> None:
    async def run() -> None:
        engine.hold = True
        connection = connect(PATH, {"input": "hi", "stream": stream})
        await engine.submits.wait()
        engine.step()
        connection.leave()
        await connection.task
        assert engine.aborted == ["r0"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"input": None}, "input"), ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"), ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "reasoning", "encrypted_content": "?"}]}, "input[0].encrypted_content"),
        ({"input": [{"type": "item_reference", "id": "msg_0"}]}, "input[0].id"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"), ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"), ({"n": 2}, "n"), ({"max_tokens": 5}, "max_tokens"), ({"messages": []}, "messages"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"), ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"), ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "later"}}, "tool_choice.name"),
        ({"tools": FLAT, "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type"),
        ({"include": ["everything"]}, "include[0]"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "middle"}, "truncation"), ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"), ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"), ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {"a": 5}}, "metadata.a"), ({"stream_options": {}}, "stream_options"), ({"temperature": 3}, "temperature"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused_by_name(client: Client, error_of: ErrorOf, options: dict[str, Any], param: str) -> None:
    answer = client.post(PATH, {"input": "hi", **options})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert not client.engine.submitted


def test_harmless_fields_are_taken(client: Client) -> None:
    found = response_of(
        client.post(PATH, {"input": "hi", "user": "u", "tool_choice": "auto", "truncation": "auto", "include": [], "max_tool_calls": 3})
    )
    assert (found["user"], found["truncation"], found["max_tool_calls"]) == ("u", "auto", 3)


def test_only_background_streams_are_followed(client: Client, error_of: ErrorOf) -> None:
    made = response_of(client.post(PATH, {"input": "hi"}))
    assert error_of(client.get(f"{PATH}/{made['id']}", params={"stream": "true"}))["param"] == "stream"
    streamed = events_of(client.post(PATH, {"input": "hi", "background": True, "stream": True}).content)
    path = f"{PATH}/{streamed[0]['response']['id']}"
    assert error_of(client.get(path, params={"stream": "true", "starting_after": "x"}))["param"] == "starting_after"


def make_record(number: int, text: str = "") -> tuple[str, Record]:
    """A record as an answer of one item leaves it."""
    response_id = f"resp_{number}"
    output = [{"id": f"msg_{number}", "type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}]
    response = {"id": response_id, "status": "completed", "output": output}
    return response_id, Record(printer=None, items=[{"role": "user", "content": "a"}], history=[], history_bytes=0, response=response)


def test_store_forgets_the_least_recently_used_beyond_its_count() -> None:
    store = ResponseStore(max_responses=2)
    for number in range(2):
        _, record = make_record(number)
        store.add(record)
        store.settle(record)
    store.get("resp_0")
    _, record = make_record(2)
    store.add(record)
    store.settle(record)
    assert len(store) == 2
    assert store.item("msg_1") is None
    assert store.item("msg_0") is not None
    with pytest.raises(UserError):
        store.get("resp_1")


def test_store_forgets_beyond_its_bytes_and_counts_what_it_holds() -> None:
    store = ResponseStore(max_bytes=3000)
    for number in range(20):
        _, record = make_record(number, "x" * 500)
        store.add(record)
        store.settle(record)
        assert store.num_bytes <= 3000
    held = len(store)
    assert 1 < held < 6
    for number in range(20):
        store.remove(f"resp_{number}")
    assert (len(store), store.num_bytes) == (0, 0)
