"""What a decoder is made of, as frozen data: one field, one effect; a family is a function from its config to a ModelSpec."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxserve.models.mlp_spec import Activation, MlpSpec, MoeSpec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """Normalization of the last axis, in float32, times a learned weight.

    Args:
      kind: "rms" divides by the root of the mean square; "layer" subtracts the mean first.
      weight: whether there is one.
      plus_one: the factor is 1 + weight, computed in float32.
      bias: a learned bias is added.
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    weight: bool = True
    plus_one: bool = False
    bias: bool = False


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
class YarnScaling:
    """Frequencies of less than beta_slow turns in original_len tokens divided by factor, of more than beta_fast kept, a ramp between.

    Args:
      attention_factor: multiplies cosine and sine.
      truncate: the ramp begins and ends at whole features.
    """

    factor: float
    original_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DynamicScaling:
    """The base raised as far as texts of max_len tokens need, when the model was trained for original_len; see `limit_length`."""

    factor: float
    original_len: int
    max_len: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """Each frequency divided by its short factor, or by its long one if texts may exceed original_len; see `limit_length`.

    Args:
      short, long: a divisor for each pair of features.
      attention_factor: multiplies cosine and sine.
      long_attention_factor: does so instead where the long divisors hold; None is the same.
      max_len: tokens of the longest text there can be.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    attention_factor: float
    original_len: int
    max_len: int
    long_attention_factor: float | None = None

    @property
    def is_long(self) -> bool:
        """Whether texts may exceed original_len."""
        return self.max_len > self.original_len


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NtkScaling:
    """The frequency of pair m, from 1 on, of n pairs divided by factor ** ((m / n) ** exponent): the lowest by all of it."""

    factor: float
    exponent: float = 1.0


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling | NtkScaling


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions on the first dim features of a head; theta is the base of the frequencies.

    Args:
      interleaved: feature 2i pairs with 2i + 1; otherwise i pairs with i + dim / 2.
    """

    dim: int
    theta: float
    scaling: RopeScaling | None = None
    interleaved: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class QkNormSpec:
    """Normalization of queries and keys, before rotary positions.

    Args:
      over: "head" is each head by itself with one weight for all; "heads" the same with a weight for each head; "width" all heads as one
        vector.
    """

    norm: NormSpec
    over: Literal["head", "heads", "width"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogTemperature:
    """Queries at position p are multiplied by 1 + scale * log(1 + floor((p + 1) / period))."""

    period: float
    scale: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DistanceBuckets:
    """Distances between a query and its keys in `count` buckets, half of them for keys that come after it.

    A quarter of all are one distance each, from 0 on; the others grow by a factor up to max_distance, and the last holds all beyond.
    """

    count: int
    max_distance: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Attention with num_kv_heads shared by num_heads queries.

    Args:
      causal: a query sees no key after its own; otherwise all of its text.
      sm_scale: multiplies the scores.
      clip: queries, keys and values are cut to -clip .. clip.
      clip_normed: they are cut after queries and keys are normalized, not before.
      window: tokens that a query sees, itself included, and if not causal as many of those after it; None is unlimited.
      chunk: texts are cut into chunks of so many tokens, and a query sees no key of another chunk; None is not.
      temperature: of queries, by their position.
      softcap: scores become softcap * tanh(scores / softcap).
      alibi_slopes: one a head; the distance to a key times the slope is taken from its score.
      sinks: each head has a learned logit that joins the softmax and has no value.
      distance_buckets: each head has a learned number for each bucket of distances, which is added to scores; no kernel has that.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    sm_scale: float
    rope: RopeSpec | None
    qkv_bias: bool = False
    out_bias: bool = False
    clip: float | None = None
    clip_normed: bool = False
    qk_norm: QkNormSpec | None = None
    window: int | None = None
    chunk: int | None = None
    temperature: LogTemperature | None = None
    softcap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    sinks: bool = False
    distance_buckets: DistanceBuckets | None = None
    causal: bool = True

    @property
    def implementation(self) -> Literal["xla"] | None:
        """Which one must compute it; None is the platform's kernel."""
        return None if self.distance_buckets is None else "xla"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MlaSpec:
    """Causal attention whose keys and values are projections of one small latent a token, which is all that is cached (DeepSeek).

    Args:
      latent_size: C, of the latent; rope.dim more numbers a token are a key that all heads share, the only ones with positions.
      nope_size: of a head's queries and keys beside the rotated part.
      value_size: of a head's values.
      q_rank: queries are projected to so many numbers, normalized, and then to heads; None projects them at once.
      sm_scale: multiplies the scores.
      norm: of latents, and of queries between their projections.
      down_bias: the projections to latents have a bias.
    """

    num_heads: int
    latent_size: int
    nope_size: int
    value_size: int
    q_rank: int | None
    rope: RopeSpec
    sm_scale: float
    norm: NormSpec
    down_bias: bool = False
    out_bias: bool = False

    @property
    def num_kv_heads(self) -> int:
        """Every head has keys and values of its own, though none is cached."""
        return self.num_heads

    @property
    def causal(self) -> bool:
        """A query sees no key after its own."""
        return True


Placement = Literal["pre", "pre_mlp", "sandwich", "post", "post_sum", "pre_carried", "parallel", "parallel_shared"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One block; f is its attention, then its MLP, and each norm is one of the layer's own.

    Args:
      norm: the kind of all the block's norms.
      placement: "pre" x += f(norm(x)); "pre_mlp" the same without the attention's norm; "sandwich" x += norm'(f(norm(x)));
        "post" x += norm(f(x)); "post_sum" x = norm(x + f(x));
        "pre_carried" x = norm(x) + f(norm(x)); "parallel" x += attention(norm(x)) + mlp(norm'(x)); "parallel_shared" the same with one
        norm.
      residual_scale: multiplies what f adds.
    """

    attention: AttentionSpec | MlaSpec
    mlp: MlpSpec | MoeSpec
    norm: NormSpec
    placement: Placement = "pre"
    residual_scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """A learned vector for each position, at row position + offset of a table."""

    num_rows: int
    offset: int = 0


PoolMethod = Literal["cls", "last", "mean", "max", "weighted_mean", "mean_sqrt_len"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayerSpec:
    """A layer behind pooling: norm(activation(W x + b)), to `width` features; activation and norm may be missing."""

    width: int
    bias: bool = True
    activation: Activation | Literal["tanh", "identity"] = "identity"
    norm: NormSpec | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """A text's hidden states as one vector.

    Args:
      method: "cls" takes the first token's; "last" the last one's; "mean" and "max" are over all; "weighted_mean" counts token i,
        from 1 on, i times; "mean_sqrt_len" divides the sum by the root of the number of tokens.
      layers: what the vector goes through then, such as a classifier.
    """

    method: PoolMethod
    layers: tuple[PoolLayerSpec, ...] = ()

    @property
    def needs_all_tokens(self) -> bool:
        """Whether more hidden states go into the vector than the last one."""
        return self.method != "last"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole decoder, or an encoder: one whose layers are not causal.

    Args:
      width: D.
      vocab_size: V, the logits' width.
      max_len: most tokens that the positions were trained for.
      final_norm: None if the last block's output goes to the head as it is.
      tied: the output head is the embedding matrix.
      embed_width: of the embedding matrix, when it is not D: a matrix each leads to D and back.
      embed_scale: multiplies embeddings, rounded to their dtype.
      embed_norm: normalizes embeddings.
      positions: learned vectors that are added to embeddings.
      token_types: learned vectors for the parts of a text, one of which is added to each embedding; 0 is none.
      head_bias: the logits have a bias.
      logit_scale: multiplies logits, before the softcap.
      logit_softcap: logits become softcap * tanh(logits / softcap).
      pool: the model turns texts into vectors; it has no head then.
    """

    width: int
    vocab_size: int
    max_len: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    tied: bool
    embed_width: int | None = None
    embed_scale: float = 1.0
    embed_norm: NormSpec | None = None
    positions: LearnedPositions | None = None
    token_types: int = 0
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    pool: PoolSpec | None = None

    @property
    def is_causal(self) -> bool:
        """Whether a token's hidden state depends on nothing after it, so that texts can be computed in parts."""
        return all(layer.attention.causal for layer in self.layers)


def limit_length(spec: ModelSpec, max_len: int) -> ModelSpec:
    """The model for texts of at most max_len tokens: positions whose rotation depends on how long texts can be are told so.

    Every token is rotated alike whatever its neighbours, so that a cached key serves every text; what transformers decides anew with
    each call, by the length so far, is decided here by the length there can be.
    """
    layers = []
    for layer in spec.layers:
        rope = layer.attention.rope
        if rope is not None and isinstance(rope.scaling, DynamicScaling | LongRopeScaling):
            rope = dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, max_len=max_len))
            layer = dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, rope=rope))
        layers.append(layer)
    return dataclasses.replace(spec, layers=tuple(layers), max_len=min(spec.max_len, max_len))


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
