"""POST /tokenize and /detokenize."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Client

ErrorOf = Callable[[httpx.Response], dict[str, Any]]


def test_text_is_tokenized_and_comes_back(client: Client) -> None:
    body = client.post("/tokenize", {"model": "org/byte-model", "prompt": "hé"}).json()
    assert body == {"count": 4, "max_model_len": 120, "tokens": [256, 104, 0xC3, 0xA9], "token_strs": None}
    assert client.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "<bos>hé"}


def test_conversations_are_rendered_first(client: Client) -> None:
    messages = [{"role": "user", "content": "a"}]
    body = client.post("/tokenize", {"messages": messages, "return_token_strs": True}).json()
    assert "".join(body["token_strs"]) == "<user>a\n<assistant>"
    bare = client.post("/tokenize", {"messages": messages, "add_generation_prompt": False, "add_special_tokens": True}).json()
    assert bytes(bare["tokens"][1:]) == b"<user>a\n"


@pytest.mark.parametrize(
    ("path", "payload", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x" * 2000}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 5}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": "x", "model": "y"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 259]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * 2000}, "tokens"),
    ],
)
def test_bad_requests_are_refused(client: Client, error_of: ErrorOf, path: str, payload: dict[str, Any], param: str) -> None:
    response = client.post(path, payload)
    assert response.status_code == (404 if param == "model" else 400)
    assert error_of(response)["param"] == param
