"""POST /v1/embeddings, /pooling, /classify, /score and /rerank: texts in, vectors and what is made of them out.

1. Read the body; refuse what the model's task cannot give.
2. Tokenize, off the event loop when it is long, and submit one request an input, all or none.
3. Collect the vectors, and print them in OpenAI's, vLLM's or Jina's shape.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from starlette.types import Receive, Send

from jaxserve.api import examples
from jaxserve.api.answers import Running, answer_id, check_chars, ready, served_name, start
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import parse_object
from jaxserve.api.operation import Body, Operation
from jaxserve.api.parameters import UNSUPPORTED_CODE
from jaxserve.api.protocol import Rendering
from jaxserve.api.turn import render_prompt
from jaxserve.api.vectors_request import (
    NOT_OF_CLASSES,
    InputsRequest,
    PairsRequest,
    VectorOptions,
    read_inputs,
    read_rerank,
    read_score,
)
from jaxserve.api.wire import INLINE_BYTES, INLINE_CHARS, off_loop, send_bytes, send_json
from jaxserve.errors import EngineUnavailableError, UserError
from jaxserve.pooling import Pooling, Vector
from jaxserve.request import RequestOutput
from jaxserve.text.chat import render_pair
from jaxserve.text.vectors import Render, ScorePlan, TextOptions, VectorInput, cut_ids, encode_text

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine, OutputStream
    from jaxserve.engine.load import ServedModel

_INLINE_FLOATS = 1 << 14
_ANY = 1 << 20  # what bounds token ids in the documented schemas
_TEXT = {"type": "string"}
_DOCUMENTS = {
    "type": "array",
    "items": {"anyOf": [_TEXT, {"type": "object", "properties": {"text": _TEXT}, "required": ["text"]}]},
}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_BY_HAND = {
    "input": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, _IDS, {"type": "array", "items": _IDS}]},
    **{name: {"anyOf": [_TEXT, _DOCUMENTS]} for name in ("queries", "documents", "items", "text_1", "text_2", "data_1", "data_2")},
}


def vectors_operations(engine: AsyncEngine) -> list[Operation]:
    """The lines of the route table."""
    read = functools.partial(read_inputs, vocab_size=_ANY, max_len=_ANY)

    def make(path: str, handler: VectorsEndpoint, summary: str, body: Body) -> Operation:
        may_be_bytes = isinstance(handler, InputsEndpoint) and "encoding_format" not in handler.foreign
        return Operation(
            path=path, methods=("POST",), handler=handler, summary=summary, tag="pooling", body=body, may_be_bytes=may_be_bytes
        )  # fmt: skip

    inputs = Body(read, examples.INPUTS, by_hand=_BY_HAND)
    classes = functools.partial(read, foreign=NOT_OF_CLASSES)
    classify = Body(classes, examples.CLASSIFY, by_hand=_BY_HAND, foreign=NOT_OF_CLASSES)
    score = Body(read_score, examples.SCORE, by_hand=_BY_HAND)
    rerank = Body(read_rerank, examples.RERANK, by_hand=_BY_HAND)
    return [
        make("/v1/embeddings", EmbeddingsEndpoint(engine), "Embeddings of texts", inputs),
        make("/pooling", PoolingEndpoint(engine), "What the model gives for texts, embeddings or probabilities", inputs),
        make("/classify", ClassifyEndpoint(engine), "The probabilities of a classifier's labels", classify),
        *(make(path, ScoreEndpoint(engine), "Scores of pairs of texts", score) for path in ("/score", "/v1/score")),
        *(
            make(path, RerankEndpoint(engine), "Documents in the order of their scores with a query", rerank)
            for path in ("/rerank", "/v1/rerank", "/v2/rerank")
        ),
    ]


class VectorsEndpoint(JsonEndpoint):
    """What the routes share."""

    gives = "vectors"

    def pooling(self) -> Pooling:
        """What the model makes of texts."""
        pooling = ready(self.engine).pooling
        assert pooling is not None, "the frame has seen to it"
        return pooling

    async def run(self, inputs: Sequence[VectorInput], options: VectorOptions, receive: Receive) -> list[RequestOutput]:
        """The engine's output for each input. Raises: UserError, QueueFullError, EngineUnavailableError."""

        def starting() -> Iterator[OutputStream]:
            for each in inputs:
                stream = self.engine.submit_pooling(
                    each.ids, second_at=each.second_at, priority=options.priority, cache_salt=options.cache_salt
                )
                stream.name = options.request_id
                yield stream

        streams = start(self.engine, starting())
        async with Running(receive, streams) as running:
            return [await running.collect(stream) for stream in streams]

    def text_options(self, options: VectorOptions, **fields: Any) -> TextOptions:
        """How texts are cut. Raises: UserError if more is to be kept than the model takes."""
        keep, max_len = options.truncate, ready(self.engine).max_len
        if keep is not None and keep > max_len:
            message = f"truncate_prompt_tokens is {keep}, but this model takes at most {max_len} tokens"
            raise UserError("truncate_prompt_tokens", message)
        return TextOptions(max_tokens=max_len if keep == -1 else keep, side=options.side, **fields)

    def head(self, kind: str, options: VectorOptions) -> dict[str, Any]:
        """The members that begin an answer."""
        name = served_name(self.engine.config, options.model)
        return {"id": answer_id(kind, options.request_id), "object": "list", "created": int(time.time()), "model": name}


