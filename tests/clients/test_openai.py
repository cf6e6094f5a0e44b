"""The openai client, sync, async and streaming, and its error classes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server.process import serving
from tests.tiny import EOS, tiny_model

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(
        tmp_path_factory.mktemp("server"), "--served-model-name", "org/tiny,tiny", "--api-key", "secret", model_path=str(tiny_model())
    ) as server:
        yield f"{server.url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="secret", max_retries=0)


def chat(client: openai.OpenAI, **options: object) -> Any:
    settings = {"model": "tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(**settings)  # type: ignore[call-overload]


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["org/tiny", "tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"


def test_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    whole = chat(client)
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )  # type: ignore[call-overload]
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_n_seed_and_logprobs_come_through(client: openai.OpenAI) -> None:
    first, again = (chat(client, n=3, temperature=1.0, seed=1, logprobs=True, top_logprobs=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    for choice in first.choices:
        assert len(choice.logprobs.content) == 8
        assert all(len(entry.top_logprobs) == 2 and entry.bytes is not None for entry in choice.logprobs.content)


def test_completions_take_text_ids_and_lists(client: openai.OpenAI) -> None:
    answers = client.completions.create(model="tiny", prompt=["hello", "the fox"], max_tokens=4, temperature=0).choices
    assert [answer.index for answer in answers] == [0, 1]
    ids: Any = client.completions.create(model="tiny", prompt=[[5, 6, 7]], max_tokens=4, temperature=0, logprobs=2, echo=True).choices[0]
    assert ids.logprobs.token_logprobs[0] is None
    assert len(ids.logprobs.tokens) == 7


def test_vllm_extras_go_in_extra_body(client: openai.OpenAI) -> None:
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.3, "ignore_eos": True, "min_tokens": 8}
    assert chat(client, temperature=1.5, extra_body=extra).usage.completion_tokens == 8


def test_end_of_sequence_is_a_stop(client: openai.OpenAI) -> None:
    choice = chat(client, logit_bias={"0": 100}).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "")
    assert EOS not in (choice.message.content or "")


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"model": "nobody/else"}, openai.NotFoundError, "model"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"messages": [{"role": "user", "content": "x " * 400}]}, openai.BadRequestError, "messages"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            openai.BadRequestError,
            "response_format.json_schema.schema",
        ),
    ],
)
def test_errors_are_of_the_clients_own_classes(
    client: openai.OpenAI, options: dict[str, object], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        chat(client, **options)
    assert caught.value.param == param
    assert "Traceback" not in str(caught.value)


def test_wrong_key_is_an_authentication_error(url: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        chat(openai.OpenAI(base_url=url, api_key="wrong", max_retries=0))


def test_many_at_once_equal_one_by_one(url: str, client: openai.OpenAI) -> None:
    prompts = [f"{i} the quick fox" for i in range(24)]

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="secret", max_retries=0) as many:
            calls = [many.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0) for prompt in prompts]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    alone = [client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text for prompt in prompts]
    assert asyncio.run(ask_all()) == alone
