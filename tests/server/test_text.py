"""Streamed text against whole text: the same characters, exact stops, true usage, and every finish reason once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.process import CHAT, COMPLETIONS, ServerProcess, events_of

PROMPTS = ["the fox", "日本語 émoji 😀🎉", "a", "\x00\x01", "é" * 40]
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def whole(server: ServerProcess, prompt: Any, **more: Any) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    reply = server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(server: ServerProcess, prompt: Any, **more: Any) -> list[dict[str, Any]]:
    """The events of the same answer as a stream with usage."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    reply = server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, **more, **options})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert {name: reply.headers[name] for name in HEADERS} == HEADERS
    return events_of(reply.text)


def choices_of(events: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_deltas_concatenate_to_the_whole_text(server: ServerProcess, prompt: str) -> None:
    answer, events = whole(server, prompt), streamed(server, prompt)
    parts = choices_of(events, 0)
    text = answer["choices"][0]["text"]
    assert "".join(part["text"] for part in parts) == text
    assert all(part["text"] for part in parts[:-1])
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]
    assert len({(event["id"], event["created"], event["model"], event["object"]) for event in events}) == 1
    assert events[-1]["choices"] == []
    cached = {"prompt_tokens_details": None}  # the second one finds what the first one left
    assert {**events[-1]["usage"], **cached} == {**answer["usage"], **cached}
    assert answer["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stop_strings_are_cut_exactly_wherever_they_lie(server: ServerProcess, prompt: str) -> None:
    text = whole(server, prompt)["choices"][0]["text"]
    for start in range(1, 30, 7):
        stop = text[start : start + 4]
        expected = text[: text.index(stop)]
        answer = whole(server, prompt, stop=[stop, "never to be seen"])
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (expected, "stop", stop)
        events = streamed(server, prompt, stop=[stop, "never to be seen"])
        parts = choices_of(events, 0)
        assert "".join(part["text"] for part in parts) == expected
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop"]
        assert events[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"] <= 60


def test_half_characters_are_never_sent(server: ServerProcess) -> None:
    # Every token of this text is forced in turn, many of them parts of characters.
    text = "日本語😀é🎉語"
    ids = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert len(ids) > len(text)
    events = streamed(server, text, echo=True, max_tokens=1)
    assert choices_of(events, 0)[0]["text"].startswith(text)
    events = streamed(server, [ids[:-1]], max_tokens=1, logit_bias={str(ids[-1]): 100})
    assert all("\ufffd" not in part["text"] for part in choices_of(events, 0))


def test_invariant_10_usage_counts_every_choice_and_prompt_once(server: ServerProcess) -> None:
    asked = {"n": 3, "max_tokens": 9, "seed": 5, "temperature": 1.0}
    answer, events = whole(server, ["the fox", "a"], **asked), streamed(server, ["the fox", "a"], **asked)
    prompt_tokens = sum(len(server.post("/tokenize", {"prompt": prompt}).json()["tokens"]) for prompt in ("the fox", "a"))
    for usage in (answer["usage"], events[-1]["usage"]):
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (prompt_tokens, 54, prompt_tokens + 54)
    for index in range(6):
        assert "".join(part["text"] for part in choices_of(events, index)) == answer["choices"][index]["text"]
        assert sum(part["finish_reason"] is not None for part in choices_of(events, index)) == 1


def test_chat_streams_role_text_and_end(server: ServerProcess) -> None:
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    message = server.post(CHAT, ask).json()["choices"][0]["message"]
    parts = choices_of(events_of(server.post(CHAT, {**ask, "stream": True}).text), 0)
    assert parts[0]["delta"]["role"] == "assistant"
    assert all("role" not in part["delta"] for part in parts[1:])
    assert "".join(part["delta"].get("content", "") for part in parts) == message["content"]
    assert all(part["delta"].get("content") for part in parts[1:-1])
    assert [part["finish_reason"] for part in parts][-1] == "length"


def test_r23_logprobs_are_finite_whatever_the_bias(server: ServerProcess) -> None:
    bias = {str(token): -100 for token in range(300)}
    answer = whole(server, "the fox", logit_bias=bias, logprobs=20, max_tokens=5)
    found = answer["choices"][0]["logprobs"]
    assert all(-1e4 < value <= 0 for value in found["token_logprobs"])
    assert all(-1e4 < value <= 0 for top in found["top_logprobs"] for value in top.values())