class InputsEndpoint(VectorsEndpoint):
    """The routes that take inputs one by one.

    Attributes:
      kind: begins the ids of answers.
      task: what the model must give; None is anything.
      foreign: parameters that the route has no use for.
    """

    kind: str
    task: str | None = None
    foreign: frozenset[str] = frozenset()

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer with a line for each input."""
        served, pooling = ready(self.engine), self.pooling()
        read = functools.partial(read_inputs, vocab_size=served.vocab_size, max_len=served.max_len, foreign=self.foreign)
        request = await off_loop(len(body) > INLINE_BYTES, lambda: read(Fields(parse_object(body))))
        head = self.head(self.kind, request.options)
        self._check(request, pooling)
        outputs = await self.run(await self._encode(request, served, pooling), request.options, receive)

        def vectors() -> list[Vector]:
            finish = functools.partial(pooling.finish, dimensions=request.dimensions, use_activation=request.options.use_activation)
            return [finish(_vector(output)) for output in outputs]

        def lines() -> bytes:
            data = [self.line(i, vector, request, pooling) for i, vector in enumerate(vectors())]
            return _dump({**head, "data": data, "usage": _usage(outputs)})

        heavy = len(outputs) * pooling.width > _INLINE_FLOATS
        if request.encoding.is_binary:
            content, metadata = await off_loop(heavy, lambda: request.encoding.body(vectors(), head, _usage(outputs)))
            await send_bytes(send, content, {} if metadata is None else {b"metadata": metadata})
        else:
            await send_json(send, await off_loop(heavy, lines))

    def line(self, index: int, vector: Vector, request: InputsRequest, pooling: Pooling) -> dict[str, Any]:
        """What is said of one input."""
        raise NotImplementedError

    def _check(self, request: InputsRequest, pooling: Pooling) -> None:
        wanted = self.task or request.task
        if wanted is not None and wanted != pooling.task:
            what = {"embed": "gives embeddings; it is no classifier", "classify": "is a classifier; it gives no embeddings"}[pooling.task]
            raise UserError("model", f"this model {what}", code="unsupported_endpoint")
        pooling.check_dimensions(request.dimensions)

    async def _encode(self, request: InputsRequest, served: ServedModel, pooling: Pooling) -> list[VectorInput]:
        given = request.inputs
        options = self.text_options(request.options, add_special_tokens=request.add_special_tokens, prompt_name=request.prompt_name)
        if isinstance(given, Rendering):
            ids, _ = await render_prompt(served, given, request.add_special_tokens)
            return [cut_ids(served.tokenizer, ids, options)]
        _check_texts("input", [item for item in given if isinstance(item, str)], request.options, served)

        def work() -> list[VectorInput]:
            return [
                encode_text(served.tokenizer, pooling, item, options) if isinstance(item, str) else cut_ids(served.tokenizer, item, options)
                for item in given
            ]

        return await off_loop(sum(map(len, given)) > INLINE_CHARS, work)


class EmbeddingsEndpoint(InputsEndpoint):
    """The ASGI app of /v1/embeddings."""

    kind, task = "embd", "embed"

    def line(self, index: int, vector: Vector, request: InputsRequest, pooling: Pooling) -> dict[str, Any]:
        return {"index": index, "object": "embedding", "embedding": request.encoding.shown(vector)}


class PoolingEndpoint(InputsEndpoint):
    """The ASGI app of /pooling."""

    kind = "pool"

    def line(self, index: int, vector: Vector, request: InputsRequest, pooling: Pooling) -> dict[str, Any]:
        return {"index": index, "object": "pooling", "data": request.encoding.shown(vector)}


class ClassifyEndpoint(InputsEndpoint):
    """The ASGI app of /classify."""

    kind, task, foreign = "classify", "classify", NOT_OF_CLASSES

    def line(self, index: int, vector: Vector, request: InputsRequest, pooling: Pooling) -> dict[str, Any]:
        return {"index": index, "label": pooling.label(int(vector.argmax())), "probs": vector, "num_classes": len(vector)}


class PairsEndpoint(VectorsEndpoint):
    """The routes that take pairs.

    Attributes:
      read: reads the body.
    """

    read: Callable[[Fields], PairsRequest]

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer with the scores."""
        served, pooling = ready(self.engine), self.pooling()
        request = await off_loop(len(body) > INLINE_BYTES, lambda: type(self).read(Fields(parse_object(body))))
        options = request.options
        name = served_name(self.engine.config, options.model)
        texts = self.text_options(options, max_query=request.max_query, max_document=request.max_document)
        for field, given, most in zip(
            request.names, (request.queries, request.documents), (request.max_query, request.max_document), strict=True
        ):
            if most is None:
                _check_texts(field, given, options, served)
        chars = sum(map(len, request.queries)) + sum(map(len, request.documents))
        render = self._render(request, served, pooling)
        make = functools.partial(ScorePlan, served.tokenizer, pooling, request.queries, request.documents, texts, request.names, render)
        plan = await off_loop(chars > INLINE_CHARS or render is not None, make)
        outputs = await self.run(plan.inputs, options, receive)
        scores = plan.scores([_vector(output) for output in outputs], use_activation=options.use_activation)
        await send_json(send, self.whole(name, request, scores, _usage(outputs)))

    def _render(self, request: PairsRequest, served: ServedModel, pooling: Pooling) -> Render | None:
        """What pairs are printed with: as in vLLM only a template that the server was started with, as those of models are for chats."""
        if self.engine.config.model.chat_template is not None and pooling.task == "classify":
            return functools.partial(render_pair, served.chat, kwargs=request.template_kwargs)
        if request.template_kwargs:
            name = "instruction" if "instruction" in request.template_kwargs else "chat_template_kwargs"
            message = f"{name} is for classifiers on servers with a template for pairs (--chat-template); this one prints them without"
            raise UserError(name, message, code=UNSUPPORTED_CODE)
        return None

    def whole(self, name: str, request: PairsRequest, scores: list[float], usage: dict[str, int]) -> dict[str, Any]:
        """The answer."""
        raise NotImplementedError


