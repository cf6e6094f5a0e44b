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
    "return_token_strs", "something_unknown", *UNSUPPORTED, *WITHOUT_EFFECT,
]  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "ab", "max_tokens": 3},
    "/tokenize": {"prompt": "ab"},
    "/detokenize": {"tokens": [97]},
}
SLOW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(client: Any, error_of: Any, path: str, body: bytes) -> None:
    response = client.request("POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error_of(response)
    assert client.engine.live == {}


@pytest.mark.parametrize("path", GOOD)
@SLOW
@given(changes=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=3))
def test_any_values_of_any_fields_are_answered(client: Any, error_of: Any, path: str, changes: dict[str, Any]) -> None:
    check(client, error_of, path, json.dumps({**GOOD[path], **changes}).encode())


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
