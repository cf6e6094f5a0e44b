"""The model's own sampling defaults fill what a request leaves open, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.api.conftest import CHAT, COMPLETIONS, MAX_LEN

if TYPE_CHECKING:
    from tests.api.conftest import Client

DEFAULTS = {"temperature": 0.25, "top_k": 7, "top_p": 0.5, "min_p": 0.125, "repetition_penalty": 1.5, "max_tokens": 9}


def asked(client: Client, path: str, **options: Any) -> Any:
    client.engine.served.defaults = DEFAULTS
    body = {"messages": [{"role": "user", "content": "hi"}]} if path == CHAT else {"prompt": "hi"}
    response = client.post(path, {**body, **options})
    assert response.status_code == 200, response.text
    return client.engine.calls[-1]["params"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_defaults_fill_what_is_left_open(client: Client, path: str) -> None:
    params = asked(client, path, temperature=None)
    assert [getattr(params, name) for name in DEFAULTS if name != "max_tokens"] == [0.25, 7, 0.5, 0.125, 1.5]
    assert params.frequency_penalty == 0
    assert params.max_tokens == (9 if path == CHAT else 16), "OpenAI's completions have a default of their own"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_a_request_says_wins_even_if_it_is_neutral(client: Client, path: str) -> None:
    said = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 11}
    params = asked(client, path, **said)
    assert {name: getattr(params, name) for name in said} == said


def test_default_length_is_cut_to_the_room_there_is(client: Client) -> None:
    text = "x" * (MAX_LEN - len("<user>\n<assistant>") - 4)
    client.engine.served.defaults = DEFAULTS
    assert client.chat(text).status_code == 200
    assert client.engine.calls[-1]["params"].max_tokens == 4


def test_search_looks_at_no_default_but_the_length(client: Client) -> None:
    client.engine.served.defaults = DEFAULTS
    client.engine.tops = lambda prompt: [(97, -0.1), (98, -2.0)]
    assert client.chat("hi", use_beam_search=True, n=1).json()["choices"][0]["message"]["content"] == "a" * 9
