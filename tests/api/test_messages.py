"""/v1/messages and /v1/messages/count_tokens: the messages, events and errors of Anthropic's own types; what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pydantic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent

from tests.api.conftest import check_extras
from tests.text.samples import TOOLS, write_calls

if TYPE_CHECKING:
    from tests.api.conftest import Client, Connection, ScriptedEngine

Connect = Callable[..., "Connection"]

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
EVENT: Any = pydantic.TypeAdapter(RawMessageStreamEvent)
HI = [{"role": "user", "content": "hi"}]
MINE: list[dict[str, Any]] = [
    {"name": tool["function"]["name"], "description": "d", "input_schema": tool["function"]["parameters"]} for tool in TOOLS
]
TWO = write_calls("hermes", [("get_weather", {"city": "Paris"}), ("now", {})])
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def message_of(answer: httpx.Response) -> dict[str, Any]:
    """The message; asserts its type, strictly."""
    assert answer.status_code == 200, answer.text
    check_extras(Message.model_validate_json(answer.content, strict=True))
    return answer.json()


def events_of(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream; asserts their types, strictly, and their framing."""
    frames = body.decode().split("\n\n")
    assert frames.pop() == "", "the last frame must be whole"
    found: list[dict[str, Any]] = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            check_extras(EVENT.validate_json(data.removeprefix("data: "), strict=True))
        found.append(event)
    return found


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object of a refusal; asserts its shape."""
    body = answer.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    return body["error"]


@pytest.fixture
def ask(talkative: Callable[..., Client]) -> Callable[..., tuple[Client, httpx.Response]]:
    """A client, and its answer to a request answered with these texts."""

    def send(*replies: str, reasoning: str = "none", **options: Any) -> tuple[Client, httpx.Response]:
        client = talkative(*replies, reasoning=reasoning)
        return client, client.post(PATH, {"messages": HI, "max_tokens": 1000, **options})

    return send


def test_message_has_the_shape_of_anthropic(client: Client) -> None:
    options = {"system": "be brief", "max_tokens": 50, "metadata": {"user_id": "u"}}
    found = message_of(client.post(PATH, {"model": "org/byte-model", "messages": HI, **options}))
    assert found["id"].startswith("msg_")
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", "org/byte-model")
    assert found["content"] == [{"type": "text", "text": "<system>be brief\n<user>hi\n<assistant>"}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    usage = found["usage"]
    assert usage == {"input_tokens": 34, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3, "output_tokens": 38}


def test_stream_has_the_order_of_anthropic(client: Client) -> None:
    found = events_of(client.post(PATH, {"messages": HI, "max_tokens": 50, "stream": True}).content)
    kinds = [event["type"] for event in found]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert found[0]["message"]["content"] == []
    assert found[0]["message"]["usage"]["input_tokens"] == 17
    assert "".join(event["delta"]["text"] for event in found[3:-3]) == "<user>hi\n<assistant>"
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 21


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    {"tool_choice": {"type": "any"}},
    {"tool_choice": {"type": "tool", "name": "now"}},
    {"tool_choice": {"type": "none"}},
    {"max_tokens": 30},
    {"stop_sequences": ["Paris"]},
    {"thinking": {"type": "adaptive", "display": "omitted"}},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reply", [TWO, f"<think>hm</think>\nWell. {TWO}", "<think>hm", "Text with < and <tool.", ""])
def test_stream_adds_up_to_the_whole_message(ask: Callable[..., Any], reply: str, options: dict[str, Any]) -> None:
    whole = message_of(ask(reply, reasoning="qwen3", tools=MINE, **options)[1])
    found = events_of(ask(reply, reasoning="qwen3", tools=MINE, **options, stream=True)[1].content)
    blocks: list[dict[str, Any]] = []
    for event in found:
        match event:
            case {"type": "content_block_start", "index": index, "content_block": block}:
                assert index == len(blocks)
                blocks.append({**block, "json": ""})
            case {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": text}}:
                blocks[-1]["json"] += text
            case {"type": "content_block_delta", "delta": {"type": kind, **members}}:
                ((member, text),) = members.items()
                assert kind == f"{member}_delta"
                blocks[-1][member] += text
    for block, expected in zip(blocks, whole["content"], strict=True):
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = expected["input"] if whole["stop_reason"] in ("max_tokens", "stop_sequence") else json.loads(text)
            block["id"] = expected["id"]
        assert block == expected
    assert found[-2]["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
    assert found[-2]["usage"] == whole["usage"]


def test_calls_are_blocks_of_their_own(ask: Callable[..., Any]) -> None:
    found = message_of(ask("Hm. " + TWO, tools=MINE)[1])
    text, first, second = found["content"]
    assert text == {"type": "text", "text": "Hm."}
    assert (first["name"], first["input"], second["name"], second["input"]) == ("get_weather", {"city": "Paris"}, "now", {})
    assert first["id"].startswith("toolu_")
    assert found["stop_reason"] == "tool_use"


def test_forced_call_of_one_tool_is_a_tool_use(ask: Callable[..., Any]) -> None:
    client, answer = ask(write_calls("hermes", [("now", {})]), tools=MINE, tool_choice={"type": "tool", "name": "now"})
    assert message_of(answer)["stop_reason"] == "tool_use"
    assert client.engine.calls[0]["params"].structured_outputs is not None


def test_thinking_is_a_block_with_a_signature(ask: Callable[..., Any]) -> None:
    client, answer = ask("<think>hm</think>ok", reasoning="qwen3", thinking={"type": "enabled", "budget_tokens": 512})
    thinking, text = message_of(answer)["content"]
    assert (thinking["type"], thinking["thinking"], text["text"]) == ("thinking", "hm", "ok")
    assert thinking["signature"]
    assert client.engine.calls[0]["params"].thinking_token_budget == 512
    assert client.engine.chat.calls[0]["kwargs"] == {"enable_thinking": True, "thinking": True}
    message_of(client.post(PATH, {"messages": HI, "max_tokens": 9, "thinking": {"type": "disabled"}}))
    assert client.engine.chat.calls[1]["kwargs"] == {"enable_thinking": False, "thinking": False}


def test_thinking_is_not_shown_when_it_is_omitted(ask: Callable[..., Any]) -> None:
    found = message_of(ask("<think>hm</think>ok", reasoning="qwen3", thinking={"type": "adaptive", "display": "omitted"})[1])
    assert [block["type"] for block in found["content"]] == ["text"]


def test_stop_reason_names_limits_and_sequences(ask: Callable[..., Any]) -> None:
    limited = message_of(ask("abcdef", max_tokens=3)[1])
    assert (limited["stop_reason"], limited["content"][0]["text"]) == ("max_tokens", "abc")
    stopped = message_of(ask("abcdef", stop_sequences=["x", "de"])[1])
    assert (stopped["stop_reason"], stopped["stop_sequence"], stopped["usage"]["output_tokens"]) == ("stop_sequence", "de", 5)


def test_call_that_is_cut_off_has_no_input(ask: Callable[..., Any]) -> None:
    found = message_of(ask(TWO, tools=MINE, max_tokens=len('<tool_call>\n{"name": "get_weather", "arguments": {"ci'))[1])
    assert (found["stop_reason"], found["content"][0]["input"]) == ("max_tokens", {})


def test_blocks_become_the_messages_of_the_template(client: Client) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "t1", "name": "now", "input": {}},
                {"type": "tool_use", "id": "t2", "name": "get_weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "noon"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "sun"}], "is_error": True},
                {"type": "text", "text": "go on"},
            ],
        },
        {"role": "assistant", "content": "d"},
    ]
    client.engine.served.max_len = 4000
    system = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    message_of(client.post(PATH, {"messages": messages, "system": system, "max_tokens": 5}))
    calls = [
        {"type": "function", "id": "t1", "function": {"name": "now", "arguments": {}}},
        {"type": "function", "id": "t2", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}},
    ]
    error = [{"type": "text", "text": "Error:"}, {"type": "text", "text": "sun"}]
    rendered = client.engine.chat.calls[-1]
    assert rendered["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_call_id": "t1", "name": "now"},
        {"role": "tool", "content": error, "tool_call_id": "t2", "name": "get_weather"},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "d"},
    ]
    assert rendered["continue_final_message"], "an answer that has been begun goes on"


def test_tools_are_given_to_the_template_as_functions(client: Client) -> None:
    tool = {**MINE[1], "cache_control": {"type": "ephemeral"}, "type": "custom"}
    message_of(client.post(PATH, {"messages": HI, "max_tokens": 5, "tools": [tool]}))
    assert client.engine.chat.calls[-1]["tools"] == [
        {"type": "function", "function": {"name": "now", "description": "d", "parameters": MINE[1]["input_schema"]}}
    ]


def test_format_of_the_output_is_enforced(client: Client) -> None:
    config = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "high"}
    message_of(client.post(PATH, {"messages": HI, "max_tokens": 5, "output_config": config}))
    (spec,) = client.engine.served.grammars.compiled
    assert (spec.json, spec.source) == (SCHEMA, "output_config.format")
    assert client.engine.chat.calls[-1]["kwargs"] == {"reasoning_effort": "high", "enable_thinking": True}


def test_sampling_parameters_reach_the_engine(client: Client) -> None:
    message_of(client.post(PATH, {"messages": HI, "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": ["x"]}))
    params = client.engine.calls[0]["params"]
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.stop) == (5, 0.5, 0.9, 7, ("x",))


def test_count_is_that_of_the_message(client: Client) -> None:
    counted = client.post(COUNT, {"model": "org/byte-model", "messages": HI, "system": "be brief", "tools": MINE})
    MessageTokensCount.model_validate_json(counted.content, strict=True)
    usage = message_of(client.post(PATH, {"messages": HI, "system": "be brief", "tools": MINE, "max_tokens": 5}))["usage"]
    assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert len(client.engine.submitted) == 1


def test_stream_that_fails_ends_with_an_error(connect: Connect, engine: ScriptedEngine) -> None:
    async def run() -> None:
        engine.hold = True
        connection = connect(PATH, {"messages": HI, "max_tokens": 50, "stream": True})
        await engine.submits.wait()
        engine.step()
        await connection.first_bytes()
        engine.submitted[0].end("error", "out of luck")
        await connection.task
        assert events_of(connection.body)[-1] == {"type": "error", "error": {"type": "api_error", "message": "out of luck"}}

    asyncio.run(run())


def test_message_that_the_operator_ends_is_paused(connect: Connect, engine: ScriptedEngine) -> None:
    async def run() -> None:
        engine.hold = True
        connection = connect(PATH, {"messages": HI, "max_tokens": 50, "stream": True})
        await engine.submits.wait()
        engine.step()
        await connection.first_bytes()
        engine.submitted[0].end("abort")
        await connection.task
        assert events_of(connection.body)[-2]["delta"]["stop_reason"] == "pause_turn"

    asyncio.run(run())


def test_client_that_leaves_takes_the_request_with_it(connect: Connect, engine: ScriptedEngine) -> None:
    async def run() -> None:
        engine.hold = True
        connection = connect(PATH, {"messages": HI, "max_tokens": 50})
        await engine.submits.wait()
        connection.leave()
        await connection.task
        assert engine.aborted == ["r0"]

    asyncio.run(run())


def block(**members: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [members]}]}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": None}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (block(type="image", source={}), "messages[0].content[0].type"), (block(type="document"), "messages[0].content[0].type"),
        (block(type="tool_use", id="t", name="f", input={}), "messages[0].content[0].type"), (block(), "messages[0].content[0].type"),
        (block(type="text"), "messages[0].content[0].text"), (block(type="tool_result"), "messages[0].content[0].tool_use_id"),
        (block(type="tool_result", tool_use_id="t", content=[{"type": "image"}]), "messages[0].content[0].content[0].type"),
        ({"system": 5}, "system"), ({"system": [{"type": "image"}]}, "system[0].type"), ({"stop_sequences": [5]}, "stop_sequences[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"), ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"), ({"tools": MINE, "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": MINE, "tool_choice": {"type": "tool"}}, "tool_choice.name"), ({"tools": MINE, "tool_choice": {}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"), ({"thinking": {}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 20}}, "thinking.budget_tokens"), ({"temperature": 3}, "temperature"),
        ({"output_config": {"effort": "none"}}, "output_config.effort"), ({"n": 2}, "n"), ({"stop": ["x"]}, "stop"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"), ({"metadata": 5}, "metadata"),
        ({"mcp_servers": [{}]}, "mcp_servers"), ({"container": "x"}, "container"), ({"logprobs": True}, "logprobs"),
    ],
)  # fmt: skip
def test_bad_fields_are_refused_by_name(client: Client, options: dict[str, Any], named: str) -> None:
    answer = client.post(PATH, {"messages": HI, "max_tokens": 20, **options})
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith((named + " ", named + "="))
    assert not client.engine.submitted


def test_errors_have_the_shape_and_status_of_anthropic(make_client: Callable[..., Client]) -> None:
    client = make_client(api_key=["secret"], max_body_bytes=2000)
    body = {"messages": HI, "max_tokens": 5}
    right, wrong = {"x-api-key": "secret"}, {"x-api-key": "no"}
    bearer = {"authorization": "Bearer secret"}
    assert client.post(PATH, body, headers=right).status_code == client.post(PATH, body, headers=bearer).status_code == 200
    refused = client.post(PATH, body, headers=wrong)
    assert (refused.status_code, error_of(refused)["type"]) == (401, "authentication_error")
    missing = client.post(PATH, {**body, "model": "other"}, headers=right)
    assert (missing.status_code, error_of(missing)["type"]) == (404, "not_found_error")
    large = client.post(PATH, {**body, "system": "x" * 3000}, headers=right)
    assert (large.status_code, error_of(large)["type"]) == (413, "request_too_large")
    client.engine.capacity = 0
    full = client.post(PATH, body, headers=right)
    assert (full.status_code, error_of(full)["type"]) == (429, "rate_limit_error")
    client.engine.state.phase = "compiling"
    unready = client.post(PATH, body, headers=right)
    assert (unready.status_code, error_of(unready)["type"]) == (503, "overloaded_error")
    broken = client.request("POST", PATH, content=b"{", headers={**right, "content-type": "application/json"})
    assert error_of(broken)["type"] == "overloaded_error"


def test_errors_of_the_template_have_the_shape_of_anthropic(client: Client) -> None:
    client.engine.chat.refuses.add("system")
    assert error_of(client.post(COUNT, {"messages": HI, "system": "x"}))["type"] == "invalid_request_error"
