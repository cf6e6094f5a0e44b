"""Texts as a model of vectors takes them, and pairs of texts as scores.

A classifier with one number scores a pair as one text; a model of embeddings scores it by the angle between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol, TypeVar

from jaxserve.errors import UserError
from jaxserve.pooling import Pooling, Vector, cosine

T = TypeVar("T")
# A query and a document as one text.
Render = Callable[[str, str], str]


class TextTokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See Tokenizer."""
        ...

    def encode_pair(
        self, first: str, second: str, *, max_first: int | None = None, max_second: int | None = None, max_tokens: int | None = None
    ) -> tuple[list[int], int | None]:
        """See Tokenizer."""
        ...

    def shorten(self, ids: Sequence[int], max_tokens: int, *, side: Literal["left", "right"]) -> list[int]:
        """See Tokenizer."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How texts become token ids.

    Args:
      add_special_tokens: put what the model expects around a text.
      max_tokens: of a text or pair; what is longer is cut. None cuts nothing.
      side: the end that is cut.
      max_query, max_document: tokens of the texts of a pair.
      prompt_name: of the model's own prompts, to be put before a text.
    """

    add_special_tokens: bool = True
    max_tokens: int | None = None
    side: Literal["left", "right"] = "right"
    max_query: int | None = None
    max_document: int | None = None
    prompt_name: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class VectorInput:
    """Token ids whose vector is wanted; second_at is where the second text of a pair begins."""

    ids: list[int]
    second_at: int | None = None


def encode_text(tokenizer: TextTokenizer, pooling: Pooling, text: str, options: TextOptions) -> VectorInput:
    """One text, with its prompt.

    Raises: UserError if there is no such prompt, or the text is not valid Unicode.
    """
    ids = tokenizer.encode(pooling.prepare(text, options.prompt_name), add_special_tokens=options.add_special_tokens)
    return cut_ids(tokenizer, ids, options)


def cut_ids(tokenizer: TextTokenizer, ids: Sequence[int], options: TextOptions) -> VectorInput:
    """Token ids, cut if they are too many."""
    if options.max_tokens is None or len(ids) <= options.max_tokens:
        return VectorInput(list(ids))
    return VectorInput(tokenizer.shorten(ids, options.max_tokens, side=options.side))


class ScorePlan:
    """Which vectors the scores of pairs need, and the scores that come of them.

    Args:
      queries, documents: as many of the one as of the other, or one query for all documents.
      fields: what messages call the two.
      render: what a classifier's pairs are printed with; None puts the two behind each other, as the tokenizer does it.
    Raises: UserError if the model gives no scores, or the numbers do not fit.
    """

    def __init__(
        self, tokenizer: TextTokenizer, pooling: Pooling, queries: Sequence[str], documents: Sequence[str], options: TextOptions,
        fields: tuple[str, str] = ("queries", "documents"), render: Render | None = None,
    ) -> None:  # fmt: skip
        for name, texts in zip(fields, (queries, documents), strict=True):
            if not texts:
                raise UserError(name, f"{name} must hold at least one text")
        if len(queries) not in (1, len(documents)):
            message = (
                f"{len(queries)} {fields[0]} and {len(documents)} {fields[1]} do not make pairs; give as many of each, or one and many"
            )
            raise UserError(fields[0], message)
        if not pooling.is_scorer:
            message = f"this model is a classifier with {pooling.width} labels; pairs are scored by embeddings or a classifier with one"
            raise UserError(None, message)
        self._pooling = pooling
        self._num_queries = len(queries)
        self._num_pairs = len(documents)
        if pooling.task == "classify" and render is not None:
            self.inputs = [_rendered(tokenizer, render, a, b, options) for a, b in zip(self._spread(queries), documents, strict=True)]
        elif pooling.task == "classify":
            limits: Mapping[str, int | None] = {
                "max_first": options.max_query, "max_second": options.max_document, "max_tokens": options.max_tokens,
            }  # fmt: skip
            pairs = zip(self._spread(queries), documents, strict=True)
            self.inputs = [VectorInput(*tokenizer.encode_pair(a, b, **limits)) for a, b in pairs]
        else:
            sides = ((queries, options.max_query, "query"), (documents, options.max_document, "document"))
            self.inputs = [
                encode_text(tokenizer, pooling, text, self._options(options, most, prompt))
                for texts, most, prompt in sides
                for text in texts
            ]

    def scores(self, vectors: Sequence[Vector], *, use_activation: bool | None = None) -> list[float]:
        """The score of each pair, from the vectors of `inputs`."""
        if self._pooling.task == "classify":
            return [float(self._pooling.probabilities(vector, use_activation=use_activation)[0]) for vector in vectors]
        queries, documents = vectors[: self._num_queries], vectors[self._num_queries :]
        return [cosine(a, b) for a, b in zip(self._spread(queries), documents, strict=True)]

    def parts_of(self, pair: int) -> tuple[int, ...]:
        """Which of `inputs` the score of a pair comes from."""
        if self._pooling.task == "classify":
            return (pair,)
        return (0 if self._num_queries == 1 else pair), self._num_queries + pair

    def _options(self, options: TextOptions, most: int | None, prompt: str) -> TextOptions:
        limits = [limit for limit in (options.max_tokens, most) if limit is not None]
        name = prompt if prompt in self._pooling.prompts else None
        return dataclasses.replace(options, max_tokens=min(limits, default=None), prompt_name=name)

    def _spread(self, queries: Sequence[T]) -> list[T]:
        return list(queries) * (self._num_pairs if self._num_queries == 1 else 1)


def _rendered(tokenizer: TextTokenizer, render: Render, query: str, document: str, options: TextOptions) -> VectorInput:
    """A pair as a template prints it, its texts cut before and the whole behind."""

    def cut(text: str, most: int | None) -> str:
        ids = [] if most is None else tokenizer.encode(text, add_special_tokens=False)
        return text if most is None or len(ids) <= most else tokenizer.decode(ids[:most])

    text = render(cut(query, options.max_query), cut(document, options.max_document))
    return cut_ids(tokenizer, tokenizer.encode(text, add_special_tokens=options.add_special_tokens), options)
