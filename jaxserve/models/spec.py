"""What a decoder is made of, as frozen data: one field, one effect; a family is a function from its config to a ModelSpec."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """Root-mean-square normalization of the last axis, in float32, times a learned weight."""

    eps: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions divided by factor."""

    factor: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies divided by factor, high ones kept, a smooth ramp between; original_len in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions on the first dim features of a head, halves layout; theta is the base of the frequencies."""

    dim: int
    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Causal attention with num_kv_heads shared by num_heads queries; window in tokens, None is unlimited."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    sm_scale: float
    rope: RopeSpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    window: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """Gated feed-forward layer: down(activation(gate(x)) * up(x)), hidden width `width`."""

    width: int
    activation: Activation
    bias: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One pre-norm block: x += attention(norm(x)); x += mlp(norm(x))."""

    attention: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole decoder.

    Args:
      width: D.
      vocab_size: V, the logits' width.
      max_len: most tokens that the positions were trained for.
      tied: the output head is the embedding matrix.
    """

    width: int
    vocab_size: int
    max_len: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tied: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers first .. first + repeats * len(pattern) of a model, as a pattern repeated; stacked in the parameters."""

    first: int
    repeats: int
    pattern: tuple[LayerSpec, ...]


def fold_layers(layers: tuple[LayerSpec, ...], *, scan: bool) -> tuple[LayerGroup, ...]:
    """Group layers into (pattern x repeats).

    With scan, each group takes the shortest pattern that covers most of what is left; without, each layer is its own group.
    """
    if not scan:
        return tuple(LayerGroup(first=i, repeats=1, pattern=(layer,)) for i, layer in enumerate(layers))
    groups: list[LayerGroup] = []
    start = 0
    while start < len(layers):
        best = (1, 1)  # (pattern length, repeats)
        for length in range(1, min(16, len(layers) - start) + 1):  # no published pattern is longer than 16
            pattern, repeats = layers[start : start + length], 1
            while layers[start + repeats * length : start + (repeats + 1) * length] == pattern:
                repeats += 1
            if repeats > 1 and length * repeats > best[0] * best[1]:
                best = (length, repeats)
        length, repeats = best
        groups.append(LayerGroup(first=start, repeats=repeats, pattern=layers[start : start + length]))
        start += length * repeats
    return tuple(groups)
