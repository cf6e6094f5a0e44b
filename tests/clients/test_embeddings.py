"""Embeddings and scores as the openai client, LangChain and Jina's and Cohere's clients ask for them, from a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from langchain_openai import OpenAIEmbeddings

from tests.server.process import ServerProcess, serving
from tests.tiny_vectors import MAX_LEN, reference, tiny_classifier, tiny_encoder

TEXTS = ["the quick brown fox", "a capital of a country is a city", "日本語", "émoji 😀🎉 text"]
SHAPES = ("--max-rows", "4", "--max-step-tokens", "64", "--prefill-tokens", "64")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = str(tiny_encoder(matryoshka=(8, 16)))
    with serving(tmp_path_factory.mktemp("server"), "--served-model-name", "tiny/encoder", *SHAPES, model_path=path) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as connected:
        yield connected


def expected(server: ServerProcess, texts: list[str]) -> np.ndarray:
    """sentence-transformers' embeddings, from transformers and the server's own token ids."""
    model, rows = reference(tiny_encoder(matryoshka=(8, 16))), []
    for text in texts:
        ids = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"]
        with torch.no_grad():
            mean = model(torch.tensor(ids)[None]).last_hidden_state[0].mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.array(rows)


def test_openai_client_gets_the_models_embeddings(client: openai.OpenAI, server: ServerProcess) -> None:
    wanted = expected(server, TEXTS)
    for encoding in (openai.omit, "float", "base64"):  # the client itself asks for base64, and decodes it
        answer = client.embeddings.create(model="tiny/encoder", input=TEXTS, encoding_format=encoding)  # type: ignore[arg-type]
        if encoding != "base64":
            np.testing.assert_allclose([entry.embedding for entry in answer.data], wanted, atol=1e-4)
    assert [entry.index for entry in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_openai_client_takes_shorter_embeddings(client: openai.OpenAI, server: ServerProcess) -> None:
    whole = expected(server, TEXTS[:1])[0]
    short = client.embeddings.create(model="tiny/encoder", input=TEXTS[0], dimensions=8).data[0].embedding
    np.testing.assert_allclose(short, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-4)


def test_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        client.embeddings.create(model="tiny/encoder", input="fox " * 60)
    assert too_long.value.code == "context_length_exceeded"
    assert f"at most {MAX_LEN}" in str(too_long.value)
    with pytest.raises(openai.BadRequestError, match="there are 8, 16"):
        client.embeddings.create(model="tiny/encoder", input="a", dimensions=9)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.NotFoundError, match="turns texts into vectors"):
        client.chat.completions.create(model="tiny/encoder", messages=[{"role": "user", "content": "hi"}])


def test_many_clients_at_a_time_get_their_own(server: ServerProcess) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
            return await asyncio.gather(*(client.embeddings.create(model="tiny/encoder", input=TEXTS[i % 4]) for i in range(24)))

    wanted = expected(server, TEXTS)
    for i, answer in enumerate(asyncio.run(ask())):
        np.testing.assert_allclose(answer.data[0].embedding, wanted[i % 4], atol=1e-4)


def test_langchain_sends_token_ids_or_text(server: ServerProcess) -> None:
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "EMPTY", "max_retries": 0, "model": "tiny/encoder"}
    plain = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    np.testing.assert_allclose(plain.embed_documents(TEXTS), expected(server, TEXTS), atol=1e-4)
    np.testing.assert_allclose(plain.embed_query(TEXTS[2]), expected(server, TEXTS[2:3])[0], atol=1e-4)
    np.testing.assert_allclose(asyncio.run(plain.aembed_documents(TEXTS)), expected(server, TEXTS), atol=1e-4)


def test_langchains_token_ids_are_embedded(client: openai.OpenAI, server: ServerProcess) -> None:
    """What OpenAIEmbeddings sends by default: chunks of token ids of a tokenizer of its own, asked for as base64."""
    ids = [httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    answer = client.embeddings.create(model="tiny/encoder", input=ids)
    np.testing.assert_allclose([entry.embedding for entry in answer.data], expected(server, TEXTS), atol=1e-4)


def test_reranker_answers_in_jinas_and_coheres_shape(tmp_path: Any) -> None:
    with serving(tmp_path, "--served-model-name", "tiny/reranker", *SHAPES, model_path=str(tiny_classifier())) as server:
        body = {"model": "tiny/reranker", "query": TEXTS[0], "documents": TEXTS, "top_n": 2}
        answers = [httpx.post(f"{server.url}{path}", json=body).json() for path in ("/rerank", "/v1/rerank", "/v2/rerank")]
        scores = httpx.post(f"{server.url}/score", json={"text_1": TEXTS[0], "text_2": TEXTS}).json()["data"]
    best = sorted(scores, key=lambda entry: -entry["score"])[:2]
    for answer in answers:
        assert [(result["index"], result["document"]["text"]) for result in answer["results"]] == [
            (entry["index"], TEXTS[entry["index"]]) for entry in best
        ]
        assert [result["relevance_score"] for result in answer["results"]] == pytest.approx([entry["score"] for entry in best], abs=1e-5)
