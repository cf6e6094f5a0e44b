"""Vectors of texts for offline use: `LLM.embed`, `encode`, `classify` and `score`, with results in vLLM's shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from jaxserve.engine.admit import Admission
from jaxserve.engine.load import ServedModel
from jaxserve.errors import UserError
from jaxserve.pooling import Pooling, PoolingParams, PoolingTask, Vector
from jaxserve.request import Request, RequestOutput
from jaxserve.text.vectors import Render, ScorePlan, TextOptions, VectorInput, cut_ids, encode_text

T = TypeVar("T")
Drive = Callable[[list[Request]], dict[str, RequestOutput]]


@dataclasses.dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The embedding of a text."""

    embedding: list[float]


@dataclasses.dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """The probability of each label, and the likeliest one's name, if it has one."""

    probs: list[float]
    label: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class ScoringOutput:
    """The score of a pair."""

    score: float


@dataclasses.dataclass(frozen=True, slots=True)
class PoolingOutput:
    """What the model gives for a text, whatever its task."""

    data: list[float]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolingResult(Generic[T]):
    """What became of one prompt; the token ids are those of the text, or of both texts of a pair."""

    request_id: str
    outputs: T
    prompt_token_ids: tuple[int, ...]
    num_cached_tokens: int
    finished: bool = True


class Vectors:
    """The offline methods over one engine.

    Args:
      drive: runs requests to their end.
    """

    def __init__(self, served: ServedModel, admission: Admission, drive: Drive) -> None:
        self._served, self._admission, self._drive = served, admission, drive

    def embed(self, prompts: Sequence[str | Sequence[int]], params: PoolingParams) -> list[PoolingResult[EmbeddingOutput]]:
        """Embeddings; see LLM.embed."""
        self._pooling("embed")
        return self._each(prompts, params, lambda vector: EmbeddingOutput(vector.tolist()))

    def classify(self, prompts: Sequence[str | Sequence[int]], params: PoolingParams) -> list[PoolingResult[ClassificationOutput]]:
        """Probabilities of labels; see LLM.classify."""
        pooling = self._pooling("classify")
        return self._each(prompts, params, lambda vector: ClassificationOutput(vector.tolist(), pooling.label(int(vector.argmax()))))

    def encode(
        self, prompts: Sequence[str | Sequence[int]], params: PoolingParams, task: PoolingTask | None = None
    ) -> list[PoolingResult[PoolingOutput]]:
        """What the model's task gives; see LLM.encode."""
        self._pooling(task)
        return self._each(prompts, params, lambda vector: PoolingOutput(vector.tolist()))

    def score(
        self, queries: Sequence[str], documents: Sequence[str], params: PoolingParams, render: Render | None = None
    ) -> list[PoolingResult[ScoringOutput]]:
        """Scores of pairs; see LLM.score."""
        pooling, tokenizer = self._pooling(None), self._served.tokenizer
        if render is not None and pooling.task != "classify":
            raise UserError("chat_template", "chat_template is for classifiers; embeddings are of each text alone")
        plan = ScorePlan(tokenizer, pooling, queries, documents, self._options(params), fields=("data_1", "data_2"), render=render)
        outputs = self._run(plan.inputs)
        scores = plan.scores([_vector(output) for output in outputs], use_activation=params.use_activation)
        results: list[PoolingResult[ScoringOutput]] = []
        for i, score in enumerate(scores):
            parts = plan.parts_of(i)
            ids = tuple(token for part in parts for token in plan.inputs[part].ids)
            cached = sum(outputs[part].num_cached_tokens for part in parts)
            name = "_".join(outputs[part].id for part in parts)
            results.append(PoolingResult(request_id=name, outputs=ScoringOutput(score), prompt_token_ids=ids, num_cached_tokens=cached))
        return results

    def _pooling(self, task: PoolingTask | None) -> Pooling:
        return pooling_of(self._served, task)

    def _options(self, params: PoolingParams) -> TextOptions:
        return _options(self._served, params)

    def _each(self, prompts: Sequence[str | Sequence[int]], params: PoolingParams, make: Callable[[Vector], T]) -> list[PoolingResult[T]]:
        inputs = [input_of(self._served, prompt, params) for prompt in prompts]
        outputs = self._run(inputs)
        return [result_of(self._served, each, output, params, make) for each, output in zip(inputs, outputs, strict=True)]

    def _run(self, inputs: Sequence[VectorInput]) -> list[RequestOutput]:
        requests = [self._admission.make_pool_request(each.ids, second_at=each.second_at) for each in inputs]
        outputs = self._drive(requests)
        return [outputs[request.id] for request in requests]


def pooling_of(served: ServedModel, task: PoolingTask | None) -> Pooling:
    """What the model makes of texts. Raises: UserError if that is not the task, or no vectors at all."""
    pooling = served.pooling
    if pooling is None:
        raise UserError(None, "this model writes text; vectors are for models of them, or with runner='pooling'")
    if task is not None and pooling.task != task:
        what = "gives embeddings, not classes" if task == "classify" else "is a classifier; it gives no embeddings"
        raise UserError(None, f"this model {what}")
    return pooling


def input_of(served: ServedModel, prompt: str | Sequence[int], params: PoolingParams) -> VectorInput:
    """A text or its token ids as the model takes them. Raises: UserError if the model cannot give what the params ask for."""
    pooling, options = pooling_of(served, None), _options(served, params)
    pooling.check_dimensions(params.dimensions)
    tokenizer = served.tokenizer
    return encode_text(tokenizer, pooling, prompt, options) if isinstance(prompt, str) else cut_ids(tokenizer, prompt, options)


def result_of(
    served: ServedModel, given: VectorInput, output: RequestOutput, params: PoolingParams, make: Callable[[Vector], T]
) -> PoolingResult[T]:
    """What became of a text."""
    vector = pooling_of(served, None).finish(_vector(output), dimensions=params.dimensions, use_activation=params.use_activation)
    return PoolingResult(
        request_id=output.id, outputs=make(vector), prompt_token_ids=tuple(given.ids), num_cached_tokens=output.num_cached_tokens
    )


def _options(served: ServedModel, params: PoolingParams) -> TextOptions:
    keep = params.truncate_prompt_tokens
    return TextOptions(max_tokens=served.max_len if keep == -1 else keep, prompt_name=params.prompt_name)


def _vector(output: RequestOutput) -> Vector:
    assert output.pooled is not None, f"{output.id=} has no vector"
    return output.pooled