class ScoreEndpoint(PairsEndpoint):
    """The ASGI app of /score."""

    read = staticmethod(read_score)

    def whole(self, name: str, request: PairsRequest, scores: list[float], usage: dict[str, int]) -> dict[str, Any]:
        data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
        return {**self.head("score", request.options), "data": data, "usage": usage}


class RerankEndpoint(PairsEndpoint):
    """The ASGI app of /rerank."""

    read = staticmethod(read_rerank)

    def whole(self, name: str, request: PairsRequest, scores: list[float], usage: dict[str, int]) -> dict[str, Any]:
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: request.top_n or None]
        results = [
            {"index": i, **({"document": {"text": request.documents[i]}} if request.return_documents else {}), "relevance_score": scores[i]}
            for i in order
        ]
        return {"id": answer_id("rerank", request.options.request_id), "model": name, "usage": usage, "results": results}


def _check_texts(field: str, texts: Sequence[str], options: VectorOptions, served: ServedModel) -> None:
    """Refuse what cannot fit, unless it is to be cut."""
    if options.truncate is None:
        for text in texts:
            check_chars(field, len(text), served.max_len)


def _vector(output: RequestOutput) -> Vector:
    if output.pooled is None:
        raise EngineUnavailableError("an operator has ended this request")
    return output.pooled


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    tokens = sum(output.num_prompt_tokens for output in outputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}


def _dump(answer: dict[str, Any]) -> bytes:
    return orjson.dumps(answer, default=np.ndarray.tolist, option=orjson.OPT_SERIALIZE_NUMPY)
