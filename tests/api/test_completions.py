"""POST /v1/completions: prompts of every kind, echo and scoring, log-probabilities, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Client, ScriptedEngine

Events = Callable[[bytes], list[dict[str, Any]]]
BOS = 256


def test_answer_has_the_shape_of_openai(client: Client) -> None:
    body = client.complete("abc").json()
    assert set(body) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    assert body["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["ab", "c"], [[BOS, 97, 98], [BOS, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
)
def test_prompts_of_every_kind_are_answered_in_order(client: Client, engine: ScriptedEngine, prompt: Any, ids: list[list[int]]) -> None:
    body = client.complete(prompt, n=2).json()
    assert [call["prompt_ids"] for call in engine.calls] == [one for one in ids for _ in range(2)]
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(ids)))
    assert [choice["text"] for choice in body["choices"]] == [text for text in ("ab", "c")[: len(ids)] for _ in range(2)]
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert body["usage"]["completion_tokens"] == 2 * sum(len(text) + 1 for text in ("ab", "c")[: len(ids)])


def test_special_tokens_are_added_unless_told_otherwise(client: Client, engine: ScriptedEngine) -> None:
    client.complete("a", add_special_tokens=False)
    assert engine.calls[0]["prompt_ids"] == [97]


@pytest.mark.parametrize(("options", "limit"), [({}, 16), ({"max_tokens": None}, 119), ({"max_tokens": 5}, 5)])
def test_max_tokens_has_the_defaults_of_vllm(client: Client, engine: ScriptedEngine, options: dict[str, Any], limit: int) -> None:
    client.complete([97], **options)
    assert engine.submitted[0].params.max_tokens == limit


def test_default_max_tokens_is_cut_to_the_room_there_is(client: Client) -> None:
    assert client.complete([97] * 115, ignore_eos=True).json()["usage"]["completion_tokens"] == 5


def test_scoring_returns_the_prompt_and_samples_nothing(client: Client) -> None:
    body = client.complete([[97, 98, 99], [BOS, 100]], echo=True, max_tokens=0, logprobs=1).json()
    assert body["choices"][0] == {
        "index": 0, "text": "abc", "finish_reason": "length", "stop_reason": None,
        "logprobs": {
            "tokens": ["a", "b", "c"], "text_offset": [0, 1, 2], "token_logprobs": [None, -0.5, -0.5],
            "top_logprobs": [None, {"c": -0.25, "b": -0.5}, {"d": -0.25, "c": -0.5}],
        },
    }  # fmt: skip
    assert body["choices"][1]["logprobs"]["tokens"] == ["<bos>", "d"]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 6}}


def test_echo_puts_the_prompt_before_the_answer(client: Client) -> None:
    choice = client.complete("ab", echo=True, max_tokens=1, logprobs=0).json()["choices"][0]
    assert choice["text"] == "aba"
    assert choice["logprobs"]["tokens"] == ["<bos>", "a", "b", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][1:] == [{"a": -0.5}, {"b": -0.5}, {"a": -0.5}]
    assert client.complete("ab", echo=True, max_tokens=0).json()["choices"][0]["text"] == "ab"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"echo": True},
        {"logprobs": 2},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"return_token_ids": True},
        {"stream_interval": 3, "logprobs": 2},
    ],
)
def test_stream_adds_up_to_the_whole_answer(client: Client, events: Events, options: dict[str, Any]) -> None:
    payload = {"n": 2, "stop": "d", **options}
    whole = client.complete(["aé😀b", "cd"], **payload).json()
    streamed = client.complete(["aé😀b", "cd"], **payload, stream=True, stream_options={"include_usage": True})
    *chunks, last = events(streamed.content)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert own[-1].get("stop_reason") == choice["stop_reason"]
        for name in choice["logprobs"] or ():
            assert [value for one in own for value in one["logprobs"][name]] == choice["logprobs"][name]
        assert [token for one in own for token in one.get("token_ids", ())] == choice.get("token_ids", [])
        assert own[0].get("prompt_token_ids") == choice.get("prompt_token_ids")


def test_prompt_logprobs_come_per_choice(client: Client) -> None:
    choice = client.complete([97, 98], prompt_logprobs=0, max_tokens=1).json()["choices"][0]
    assert choice["prompt_logprobs"] == [None, {"98": {"logprob": -0.5, "rank": 2, "decoded_token": "b"}}]


def test_neutral_values_of_unsupported_parameters_are_fine(client: Client) -> None:
    response = client.complete(
        "a", best_of=1, suffix=None, use_beam_search=False, length_penalty=1.0, response_format={"type": "text"}, guided_json=None
    )
    assert response.status_code == 200


def test_chosen_tokens_come_instead_of_the_likeliest(client: Client) -> None:
    client.engine.tops = lambda prompt: [(98, -2.0), (100, -3.0)]
    ids = {"logprob_token_ids": [98, 100], "max_tokens": 1, "temperature": 0}
    shown = client.complete("a", logprobs=0, **ids).json()["choices"][0]["logprobs"]
    assert shown["top_logprobs"] == [{"b": -2.0, "d": -3.0, "a": -0.5}]
    (position,) = client.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True, **ids}).json()[
        "choices"
    ][0]["logprobs"]["content"]
    assert [(entry["token"], entry["logprob"]) for entry in position["top_logprobs"]] == [("b", -2.0), ("d", -3.0)]
    assert client.engine.calls[-1]["params"].logprob_token_ids == (98, 100)
    assert client.complete("a", echo=True, logprobs=0, **ids).status_code == 400
    assert client.complete("a", **ids).json()["error"]["param"] == "logprob_token_ids"


def test_tokens_and_offsets_add_up_to_the_text_where_characters_have_several_tokens(client: Client) -> None:
    choice = client.complete("aé🎉b", echo=True, max_tokens=0, logprobs=1, add_special_tokens=False).json()["choices"][0]
    found = choice["logprobs"]
    assert found["tokens"] == ["a", "", "é", "", "", "", "🎉", "b"]
    assert found["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
    assert [choice["text"][offset:][: len(token)] for token, offset in zip(found["tokens"], found["text_offset"], strict=True)] == found[
        "tokens"
    ]


def test_invocations_answer_both_kinds_of_bodies(client: Client) -> None:
    said = client.post("/invocations", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}).json()
    written = client.post("/invocations", {"prompt": "ab", "max_tokens": 2}).json()
    assert (said["object"], written["object"]) == ("chat.completion", "text_completion")
    assert written["choices"][0]["text"] == client.complete("ab", max_tokens=2).json()["choices"][0]["text"]
    assert client.post("/invocations", {}).status_code == 400
