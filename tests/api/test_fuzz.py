"""Whatever a body holds, the answer is 200 or a well-formed refusal: never a 500, never a request left running."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.api.parameters import UNSUPPORTED, WITHOUT_EFFECT

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["auto", "user", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "function", "name", "text"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = [
    "model", "stream", "stream_options", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty",
    "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "include_stop_str_in_output", "skip_special_tokens",
    "max_tokens",
    "logprobs", "top_logprobs", "prompt_logprobs", "echo", "add_special_tokens", "response_format", "priority", "cache_salt", "request_id",
    "structured_outputs",
    "return_token_ids", "return_tokens_as_token_ids", "truncate_prompt_tokens", "truncation_side", "messages", "max_completion_tokens",
    "tools",
    "tool_choice", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "documents", "reasoning_effort", "prompt",
    "tokens",
    "input", "instructions", "include", "reasoning", "text", "previous_response_id", "background", "max_output_tokens", "truncation",
    "system", "stop_sequences", "thinking", "output_config",
    "stream_interval", "return_prompt_text", "return_token_strs", "something_unknown", *UNSUPPORTED, *WITHOUT_EFFECT,
]  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "ab", "max_tokens": 3},
    "/v1/responses": {"input": "hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97]},
}
# What conversations are told in, rightly and wrongly put together.
TEXTS = st.sampled_from(["", "a", "{}", '{"a": 1}', "c1"]) | JSON
KINDS = (
    "message", "reasoning", "function_call", "function_call_output", "item_reference", "text", "input_text", "output_text", "tool_use",
    "tool_result", "thinking", "image",
)  # fmt: skip
MEMBERS = (
    "id", "call_id", "tool_use_id", "name", "arguments", "input", "output", "text", "thinking", "summary", "encrypted_content", "status",
    "is_error",
)  # fmt: skip
PARTS = st.fixed_dictionaries({"type": st.sampled_from(KINDS)}, optional=dict.fromkeys(MEMBERS, TEXTS))
CONTENT = TEXTS | st.lists(PARTS | JSON, max_size=3)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(KINDS),
            "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
            "content": CONTENT,
            **dict.fromkeys(MEMBERS, CONTENT),
        },
    ),
    max_size=4,
)
SLOW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(client: Any, error_of: Any, path: str, body: bytes) -> None:
    response = client.request("POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200 and path.startswith("/v1/messages"):
        assert response.json()["type"] == "error"
    elif response.status_code != 200:
        error_of(response)
    assert client.engine.live == {}


@pytest.mark.parametrize("path", GOOD)
@SLOW
@given(changes=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_values_of_any_fields_are_answered(client: Any, error_of: Any, path: str, changes: dict[str, Any]) -> None:
    check(client, error_of, path, json.dumps({**GOOD[path], **changes}).encode())


@pytest.mark.parametrize(("path", "name"), [("/v1/responses", "input"), ("/v1/messages", "messages"), ("/v1/chat/completions", "messages")])
@SLOW
@given(items=ITEMS)
def test_any_conversation_is_answered(client: Any, error_of: Any, path: str, name: str, items: list[Any]) -> None:
    check(client, error_of, path, json.dumps({**GOOD[path], name: items}).encode())


@pytest.mark.parametrize("path", GOOD)
@SLOW
@given(data=st.data())
def test_broken_bodies_are_answered(client: Any, error_of: Any, path: str, data: st.DataObject) -> None:
    body = bytearray(json.dumps(GOOD[path]).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(body)))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"[", b"}", b'"', b"\\ud800", b"1e999", b"NaN"])
        )
    check(client, error_of, path, bytes(body))
