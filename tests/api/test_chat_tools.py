"""Tools and reasoning in chat completions: what is refused, what the engine is asked for, and the answers, whole and streamed."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from jaxserve.config import ServerConfig
from jaxserve.text.reasoning import REASONING_FORMATS
from jaxserve.text.tools import TOOL_FORMATS
from tests.text.samples import TOOLS, dump, write_calls

if TYPE_CHECKING:
    from tests.api.conftest import Client

Events = Callable[[bytes], list[dict[str, Any]]]
ErrorOf = Callable[[httpx.Response], dict[str, Any]]
MakeClient = Callable[..., "Client"]
NAMED = {"type": "function", "function": {"name": "now"}}
PARIS = ("get_weather", {"city": "Paris"})
TWO = write_calls("hermes", [PARIS, ("now", {})])


@pytest.fixture
def ask(make_client: MakeClient) -> Callable[..., Any]:
    """The choices of a request with tools, answered with these texts."""

    def send(*replies: str, parser: str = "hermes", reasoning: str = "none", template: str | None = None, **options: Any) -> Any:
        client = make_client(tool_call_parser=parser, reasoning_parser=reasoning)
        client.engine.replies = list(replies)
        client.engine.chat.source = template
        client.engine.served.max_len = 4000
        response = client.chat("hi", **{"tools": TOOLS, **options})
        assert response.status_code == 200, response.text
        return client, response

    return send


def choice(answer: tuple[Any, httpx.Response], index: int = 0) -> dict[str, Any]:
    return answer[1].json()["choices"][index]


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", ())]


def test_answer_with_calls_has_the_shape_of_openai(ask: Callable[..., Any]) -> None:
    found = choice(ask(TWO))
    message = found["message"]
    assert found["finish_reason"] == "tool_calls"
    assert set(message) == {"role", "content", "refusal", "tool_calls"}
    assert message["content"] is None
    assert calls_of(message) == [PARIS, ("now", {})]
    assert all(call["type"] == "function" and call["id"].startswith("chatcmpl-tool-") for call in message["tool_calls"])
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_functions_are_tools_whose_one_call_is_shown_as_it_once_was(ask: Callable[..., Any], events: Events) -> None:
    functions = {"tools": None, "functions": [tool["function"] for tool in TOOLS]}
    found = choice(ask(TWO, **functions))
    assert (found["finish_reason"], found["message"]["content"], "tool_calls" in found["message"]) == ("function_call", None, False)
    called = found["message"]["function_call"]
    assert (called["name"], json.loads(called["arguments"])) == PARIS
    deltas = [event["choices"][0]["delta"] for event in events(ask(TWO, stream=True, **functions)[1].content)]
    pieces = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert "".join(piece.get("name", "") for piece in pieces) == PARIS[0]
    assert json.loads("".join(piece["arguments"] for piece in pieces)) == PARIS[1]
    assert not any("tool_calls" in delta for delta in deltas)
    named = choice(ask(write_calls("hermes", [PARIS]), **functions, function_call={"name": PARIS[0]}))
    assert named["finish_reason"] in ("stop", "length")
    refused = choice(ask(TWO, **functions, function_call="none"))
    assert refused["message"]["content"] and "function_call" not in refused["message"]


def test_stream_of_calls_has_the_shape_of_openai(ask: Callable[..., Any], events: Events) -> None:
    answer = ask("Hm. " + TWO, stream=True, stream_options={"include_usage": True})
    first, *chunks, finish, usage = events(answer[1].content)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert finish["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "tool_calls", "stop_reason": None}]
    assert usage["choices"] == []
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    assert "".join(delta.get("content", "") for delta in deltas) == "Hm."
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", ())]
    begins = [piece for piece in pieces if "id" in piece]
    assert [piece["index"] for piece in begins] == [0, 1]
    for piece in begins:
        assert set(piece) == {"index", "id", "type", "function"}
        assert (piece["type"], piece["function"]["arguments"]) == ("function", "")
    assert all(set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"} for piece in pieces if "id" not in piece)
    arguments = ["".join(piece["function"]["arguments"] for piece in pieces if piece["index"] == index) for index in (0, 1)]
    assert arguments == ['{"city": "Paris"}', "{}"]
    assert sum(piece["index"] == 0 for piece in pieces) > 5


REPLIES = (
    TWO,
    "Just text with < and <tool.",
    f"Before {TWO} after",
    '<tool_call>{"name": "now", "arguments": {"a": 1',
    "<tool_call>no</tool_call>",
    "",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"parallel_tool_calls": False},
    {"logprobs": True, "top_logprobs": 2},
    {"return_token_ids": True},
    {"max_tokens": 30},
    {"echo": True},
    {"tool_choice": "required"},
    {"tool_choice": NAMED},
    {"tool_choice": "none"},
    {"stop": ["Paris"]},
    {"include_reasoning": False},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reasoning", ["none", "qwen3"])
def test_stream_adds_up_to_the_whole_answer(ask: Callable[..., Any], events: Events, options: dict[str, Any], reasoning: str) -> None:
    replies = [f"<think>hm</think>\n{reply}" for reply in REPLIES] if reasoning == "qwen3" else REPLIES
    whole = ask(*replies, reasoning=reasoning, n=len(replies), **options)[1].json()
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(ask(*replies, reasoning=reasoning, n=len(replies), **options, **usage)[1].content)
    assert last["usage"] == whole["usage"]
    for expected in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == expected["index"]]
        message = expected["message"]
        assert "".join(one["delta"].get("content", "") for one in own) == (message["content"] or "")
        for name in ("reasoning", "reasoning_content"):
            assert "".join(one["delta"].get(name, "") for one in own) == message.get(name, "")
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == [expected["finish_reason"]]
        calls: list[tuple[str, str]] = []
        for piece in (piece for one in own for piece in one["delta"].get("tool_calls", ())):
            if "id" in piece:
                calls.append((piece["function"]["name"], ""))
            calls[-1] = (calls[-1][0], calls[-1][1] + piece["function"]["arguments"])
        assert calls == [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
        entries = [entry for one in own for entry in (one["logprobs"] or {}).get("content", [])]
        assert entries == (expected["logprobs"] or {}).get("content", [])
        assert [token for one in own for token in one.get("token_ids", ())] == expected.get("token_ids", [])
        assert ("reasoning" in message) == (reasoning == "qwen3" and options.get("include_reasoning", True))


def test_call_cut_off_by_max_tokens_ends_with_length(ask: Callable[..., Any]) -> None:
    found = choice(ask(TWO, max_tokens=len('<tool_call>\n{"name": "get_weather", "arguments": {"ci')))
    assert found["finish_reason"] == "length"
    assert found["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"ci'}


def test_only_one_call_is_shown_without_parallel_calls(ask: Callable[..., Any]) -> None:
    assert calls_of(choice(ask(TWO, parallel_tool_calls=False))["message"]) == [PARIS]


def test_text_without_calls_stays_as_it_is(ask: Callable[..., Any]) -> None:
    found = choice(ask("Nothing\nto call. \n"))
    assert (found["message"], found["finish_reason"]) == ({"role": "assistant", "content": "Nothing\nto call. \n", "refusal": None}, "stop")


def test_tools_are_rendered_and_not_parsed_without_a_parser_or_with_choice_none(ask: Callable[..., Any]) -> None:
    for options in ({"parser": "none"}, {"parser": "auto"}, {"tool_choice": "none"}):
        client, response = ask(TWO, **options)
        assert response.json()["choices"][0]["message"]["content"] == TWO
        assert [tool["function"]["name"] for tool in client.engine.chat.calls[0]["tools"]] == ["get_weather", "now"]


def test_parsers_are_chosen_by_the_chat_template(ask: Callable[..., Any]) -> None:
    template = "<tool_call>\n<function=f>\n<parameter=a> ... </think>"
    text = f"<think>hm</think>{write_calls('qwen3_coder', [PARIS])}"
    message = choice(ask(text, parser="auto", reasoning="auto", template=template))["message"]
    assert calls_of(message) == [PARIS]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("hm", "hm", None)


def test_reasoning_is_found_without_tools_too(ask: Callable[..., Any]) -> None:
    message = choice(ask("<think>hm</think>Yes.", reasoning="qwen3", tools=None))["message"]
    assert message == {"role": "assistant", "content": "Yes.", "refusal": None, "reasoning": "hm", "reasoning_content": "hm"}
    hidden = choice(ask("<think>hm</think>Yes.", reasoning="qwen3", tools=None, include_reasoning=False))["message"]
    assert hidden == {"role": "assistant", "content": "Yes.", "refusal": None}
    cut = choice(ask("<think>hm", reasoning="qwen3", tools=None, max_tokens=9))["message"]
    assert (cut["content"], cut["reasoning"]) == (None, "hm"[:2])


def test_tokens_of_reasoning_are_counted_whether_shown_or_not(ask: Callable[..., Any], make_client: MakeClient) -> None:
    for shown in (True, False):
        body = ask("<think>hm</think>Yes.", "<think>oh", reasoning="qwen3", tools=None, n=2, include_reasoning=shown)[1].json()
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert "completion_tokens_details" not in ask("<think>hm</think>", tools=None)[1].json()["usage"]
    client = make_client(reasoning_parser="qwen3")
    client.engine.replies = ["<think>hm</think>Yes.", "<think>oh!</think>"]
    body = client.post("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "a"}]] * 2}).json()
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}


def test_continued_reasoning_goes_on_as_reasoning(make_client: MakeClient) -> None:
    client = make_client(reasoning_parser="qwen3")
    client.engine.replies = [" more</think>Yes."]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>some"}]
    body = client.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True}).json()
    assert body["choices"][0]["message"]["reasoning"] == " more"
    assert body["choices"][0]["message"]["content"] == "Yes."


def test_mistral_gets_short_ids_and_kimi_its_own(ask: Callable[..., Any]) -> None:
    short = choice(ask(write_calls("mistral", [PARIS]), parser="mistral"))["message"]["tool_calls"][0]["id"]
    assert len(short) == 9
    assert short.isalnum()
    own = choice(ask(write_calls("kimi_k2", [PARIS]), parser="kimi_k2"))["message"]["tool_calls"][0]["id"]
    assert own == "functions.get_weather:0"


def test_special_tokens_in_markers_stay_in_the_text(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.api.conftest.ByteTokenizer.special_ids", frozenset({60, 65}))
    client, _ = ask("x")
    assert client.engine.calls[0]["params"].shown_special_ids == {60}  # <
    client, _ = ask("x", tool_choice="none")
    assert client.engine.calls[0]["params"].shown_special_ids == frozenset()


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "later"}}, "tools": TOOLS}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "function", "function": {}}, "tools": TOOLS}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice.function"),
        ({"tool_choice": {"function": {"name": "now"}}, "tools": TOOLS}, "tool_choice.type"),
        ({"tool_choice": NAMED}, "tool_choice"), ({"tool_choice": "required"}, "tool_choice"), ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "any", "tools": TOOLS}, "tool_choice"), ({"tool_choice": 5, "tools": TOOLS}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"), ({"include_reasoning": 1}, "include_reasoning"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ],
)  # fmt: skip
def test_bad_tools_are_refused_by_name(client: Client, error_of: ErrorOf, options: dict[str, Any], param: str) -> None:
    response = client.chat("hi", **options)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert client.engine.submitted == []


def test_auto_is_refused_when_the_server_says_so(make_client: MakeClient, error_of: ErrorOf) -> None:
    client = make_client(enable_auto_tool_choice=False)
    assert error_of(client.chat("hi", tools=TOOLS))["param"] == "tool_choice"
    assert client.chat("hi", tools=TOOLS, tool_choice="none", max_tokens=1).status_code == 200


def test_tool_is_rendered_as_the_client_wrote_it(client: Client) -> None:
    function = {"parameters": {"$defs": {"A": {"type": "null"}}, "type": "object"}, "strict": True, "name": "f", "x-extra": [1]}
    assert client.chat("hi", tools=[{"type": "function", "function": function}], max_tokens=1).status_code == 200
    shown = client.engine.chat.calls[0]["tools"][0]["function"]
    assert list(shown) == ["parameters", "name", "x-extra", "description"]
    assert {**shown, "strict": True, "description": ""} == {**function, "description": ""}


@pytest.mark.parametrize(("tool_choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_call_that_must_come_is_constrained(ask: Callable[..., Any], tool_choice: Any, reason: str) -> None:
    client, response = ask(write_calls("hermes", [("now", {})]), tool_choice=tool_choice)
    found = response.json()["choices"][0]
    assert found["finish_reason"] == reason
    assert calls_of(found["message"]) == [("now", {})]
    (spec,) = client.engine.served.grammars.compiled
    assert spec.source == "tools"
    names = ["now"] if tool_choice is NAMED else ["get_weather", "now"]
    assert [name for name in ("get_weather", "now") if name in dump(spec.structural_tag)] == names


def test_strict_tools_are_constrained_unless_the_client_wants_another_form(ask: Callable[..., Any]) -> None:
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    client, _ = ask("x", tools=strict)
    assert [spec.source for spec in client.engine.served.grammars.compiled] == ["tools"]
    client, _ = ask("x", tools=strict, response_format={"type": "json_object"})
    assert [spec.source for spec in client.engine.served.grammars.compiled] == ["response_format"]
    for options in ({"parser": "none"}, {"tool_choice": "none"}):
        client, _ = ask("x", tools=strict, **options)
        assert client.engine.served.grammars.compiled == []


def test_forced_calls_that_are_cut_off_before_their_name_leave_no_content(ask: Callable[..., Any]) -> None:
    begun = write_calls("hermes", [PARIS]) + '\n<tool_call>\n{"name'
    found = choice(ask(begun + "...", tool_choice="required", max_tokens=len(begun)))
    assert (found["message"]["content"], calls_of(found["message"]), found["finish_reason"]) == (None, [PARIS], "length")


def test_fenced_calls_are_found_but_where_strict_tools_bind_their_form(ask: Callable[..., Any]) -> None:
    fenced = '```json\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n```'
    assert calls_of(choice(ask(fenced))["message"]) == [PARIS]
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    assert choice(ask(fenced, tools=strict))["message"]["content"] == fenced


def test_form_of_the_client_leaves_room_for_reasoning(make_client: MakeClient) -> None:
    client = make_client(reasoning_parser="deepseek_r1")
    client.engine.replies = ["<think>hm</think>{}", "{}"]
    message = client.chat("hi", response_format={"type": "json_object"}).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", "{}")
    (spec,) = client.engine.served.grammars.compiled
    assert (spec.source, spec.json_object, spec.structural_tag["type"]) == ("response_format", None, "structural_tag")
    # Where it cannot, the answer is content from its first letter.
    bare = {"json": "{}"}
    assert client.chat("hi", structured_outputs=bare).json()["choices"][0]["message"]["content"] == "{}"
    assert client.engine.served.grammars.compiled[1].json == "{}"


def test_call_that_must_come_needs_no_parser(ask: Callable[..., Any]) -> None:
    text = '[{"name": "get_weather", "parameters": {"city": "Paris"}}]'
    assert calls_of(choice(ask(text, parser="none", tool_choice="required"))["message"]) == [PARIS]


def test_options_name_all_parsers() -> None:
    hints = typing.get_type_hints(ServerConfig)
    assert set(typing.get_args(hints["tool_call_parser"])) == {"auto", "none", *(form.name for form in TOOL_FORMATS)}
    assert set(typing.get_args(hints["reasoning_parser"])) == {"auto", "none", "openai_gptoss", *(form.name for form in REASONING_FORMATS)}
