"""POST /v1/chat/completions: shapes, fields, prompts, streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Client, ScriptedEngine

Events = Callable[[bytes], list[dict[str, Any]]]
PROMPT = "<user>héllo\n<assistant>"


def test_answer_has_the_shape_of_openai(client: Client) -> None:
    response = client.chat("héllo", model="org/byte-model")
    body = response.json()
    assert response.status_code == 200
    assert set(body) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "org/byte-model")
    message = {"role": "assistant", "content": PROMPT, "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    sampled, prompt = len(PROMPT.encode()) + 1, len(PROMPT.encode())
    details = {"cached_tokens": 3}
    assert body["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled, "prompt_tokens_details": details,
    }  # fmt: skip


def test_stream_begins_with_the_role_and_ends_with_finish_and_usage(client: Client, events: Events) -> None:
    response = client.chat("héllo", stream=True, stream_options={"include_usage": True}, max_tokens=9)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    first, *middle, finish, usage = events(response.content)
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]
    assert finish["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length", "stop_reason": None}]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 9
    # The é of two tokens comes as one piece, and no delta is empty.
    assert [event["choices"][0]["delta"] for event in middle] == [{"content": piece} for piece in "<user>hé"]
    heads = {tuple(event[name] for name in ("id", "object", "created", "model")) for event in (first, *middle, finish, usage)}
    assert len(heads) == 1
    assert all("usage" not in event for event in (first, *middle, finish))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_tokens": 7}, {"logprobs": True, "top_logprobs": 2}, {"stop": [">h", "zzz"]},
        {"stop": "r>", "include_stop_str_in_output": True},
        {"stop_token_ids": [ord("r")]}, {"ignore_eos": True, "max_tokens": 60}, {"min_tokens": 40}, {"max_completion_tokens": 3},
        {"return_token_ids": True}, {"echo": True},
        {"stream_interval": 4, "return_token_ids": True}, {"stream_interval": 1000, "logprobs": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("n", [1, 3])
def test_stream_adds_up_to_the_whole_answer(client: Client, events: Events, options: dict[str, Any], n: int) -> None:
    messages = [{"role": "user", "content": "héllo 😀"}, {"role": "assistant", "content": "pre"}]
    payload = {"messages": messages, "n": n, **options}
    whole = client.post("/v1/chat/completions", payload).json()
    streamed = client.post("/v1/chat/completions", {**payload, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, last = events(streamed.content)
    assert last["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1].get("stop_reason") == choice["stop_reason"]
        entries = [entry for one in own for entry in (one["logprobs"] or {}).get("content", [])]
        assert entries == (choice["logprobs"] or {}).get("content", [])
        assert list(itertools.chain.from_iterable(one.get("token_ids", ()) for one in own)) == choice.get("token_ids", [])


def test_logprobs_have_token_bytes_and_finite_values(client: Client) -> None:
    choice = client.chat("é", logprobs=True, top_logprobs=3, max_tokens=7).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert entries[6]["bytes"] == [0xC3]
    assert entries[0]["token"] == "<"
    assert entries[0]["logprob"] == -0.5
    assert [top["logprob"] for top in entries[0]["top_logprobs"]] == [-0.25, -0.5, -9999.0]
    plain = client.chat("é", logprobs=True, max_tokens=1, return_tokens_as_token_ids=True).json()["choices"][0]["logprobs"]["content"]
    assert plain == [{"token": f"token_id:{ord('<')}", "logprob": -0.5, "bytes": [ord("<")], "top_logprobs": []}]


def test_prompt_logprobs_have_the_shape_of_vllm(client: Client) -> None:
    found = client.chat("a", prompt_logprobs=1, max_tokens=1).json()["prompt_logprobs"]
    assert found[0] is None
    assert found[1] == {
        str(ord("u")): {"logprob": -0.5, "rank": 2, "decoded_token": "u"},
        str(ord("v")): {"logprob": -0.25, "rank": 1, "decoded_token": "v"},
    }


def test_token_ids_are_returned_when_asked_for(client: Client, events: Events) -> None:
    body = client.chat("a", return_token_ids=True, max_tokens=2).json()
    assert body["prompt_token_ids"] == list(b"<user>a\n<assistant>")
    assert body["choices"][0]["token_ids"] == list(b"<u")
    first, second, *_ = events(client.chat("a", return_token_ids=True, max_tokens=2, stream=True).content)
    assert first["prompt_token_ids"] == body["prompt_token_ids"]
    assert second["choices"][0]["token_ids"] == [ord("<")]


def test_prompt_text_is_what_the_template_printed(client: Client, events: Events) -> None:
    text = "<user>a\n<assistant>"
    body = client.chat("a", return_prompt_text=True, truncate_prompt_tokens=3, max_tokens=2).json()
    assert (body["prompt_text"], "prompt_token_ids" in body) == (text, False)
    assert "prompt_text" not in client.chat("a", max_tokens=2).json()
    chunks = events(client.chat("a", return_prompt_text=True, max_tokens=2, n=2, stream=True).content)
    assert [chunk.get("prompt_text") for chunk in chunks] == [text] + [None] * (len(chunks) - 1)


@pytest.mark.parametrize("path", ["chat", "complete"])
def test_events_have_as_many_tokens_as_asked_for_but_the_first_and_the_last(client: Client, events: Events, path: str) -> None:
    options = {"stream": True, "stream_interval": 4, "max_tokens": 10, "ignore_eos": True, "return_token_ids": True}
    chunks = events(getattr(client, path)("abcdefghijkl", **options).content)
    sizes = [len(choice["token_ids"]) for chunk in chunks if "token_ids" in (choice := chunk["choices"][0])]
    assert sizes == [1, 4, 4, 1]


def test_continuous_usage_is_in_every_chunk(client: Client, events: Events) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(client.chat("a", stream=True, stream_options=options, max_tokens=3).content)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_server_may_tell_usage_whether_asked_or_not(make_client: Callable[..., Client], events: Events, path: str) -> None:
    client = make_client(enable_force_include_usage=True)
    prompt = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"}
    chunks = events(client.post(path, {**prompt, "stream": True, "max_tokens": 2}).content)
    assert all("usage" in chunk for chunk in chunks)
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 2)
    assert client.post(path, {**prompt, "max_tokens": 2}).json()["usage"]["completion_tokens"] == 2


def test_messages_of_every_role_reach_the_template_in_its_terms(client: Client, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "developer", "content": "d", "name": "dev"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "assistant", "function_call": {"name": "g", "arguments": ""}, "reasoning": "hm"},
        {"role": "function", "name": "g", "content": "8", "unknown": 1},
    ]
    engine.served.max_len = 1000
    assert client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).status_code == 200
    assert engine.chat.calls[0]["messages"] == [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "developer", "content": "d", "name": "dev"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}, "id": "c1"}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {}}}],
        },
        {"role": "tool", "content": "8", "name": "g"},
    ]


@pytest.mark.parametrize("arguments", ["{", "[1]", "not json", "1", '{"a":' * 100])
def test_arguments_that_a_model_once_got_wrong_do_not_end_the_conversation(client: Client, engine: ScriptedEngine, arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "no", "tool_call_id": "c1"}]
    engine.served.max_len = 1000
    assert client.post("/v1/chat/completions", {"messages": messages, "max_tokens": 1}).status_code == 200
    assert engine.chat.calls[0]["messages"][0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_thoughts_among_the_parts_of_a_message_are_its_reasoning(client: Client, engine: ScriptedEngine) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "so"}]
    assert client.post("/v1/chat/completions", {"messages": [{"role": "assistant", "content": parts}], "max_tokens": 1}).status_code == 200
    expected = {"role": "assistant", "content": [{"type": "text", "text": "so"}], "reasoning_content": "hm"}
    assert engine.chat.calls[0]["messages"] == [expected]


def test_template_options_reach_the_template(client: Client, engine: ScriptedEngine) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    payload = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so"}], "max_tokens": 1,
        "continue_final_message": True,
        "chat_template_kwargs": {"enable_thinking": False}, "documents": [{"title": "t", "text": "x"}], "tools": tools,
        "tool_choice": "none",
        "reasoning_effort": "low",
    }  # fmt: skip
    assert client.post("/v1/chat/completions", payload).status_code == 200
    call = engine.chat.calls[0]
    assert (call["add_generation_prompt"], call["continue_final_message"]) == (False, True)
    assert call["tools"] == [
        {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}
    ]
    assert call["kwargs"] == {"enable_thinking": False, "documents": [{"title": "t", "text": "x"}], "reasoning_effort": "low"}


def test_sampling_fields_reach_the_engine(client: Client, engine: ScriptedEngine) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "presence_penalty": 0.3, "frequency_penalty": -0.4,
        "repetition_penalty": 1.2,
        "seed": 2**63 - 1, "min_tokens": 2, "stop": ["x", "y"], "stop_token_ids": [1, 2], "ignore_eos": True, "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }  # fmt: skip
    response = client.chat(
        "a", **fields, n=2, max_tokens=4.0, logit_bias={"5": -100, "7": 2.5}, priority=-3, cache_salt="s" * 128, user="me", unknown={"a": 1}
    )
    assert response.status_code == 200
    for number, call in enumerate(engine.calls):
        params = call["params"]
        expected = {**fields, "top_k": 0, "stop": ("x", "y"), "stop_token_ids": (1, 2), "seed": [2**63 - 1, 0][number]}
        assert {name: getattr(params, name) for name in fields} == expected
        assert (params.n, params.max_tokens, params.logit_bias) == (1, 4, {5: -100.0, 7: 2.5})
        assert (call["priority"], call["cache_salt"]) == (-3, "s" * 128)


def test_max_tokens_defaults_to_the_rest_of_the_context(client: Client, engine: ScriptedEngine) -> None:
    body = client.chat("a", ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == engine.served.max_len
    assert body["choices"][0]["finish_reason"] == "length"


def test_own_request_id_is_echoed(client: Client) -> None:
    assert client.chat("a", request_id="job-7.x:y", max_tokens=1).json()["id"] == "chatcmpl-job-7.x:y"


def test_prompt_is_cut_when_asked(client: Client, engine: ScriptedEngine) -> None:
    client.chat("x" * 300, truncate_prompt_tokens=12, max_tokens=1)
    client.chat("x" * 300, truncate_prompt_tokens=5, truncation_side="right", max_tokens=1)
    client.chat("x" * 300, truncate_prompt_tokens=-1, max_tokens=10)
    assert [bytes(call["prompt_ids"]) for call in engine.calls[:2]] == [b"\n<assistant>", b"<user"]
    assert len(engine.calls[2]["prompt_ids"]) == engine.served.max_len - 10


def test_long_conversations_are_tokenized_off_the_loop_with_the_same_result(client: Client, engine: ScriptedEngine) -> None:
    engine.served.max_len = 20_000
    text = "wörd " * 2000
    body = client.chat(text, max_tokens=5, logprobs=True).json()
    assert body["usage"]["prompt_tokens"] == len(f"<user>{text}\n<assistant>".encode())
    heavy = client.chat("a" * 300, logprobs=True, top_logprobs=2).json()["choices"][0]
    assert len(heavy["logprobs"]["content"]) > 300
