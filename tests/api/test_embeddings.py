"""The routes of vectors: every shape of input and answer, over an engine whose vectors are [tokens, sum of ids, last id, pair border]."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch

from jaxserve.api.vectors_request import MAX_INPUTS
from jaxserve.errors import UserError
from jaxserve.pooling import Pooling
from jaxserve.request import RequestOutput
from tests.api.conftest import EOS, MAX_LEN, ByteTokenizer, Client, Connection, ScriptedEngine

if TYPE_CHECKING:
    ErrorOf = Callable[[httpx.Response], dict[str, Any]]

EMBEDDINGS = "/v1/embeddings"
SEP = EOS


class PairTokenizer(ByteTokenizer):
    """<bos> text, and <bos> first <sep> second."""

    def encode_pair(
        self, first: str, second: str, *, max_first: int | None = None, max_second: int | None = None, max_tokens: int | None = None
    ) -> tuple[list[int], int | None]:
        a, b = (
            self.encode(first, add_special_tokens=True)[: None if max_first is None else 1 + max_first],
            list(second.encode())[:max_second],
        )
        return [*a, SEP, *b][:max_tokens], len(a) + 1

    def shorten(self, ids: Sequence[int], max_tokens: int, *, side: str) -> list[int]:
        return list(ids)[-max_tokens:] if side == "left" else list(ids)[:max_tokens]


class VectorStream:
    def __init__(self, engine: VectorEngine, output: RequestOutput) -> None:
        self.id, self.name, self._engine, self._output = output.id, None, engine, output
        self._left: list[RequestOutput] = [output]

    def __aiter__(self) -> VectorStream:
        return self

    async def __anext__(self) -> RequestOutput:
        await asyncio.sleep(0)
        if self._engine.hold:
            await asyncio.Event().wait()
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()

    def abort(self) -> None:
        if self._left:
            self._left.clear()
            self._engine.aborted.append(self.id)


class VectorEngine(ScriptedEngine):
    """Gives vectors instead of text."""

    def __init__(self, pooling: Pooling, **options: Any) -> None:
        super().__init__(**options)
        self.served.tokenizer, self.served.pooling = PairTokenizer(), pooling
        self.inputs: list[list[int]] = []
        self.ended_early = False  # by an operator

    def submit_pooling(
        self, prompt_ids: list[int], *, second_at: int | None = None, priority: int = 0, cache_salt: str | None = None
    ) -> VectorStream:
        if len(prompt_ids) > MAX_LEN:
            raise UserError("input", f"{len(prompt_ids)} tokens are too many", code="context_length_exceeded")
        self.inputs.append(prompt_ids)
        self.calls.append({"priority": priority, "cache_salt": cache_salt})
        vector = np.array([len(prompt_ids), sum(prompt_ids), prompt_ids[-1], second_at or 0], np.float32)[: self.served.pooling.width]
        output = RequestOutput(id=f"r{len(self.inputs)}", finish_reason="stop", num_prompt_tokens=len(prompt_ids), pooled=vector)
        if self.ended_early:
            output = RequestOutput(id=output.id, finish_reason="abort")
        return VectorStream(self, output)


@pytest.fixture
def embedder() -> Client:
    return Client(VectorEngine(Pooling(task="embed", width=4, normalize=False, matryoshka=(), prompts={"query": "q: "})))


@pytest.fixture
def classifier() -> Client:
    return Client(VectorEngine(Pooling(task="classify", width=2, activation="softmax", labels=("no", "yes"))))


@pytest.fixture
def scorer() -> Client:
    return Client(VectorEngine(Pooling(task="classify", width=1, activation="identity", labels=("SCORE",))))


def vectors_of(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    return [entry["embedding"] for entry in response.json()["data"]]


def expected(*texts: bytes, bos: bool = True) -> list[list[float]]:
    listed = [[256] * bos + list(text) for text in texts]
    return [[len(ids), sum(ids), ids[-1], 0] for ids in listed]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("ab", expected(b"ab")),
        (["ab", "é"], expected(b"ab", "é".encode())),
        ([97, 98], expected(b"ab", bos=False)),
        ([[97, 98], [99]], expected(b"ab", b"c", bos=False)),
    ],
)
def test_inputs_of_every_kind_are_embedded_in_order(embedder: Client, given: Any, wanted: list[list[float]]) -> None:
    response = embedder.post(EMBEDDINGS, {"input": given, "model": "org/byte-model", "user": "me"})
    assert vectors_of(response) == wanted
    body = response.json()
    tokens = sum(int(vector[0]) for vector in wanted)
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
    assert (body["object"], body["model"]) == ("list", "org/byte-model")
    assert body["id"].startswith("embd-")
    assert [(entry["index"], entry["object"]) for entry in body["data"]] == [(i, "embedding") for i in range(len(wanted))]


def test_conversation_is_embedded_as_the_template_prints_it(embedder: Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert vectors_of(embedder.post(EMBEDDINGS, {"messages": messages})) == expected(b"<user>hi\n", bos=False)
    begun = {"messages": messages, "add_generation_prompt": True, "add_special_tokens": True}
    assert vectors_of(embedder.post(EMBEDDINGS, begun)) == expected(b"<user>hi\n<assistant>")


def test_base64_holds_the_same_numbers(embedder: Client) -> None:
    encoded = vectors_of(embedder.post(EMBEDDINGS, {"input": "abc", "encoding_format": "base64"}))[0]
    assert np.frombuffer(base64.b64decode(str(encoded)), "<f4").tolist() == expected(b"abc")[0]


@pytest.mark.parametrize("order", ["native", "little", "big"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16), ("fp8_e4m3", torch.float8_e4m3fn),
     ("fp8_e5m2", torch.float8_e5m2)],
)  # fmt: skip
def test_bytes_hold_the_numbers_in_the_type_and_order_that_is_asked_for(
    embedder: Client, name: str, dtype: torch.dtype, order: str
) -> None:
    body = {"input": ["ab", "c"], "use_activation": True, "embed_dtype": name, "endianness": order}
    response = embedder.post(EMBEDDINGS, {**body, "encoding_format": "bytes"})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/octet-stream")
    said = json.loads(response.headers["metadata"])
    size = 4 * dtype.itemsize
    assert set(said) == {"id", "created", "model", "data", "usage"}
    assert said["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert said["data"] == [
        {"index": i, "embed_dtype": name, "endianness": order, "start": i * size, "end": (i + 1) * size, "shape": [4]} for i in range(2)
    ]
    plain = vectors_of(embedder.post(EMBEDDINGS, body))
    numbers = torch.tensor(plain).to(dtype).reshape(-1).view(torch.uint8).reshape(8, -1)
    numbers = numbers.flip(1) if order == "big" else numbers
    assert response.content == bytes(numbers.reshape(-1).tolist())
    only = embedder.post(EMBEDDINGS, {**body, "encoding_format": "bytes_only"})
    assert only.content == response.content
    assert "metadata" not in only.headers
    text = vectors_of(embedder.post(EMBEDDINGS, {**body, "encoding_format": "base64"}))
    assert b"".join(base64.b64decode(str(each)) for each in text) == response.content
    assert embedder.post("/pooling", {**body, "encoding_format": "bytes_only"}).status_code == 200
    paths = embedder.get("/openapi.json").json()["paths"]
    described = {path for path in paths if "application/octet-stream" in str(paths[path].get("post", {}).get("responses", {}).get("200"))}
    assert described == {EMBEDDINGS, "/pooling"}


def test_dimensions_activation_and_prompt_reach_the_model(embedder: Client) -> None:
    vector = np.array(expected(b"q: ab")[0][:2])
    found = vectors_of(embedder.post(EMBEDDINGS, {"input": "ab", "dimensions": 2, "use_activation": True, "prompt_name": "query"}))
    np.testing.assert_allclose(found[0], vector / np.linalg.norm(vector), rtol=1e-6)


def test_salt_and_priority_reach_the_engine(embedder: Client) -> None:
    embedder.post(EMBEDDINGS, {"input": ["a", "b"], "cache_salt": "tenant", "priority": -3, "request_id": "mine"})
    assert embedder.engine.calls == [{"priority": -3, "cache_salt": "tenant"}] * 2


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, b"01"),
        ({"truncate_prompt_tokens": 3, "add_special_tokens": False}, b"012"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left", "add_special_tokens": False}, b"789"),
        ({"truncate_prompt_tokens": -1}, b"0123456789"),
    ],
)
def test_truncation_keeps_what_is_asked_for(embedder: Client, options: dict[str, Any], kept: bytes) -> None:
    assert embedder.post(EMBEDDINGS, {"input": "0123456789", **options}).status_code == 200
    engine = embedder.engine
    assert isinstance(engine, VectorEngine)
    assert bytes(token for token in engine.inputs[0] if token < 256) == kept


def test_long_text_is_cut_to_what_the_model_takes(embedder: Client, error_of: ErrorOf) -> None:
    refused = error_of(embedder.post(EMBEDDINGS, {"input": "x" * (MAX_LEN + 1)}))
    assert refused["code"] == "context_length_exceeded"
    assert embedder.post(EMBEDDINGS, {"input": "x" * 99_999, "truncate_prompt_tokens": -1}).json()["usage"]["total_tokens"] == MAX_LEN


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["a", 5]}, "input[1]"),
    ({"input": [[]]}, "input[0]"),
    ({"input": [1, "a"]}, "input[1]"),
    ({"input": [259]}, "input[0]"),
    ({"input": "a", "dimensions": 5}, "dimensions"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"input": "a", "messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"input": "a", "truncate_prompt_tokens": MAX_LEN + 1}, "truncate_prompt_tokens"),
    ({"input": "a", "normalize": True}, "normalize"),
    ({"input": "a", "embed_dtype": "int3"}, "embed_dtype"),
    ({"input": "a", "endianness": "middle"}, "endianness"),
    ({"input": "a", "prompt_name": "x"}, "prompt_name"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
    ({"input": "a", "padding": "max_length"}, "padding"),
    ({"input": "a", "cache_salt": ""}, "cache_salt"),
    ({"input": "a", "request_id": "a b"}, "request_id"),
    ({"input": "a", "task": "token_embed"}, "task"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_embedding_request_is_400_naming_the_field(embedder: Client, error_of: ErrorOf, body: dict[str, Any], param: str) -> None:
    response = embedder.post(EMBEDDINGS, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert embedder.engine.calls == []


def test_one_input_too_long_starts_none(embedder: Client) -> None:
    assert embedder.post(EMBEDDINGS, {"input": ["a", "b", "x" * (MAX_LEN + 1)]}).status_code == 400
    assert embedder.engine.aborted == ["r1", "r2"]


def test_request_that_an_operator_ends_is_503(embedder: Client) -> None:
    engine = embedder.engine
    assert isinstance(engine, VectorEngine)
    engine.ended_early = True
    assert embedder.post(EMBEDDINGS, {"input": "a"}).status_code == 503


def test_unknown_model_is_404(embedder: Client, error_of: ErrorOf) -> None:
    response = embedder.post(EMBEDDINGS, {"input": "a", "model": "other"})
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")


def test_client_that_leaves_ends_its_requests(embedder: Client) -> None:
    async def leave() -> None:
        embedder.engine.hold = True
        connection = Connection(embedder.app, EMBEDDINGS, {"input": ["a", "b"]})
        while len(embedder.engine.calls) < 2:
            await asyncio.sleep(0)
        connection.leave()
        await connection.task

    asyncio.run(leave())
    assert embedder.engine.aborted == ["r1", "r2"]


@pytest.mark.parametrize("path", [EMBEDDINGS, "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"])
def test_model_of_text_answers_404_on_routes_of_vectors(client: Client, error_of: ErrorOf, path: str) -> None:
    response = client.post(path, {"input": "a"})
    assert response.status_code == 404
    assert error_of(response) == {
        "message": f"the model writes text; {path} is for models that give vectors", "type": "not_found_error", "param": "model",
        "code": "unsupported_endpoint",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_model_of_vectors_answers_404_on_routes_of_text(embedder: Client, path: str) -> None:
    response = embedder.post(path, {"prompt": "a"})
    assert response.status_code == 404
    assert "turns texts into vectors" in response.text


def test_model_of_vectors_tokenizes_and_is_listed(embedder: Client) -> None:
    assert embedder.post("/tokenize", {"prompt": "ab"}).json()["tokens"] == [256, 97, 98]
    assert embedder.get("/v1/models").json()["data"][0]["max_model_len"] == MAX_LEN


def test_capabilities_are_those_of_the_routes_that_the_model_answers(embedder: Client, client: Client) -> None:
    vectors, text = (each.get("/v1/capabilities").json()["endpoints"] for each in (embedder, client))
    assert EMBEDDINGS in vectors
    assert "/v1/completions" in text
    assert {path for path in vectors if path in text} == {"/tokenize", "/detokenize", "/v1/messages/count_tokens"}
    assert vectors[EMBEDDINGS]["dimensions"] == {"state": "supported"}
    assert vectors[EMBEDDINGS]["user"]["state"] == "ignored"


def test_classes_have_labels_and_probabilities(classifier: Client, error_of: ErrorOf) -> None:
    body = classifier.post("/classify", {"input": ["a", "b"], "use_activation": False}).json()
    assert body["data"] == [{"index": i, "label": "yes", "probs": [2.0, 256.0 + code], "num_classes": 2} for i, code in enumerate(b"ab")]
    probs = classifier.post("/classify", {"input": "a"}).json()["data"][0]["probs"]
    assert probs == pytest.approx([0, 1])
    assert classifier.post("/pooling", {"input": "a", "task": "classify"}).json()["data"] == [
        {"index": 0, "object": "pooling", "data": probs}
    ]
    refused = classifier.post("/classify", {"input": "a", "encoding_format": "base64"})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "encoding_format")
    for path, more in ((EMBEDDINGS, {}), ("/pooling", {"task": "embed"})):
        response = classifier.post(path, {"input": "a", **more})
        assert (response.status_code, error_of(response)["code"]) == (400, "unsupported_endpoint")


def test_embedder_gives_no_classes(embedder: Client) -> None:
    assert embedder.post("/classify", {"input": "a"}).status_code == 400
    assert embedder.post("/pooling", {"input": "ab"}).json()["data"][0]["data"] == expected(b"ab")[0]


NAMES = [("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"), ("queries", "items")]


@pytest.mark.parametrize(("first", "second"), NAMES)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_scored_under_every_name(scorer: Client, path: str, first: str, second: str) -> None:
    one_to_many = scorer.post(path, {first: "ab", second: ["c", "defg"]}).json()
    assert one_to_many["data"] == [{"index": 0, "object": "score", "score": 5.0}, {"index": 1, "object": "score", "score": 8.0}]
    assert one_to_many["usage"]["prompt_tokens"] == 13
    assert one_to_many["object"] == "list"
    many = scorer.post(path, {first: ["a", "ab"], second: ["c", "defg"]}).json()
    assert [entry["score"] for entry in many["data"]] == [4.0, 8.0]
    assert scorer.post(path, {first: ["a", "b"], second: ["c"]}).status_code == 400


def test_texts_of_pairs_are_cut(scorer: Client) -> None:
    body = {"queries": "abcdef", "documents": "ghijkl", "max_tokens_per_query": 2, "max_tokens_per_doc": 3}
    assert scorer.post("/score", body).json()["data"][0]["score"] == 7.0
    assert (
        scorer.post("/score", {"queries": "abcdef", "documents": "ghijkl", "truncate_prompt_tokens": 4}).json()["data"][0]["score"] == 4.0
    )


def test_pairs_are_printed_by_a_template_that_the_server_was_started_with(error_of: ErrorOf) -> None:
    pooling = Pooling(task="classify", width=1, activation="identity")
    engine = VectorEngine(pooling, chat_template="{{ messages }}")
    client = Client(engine)
    body = {"queries": "abcdef", "documents": ["g", "hij"], "max_tokens_per_query": 2, "max_tokens_per_doc": 2}
    kwargs = {"chat_template_kwargs": {"tone": "dry"}, "instruction": "find it"}
    assert client.post("/score", {**body, **kwargs}).status_code == 200
    assert [bytes(ids[1:]) for ids in engine.inputs] == [b"<query>ab\n<document>g\n", b"<query>ab\n<document>hi\n"]
    assert [call["kwargs"] for call in engine.chat.calls] == [{"tone": "dry", "instruction": "find it"}] * 2
    outranked = {"chat_template_kwargs": {"instruction": "no"}, "instruction": "yes"}
    assert client.post("/score", {**body, **outranked}).status_code == 200
    assert engine.chat.calls[-1]["kwargs"] == {"instruction": "no"}  # as in vLLM
    assert client.post("/rerank", {"query": "a", "documents": ["b"]}).json()["results"][0]["relevance_score"] == 22.0
    without = Client(VectorEngine(pooling))
    for name in kwargs:
        refused = without.post("/score", {**body, name: kwargs[name]})
        assert (refused.status_code, error_of(refused)["param"]) == (400, name)


def test_embeddings_score_by_their_angle(embedder: Client) -> None:
    scores = [entry["score"] for entry in embedder.post("/score", {"queries": "ab", "documents": ["ab", "zz"]}).json()["data"]]
    assert scores[0] < 1  # the query has its prompt
    same = embedder.post("/score", {"queries": "ab", "documents": "q: ab"}).json()["data"][0]["score"]
    assert same == pytest.approx(1)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_in_the_order_of_their_scores(scorer: Client, path: str) -> None:
    documents = ["b", "bbbb", "bb"]
    body = scorer.post(path, {"query": "a", "documents": documents}).json()
    assert body["results"] == [
        {"index": i, "document": {"text": documents[i]}, "relevance_score": 3.0 + len(documents[i])} for i in (1, 2, 0)
    ]
    assert set(body) == {"id", "model", "usage", "results"}
    best = scorer.post(path, {"query": "a", "documents": [{"text": text} for text in documents], "top_n": 1, "return_documents": False})
    assert best.json()["results"] == [{"index": 1, "relevance_score": 7.0}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/rerank", {"documents": ["a"]}, "query"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": [{"title": "x"}]}, "documents[0]"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/score", {"queries": "a"}, "documents"),
        ("/score", {"text_1": "a", "text_2": 5}, "text_2"),
        ("/score", {"queries": "a", "documents": ["b"], "instruction": "x"}, "instruction"),
    ],
)
def test_bad_pairs_are_400_naming_the_field(scorer: Client, error_of: ErrorOf, path: str, body: dict[str, Any], param: str) -> None:
    response = scorer.post(path, body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_classifier_of_many_labels_scores_nothing(classifier: Client, error_of: ErrorOf) -> None:
    assert "2 labels" in error_of(classifier.post("/score", {"queries": "a", "documents": "b"}))["message"]


def test_many_inputs_keep_their_order(embedder: Client) -> None:
    texts = ["x" * (1 + i % 50) for i in range(MAX_INPUTS)]
    assert [vector[0] for vector in vectors_of(embedder.post(EMBEDDINGS, {"input": texts}))] == [1 + len(text) for text in texts]
