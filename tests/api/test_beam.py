"""Beam search over HTTP: the answers of a plain search, whole or streamed, and nothing left behind when it ends badly."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from jaxserve.errors import QueueFullError
from tests.api.conftest import CHAT, COMPLETIONS, EOS

if TYPE_CHECKING:
    from tests.api.conftest import Client, Connection, ScriptedEngine

Events = Callable[[bytes], list[dict[str, Any]]]
SEARCH = {"use_beam_search": True, "n": 3, "max_tokens": 5}


def tops(prompt: list[int]) -> list[tuple[int, float]]:
    """Some letters and the end, as likely as the last two tokens say."""
    rng = random.Random(f"{prompt[-2:]}")
    weights = {token: rng.random() for token in (*b"abcdefg", EOS)}
    total = sum(weights.values())
    return sorted(((token, math.log(weight / total)) for token, weight in weights.items()), key=lambda each: -each[1])


def plain_search(prompt: list[int], width: int, max_tokens: int, length_penalty: float) -> list[tuple[str, str]]:
    beams, ended = [(prompt, 0.0)], []
    for _ in range(max_tokens):
        grown = [([*ids, token], total + logprob) for ids, total in beams for token, logprob in tops(ids)[: 2 * width]]
        ended += [each for each in grown if each[0][-1] == EOS]
        beams = sorted((each for each in grown if each[0][-1] != EOS), key=lambda each: -each[1])[:width]
    ranked = sorted(ended + beams, key=lambda each: -each[1] / (len(each[0]) - (each[0][-1] == EOS)) ** length_penalty)[:width]
    answers = [ids[len(prompt) :] for ids, _ in ranked]
    return [(bytes(ids[:-1] if ids[-1] == EOS else ids).decode(), "stop" if ids[-1] == EOS else "length") for ids in answers]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5])
def test_answers_are_those_of_a_plain_search(client: Client, length_penalty: float) -> None:
    client.engine.tops = tops
    body = client.complete([97, 98], **SEARCH, length_penalty=length_penalty, logprobs=2, return_token_ids=True).json()
    found = [(choice["text"], choice["finish_reason"]) for choice in body["choices"]]
    assert found == plain_search([97, 98], 3, 5, length_penalty)
    for choice in body["choices"]:
        shown = choice["logprobs"]
        assert len(shown["token_logprobs"]) == len(choice["token_ids"])
        assert max(map(len, shown["top_logprobs"])) <= 3
    assert body["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in body["choices"])
    assert client.engine.live == {}


def test_streams_hold_the_same_answers(client: Client, events: Events) -> None:
    client.engine.tops = tops
    whole = client.chat("hi", **SEARCH).json()["choices"]
    texts, reasons = [""] * 3, [""] * 3
    for event in events(client.chat("hi", **SEARCH, stream=True).content):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
            reasons[choice["index"]] += choice["finish_reason"] or ""
    assert texts == [choice["message"]["content"] for choice in whole]
    assert reasons == [choice["finish_reason"] for choice in whole]


def test_search_goes_on_when_the_queue_is_full_for_a_while(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.engine.tops = tops
    expected = client.complete("ab", **SEARCH).json()["choices"]
    submit, calls = client.engine.submit, []

    def refuse_some(**options: Any) -> Any:
        calls.append(options)
        if len(calls) in (3, 4):
            raise QueueFullError(0.0)
        return submit(**options)

    monkeypatch.setattr(client.engine, "submit", refuse_some)
    assert client.complete("ab", **SEARCH).json()["choices"] == expected
    monkeypatch.setattr(client.engine, "capacity", 0)
    calls.clear()
    assert client.complete("ab", **SEARCH).status_code == 429
    assert client.engine.live == {}


def test_failed_step_ends_the_search(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(prompt: list[int]) -> Any:
        raise ArithmeticError("secret detail")

    client.engine.tops = tops
    monkeypatch.setattr("jaxserve.engine.beam.BeamSearch.take", fail)
    response = client.complete("ab", **SEARCH)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert client.engine.live == {}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_search_ends_when_the_client_leaves(engine: ScriptedEngine, connect: Callable[..., Connection], path: str) -> None:
    engine.tops, engine.hold = tops, True

    async def leave() -> None:
        body = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
        connection = connect(path, {**body, **SEARCH})
        await engine.submits.wait()
        engine.submits.clear()
        engine.step()
        await engine.submits.wait()
        assert len(engine.live) > 0
        connection.leave()
        await connection.task
        for _ in range(3):
            await asyncio.sleep(0)
        assert engine.live == {}

    asyncio.run(leave())


@pytest.mark.parametrize(
    "others",
    [{"stop": "a"}, {"min_tokens": 2}, {"bad_words": ["a"]}, {"repetition_penalty": 1.1}, {"logit_bias": {"97": 1}}, {"n": 11},
     {"response_format": {"type": "json_object"}}, {"prompt_logprobs": 1}, {"thinking_token_budget": 4}],
    ids=str,
)  # fmt: skip
def test_what_a_search_does_not_look_at_is_refused(client: Client, error_of: Callable[..., dict[str, Any]], others: dict[str, Any]) -> None:
    response = client.complete("ab", **{**SEARCH, **others})
    assert response.status_code == 400
    assert error_of(response)["param"] == next(iter(others))
    assert client.engine.submitted == []
