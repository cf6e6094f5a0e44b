"""What a model that turns texts into vectors gives, and how its vectors become embeddings, probabilities and scores; no jax here.

The device computes a vector a text (`Pooling.width` numbers). What a request may choose, its dimensions and whether it is normalized, is
done with it here, so that no such choice compiles anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jaxserve.errors import UserError

PoolingTask = Literal["embed", "classify"]
ScoreActivation = Literal["softmax", "sigmoid", "tanh", "relu", "identity"]
Vector = NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What a request for vectors may choose; vLLM's names.

    Args:
      dimensions: keep the first so many numbers of an embedding, of models that were trained for it.
      use_activation: normalize embeddings, turn a classifier's numbers into probabilities; None is as the model has it.
      truncate_prompt_tokens: cut longer texts to so many tokens; -1 is as many as the model takes.
      prompt_name: of the model's own prompts, to be put before texts.
    Raises: UserError naming the field, on a value out of range.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise UserError("dimensions", f"dimensions={self.dimensions} must be at least 1")
        keep = self.truncate_prompt_tokens
        if keep is not None and (keep < -1 or keep == 0):
            raise UserError("truncate_prompt_tokens", f"truncate_prompt_tokens={keep} must be -1 or at least 1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """What front ends need to know of a model that gives vectors.

    Args:
      task: "embed" gives a vector that stands for a text; "classify" a number for each label, or one score.
      width: numbers of a vector.
      activation: what makes probabilities of a classifier's numbers.
      normalize: an embedding's length becomes 1.
      labels: names of a classifier's numbers.
      matryoshka: lengths to which an embedding may be cut; an empty tuple is any, None none.
      prompts: texts to put before an input, by name; `default_prompt` is put before those that name none.
      max_len: tokens of a text that it was made for, if it says.
      lowercase: texts are taken in lower case.
      modules: folders beside the model's weights that hold the weights of layers behind pooling.
    """

    task: PoolingTask
    width: int
    normalize: bool = True
    activation: ScoreActivation = "softmax"
    labels: tuple[str, ...] = ()
    matryoshka: tuple[int, ...] | None = None
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    default_prompt: str | None = None
    max_len: int | None = None
    lowercase: bool = False
    modules: tuple[str, ...] = ()

    @property
    def is_scorer(self) -> bool:
        """Whether a pair of texts can be scored: by a classifier with one number, or by the angle between embeddings."""
        return self.task == "embed" or self.width == 1

    def prepare(self, text: str, prompt_name: str | None = None) -> str:
        """A text as the model wants it.

        Raises: UserError if there is no prompt of that name.
        """
        if prompt_name is not None and prompt_name not in self.prompts:
            known = f"it has {', '.join(map(repr, self.prompts))}" if self.prompts else "it has none"
            raise UserError("prompt_name", f"the model has no prompt named {prompt_name!r:.60}; {known}")
        name = prompt_name or self.default_prompt
        text = (self.prompts[name] if name else "") + text
        return text.lower() if self.lowercase else text

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raise UserError unless embeddings of so many numbers can be had."""
        if dimensions is None or dimensions == self.width:
            return
        if self.task != "embed":
            raise UserError("dimensions", "dimensions is for embeddings; this model is a classifier")
        if not 1 <= dimensions <= self.width:
            raise UserError("dimensions", f"dimensions={dimensions} is out of range; this model's embeddings have {self.width}")
        if self.matryoshka is None:
            message = f"this model was not trained for shorter embeddings (Matryoshka); leave dimensions out or give {self.width}"
            raise UserError("dimensions", f"{message}; --matryoshka allows it")
        if self.matryoshka and dimensions not in self.matryoshka:
            raise UserError("dimensions", f"dimensions={dimensions} is not supported; there are {', '.join(map(str, self.matryoshka))}")

    def embedding(self, vector: Vector, *, dimensions: int | None = None, use_activation: bool | None = None) -> Vector:
        """The embedding of a text, cut to its first dimensions, and then normalized if the model or the request says so."""
        cut = vector[:dimensions]
        if self.normalize if use_activation is None else use_activation:
            return cut / max(float(np.linalg.norm(cut)), 1e-12)
        return cut

    def probabilities(self, vector: Vector, *, use_activation: bool | None = None) -> Vector:
        """A classifier's probabilities, or with use_activation=False its plain numbers."""
        activation = "identity" if use_activation is False else self.activation
        match activation:
            case "softmax":
                weights = np.exp(vector - vector.max())
                return weights / weights.sum()
            case "sigmoid":
                return (0.5 * (np.tanh(0.5 * vector) + 1)).astype(np.float32)  # without overflow
            case "tanh":
                return np.tanh(vector)
            case "relu":
                return np.maximum(vector, 0)
            case "identity":
                return vector

    def finish(self, vector: Vector, *, dimensions: int | None = None, use_activation: bool | None = None) -> Vector:
        """What the model's task makes of a vector."""
        if self.task == "embed":
            return self.embedding(vector, dimensions=dimensions, use_activation=use_activation)
        return self.probabilities(vector, use_activation=use_activation)

    def label(self, number: int) -> str | None:
        """The name of one of a classifier's numbers."""
        return self.labels[number] if number < len(self.labels) else None


def cosine(a: Vector, b: Vector) -> float:
    """The cosine of the angle between two vectors; 0 if one is zero."""
    return float(np.dot(a, b) / max(float(np.linalg.norm(a)) * float(np.linalg.norm(b)), 1e-12))


def read_matryoshka(values: Mapping[str, Any], *, forced: bool) -> tuple[int, ...] | None:
    """Of a config.json, as vLLM reads it: matryoshka_dimensions, else is_matryoshka; `forced` allows any length."""
    listed = values.get("matryoshka_dimensions")
    if isinstance(listed, list) and all(isinstance(item, int) for item in listed):
        return tuple(listed)
    return () if forced or values.get("is_matryoshka") is True else None
