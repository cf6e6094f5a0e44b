"""Structured outputs over HTTP: whole and streamed answers keep their form, and hostile ones delay nobody."""

from __future__ import annotations

import concurrent.futures
import json
import re
import time
from typing import Any

import jsonschema
import pytest

from tests.server.process import CHAT, COMPLETIONS, ServerProcess, error_of, events_of

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object", "required": ["name", "tags"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 8}, "tags": {"type": "array", "items": {"enum": ["a", "日", 3]}, "maxItems": 3}},
}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    "json_schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
    "json": {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
}


def text_of(server: ServerProcess, path: str, body: dict[str, Any], *, stream: bool) -> tuple[str, str]:
    """Text and finish reason of the only answer."""
    reply = server.post(path, {**body, "stream": stream})
    assert reply.status_code == 200, reply.text
    parts = [choice for event in (events_of(reply.text) if stream else [reply.json()]) for choice in event["choices"]]
    texts = [part.get("text") or (part.get("delta") or part.get("message") or {}).get("content") or "" for part in parts]
    return "".join(texts), next(part["finish_reason"] for part in reversed(parts) if part["finish_reason"])


@pytest.mark.parametrize("name", FORMATS)
def test_answers_validate_whole_and_streamed(server: ServerProcess, name: str) -> None:
    for seed in range(3):
        body = {"messages": HELLO, "seed": seed, "temperature": 1.0, "max_tokens": 700, **FORMATS[name]}
        whole, reason = text_of(server, CHAT, body, stream=False)
        assert reason == "stop"
        jsonschema.validate(json.loads(whole), SCHEMA)
        assert text_of(server, CHAT, body, stream=True) == (whole, reason)


def test_regex_choice_and_grammar_of_completions(server: ServerProcess) -> None:
    for spec, pattern in (
        ({"regex": "[0-9]{2}-[a-z]{3}"}, "[0-9]{2}-[a-z]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= "a" [b-d]'}, "a[b-d]"),
    ):
        body = {"prompt": "x", "max_tokens": 50, "seed": 2, "structured_outputs": spec}
        for stream in (False, True):
            assert re.fullmatch(pattern, text_of(server, COMPLETIONS, body, stream=stream)[0])


def test_several_choices_each_keep_the_form(server: ServerProcess) -> None:
    body = {"prompt": ["x", "y"], "n": 3, "seed": 1, "max_tokens": 90, "structured_outputs": {"regex": "[a-z]{5,9}"}, "logprobs": 2}
    choices = server.post(COMPLETIONS, body).json()["choices"]
    assert len(choices) == 6
    assert all(re.fullmatch("[a-z]{5,9}", choice["text"]) and choice["finish_reason"] == "stop" for choice in choices)


def test_bad_schema_is_a_400_with_its_reason(server: ServerProcess) -> None:
    reply = server.post(CHAT, {"messages": HELLO, "structured_outputs": {"json": {"type": "nonsense"}}})
    assert reply.status_code == 400
    error = error_of(reply)
    assert error["param"] == "structured_outputs"
    assert "Invalid type: nonsense" in error["message"]


def test_hostile_constraints_delay_nobody(server: ServerProcess) -> None:
    hostile = [
        {"regex": "a?((a{100}){100}){100}"},
        {"json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(3000)}}},
        {"regex": ".*a.{200}b.{200}c"},
        {"json": {"enum": [f"value {i}" for i in range(8000)]}},
    ]
    with concurrent.futures.ThreadPoolExecutor(len(hostile)) as pool:
        asked = [
            pool.submit(server.post, COMPLETIONS, {"prompt": "x", "max_tokens": 60, "seed": 1, "structured_outputs": spec})
            for spec in hostile
        ]
        waits = []
        while not waits or not all(future.done() for future in asked):
            started_s = time.monotonic()
            assert server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 5, "ignore_eos": True}).status_code == 200
            assert server.get("/health").status_code == 200
            waits.append(time.monotonic() - started_s)
        replies = [future.result() for future in asked]
    assert max(waits) < 5  # milliseconds when the machine is idle
    assert {reply.status_code for reply in replies} <= {200, 400}
    for reply in replies:
        assert reply.status_code == 200 or error_of(reply)["param"] == "structured_outputs"
    assert server.is_idle()
