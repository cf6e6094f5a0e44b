"""POST /v1/chat/completions/batch: one choice for each conversation, all or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.api.conftest import CHAT, ScriptedEngine

if TYPE_CHECKING:
    import httpx

    from tests.api.conftest import Client

    ErrorOf = Callable[[httpx.Response], dict[str, Any]]

BATCH = "/v1/chat/completions/batch"
TEXTS = ("a dog", "héllo", "x")
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]


def test_each_conversation_has_the_choice_that_it_has_alone(client: Client) -> None:
    options = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True, "max_tokens": 9, "seed": 3, "cache_salt": "s"}
    body = client.post(BATCH, {"messages": CONVERSATIONS, "n": 1, "stream": False, "request_id": "mine", **options}).json()
    calls, client.engine.calls = client.engine.calls, []
    alone = [client.post(CHAT, {"messages": messages, **options}).json() for messages in CONVERSATIONS]
    assert body["choices"] == [{**one["choices"][0], "index": index} for index, one in enumerate(alone)]
    assert calls == client.engine.calls
    assert (body["id"], body["object"], body["model"]) == ("chatcmpl-mine", "chat.completion", "org/byte-model")
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert body["usage"][name] == sum(one["usage"][name] for one in alone)
    assert set(body) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"), ({"messages": []}, "messages"), ({"messages": CONVERSATIONS[0]}, "messages[0]"),
        ({"messages": [*CONVERSATIONS, []]}, "messages[3]"), ({"messages": "x"}, "messages"),
        ({"messages": [*CONVERSATIONS, [{"role": "judge"}]]}, "messages[3][0].role"),
        ({"messages": CONVERSATIONS, "stream": True}, "stream"), ({"messages": CONVERSATIONS, "n": 2}, "n"),
        ({"messages": CONVERSATIONS, "use_beam_search": True}, "use_beam_search"),
        ({"messages": CONVERSATIONS, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": CONVERSATIONS, "tool_choice": "auto"}, "tool_choice"),
        ({"messages": CONVERSATIONS, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"messages": CONVERSATIONS, "temperature": 9}, "temperature"), ({"messages": CONVERSATIONS, "guided_json": {}}, "guided_json"),
        ({"messages": CONVERSATIONS, "continue_final_message": True}, "continue_final_message"),
    ],
)  # fmt: skip
def test_bad_batch_is_400_naming_the_field(client: Client, error_of: ErrorOf, body: dict[str, Any], param: str) -> None:
    response = client.post(BATCH, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert client.engine.calls == []


def test_conversation_that_cannot_be_answered_leaves_none_running(client: Client, error_of: ErrorOf) -> None:
    long = [{"role": "user", "content": "x" * 5000}]
    response = client.post(BATCH, {"messages": [*CONVERSATIONS, long]})
    assert (response.status_code, error_of(response)["param"]) == (400, "messages[3]")
    assert isinstance(client.engine, ScriptedEngine)
    assert len(client.engine.aborted) == len(CONVERSATIONS)
