"""What the configs and checkpoints of many families have in common: readers of parts of a spec, and Llama's names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import Activation, MlpSpec
from jaxserve.models.names import Family, Names, stored, with_leaves
from jaxserve.models.spec import (
    AttentionSpec,
    DynamicScaling,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    NormSpec,
    NtkScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "relu2": "relu2",
}
FULL, SLIDING = "full_attention", "sliding_attention"


def read_activation(config: HfConfig, key: str = "hidden_act", default: str = "silu") -> Activation:
    """The activation function that a key names.

    Raises: ConfigError naming what there is.
    """
    name = config.get(key, default)
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{key}={name!r} is not supported; there are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def read_rope(
    config: HfConfig, head_size: int, *, theta: float = 10_000.0, partial: float = 1.0, interleaved: bool = False, kind: str | None = None
) -> RopeSpec:
    """Rotary positions, whose config may be of any age.

    Args:
      theta, partial: defaults of the base and of the rotated part of a head.
      kind: of layer, if they differ by it.
    Raises: ConfigError naming what is not understood.
    """
    rope = config.rope_parameters(kind)
    theta = float(rope.get("rope_theta", theta))
    stated = config.get("partial_rotary_factor", partial)  # older configs have it at the top, some have it twice
    fraction = rope.get("partial_rotary_factor", None) or stated
    dim = int(head_size * fraction)
    if dim % 2 or not 0 < dim <= head_size:
        raise ConfigError(f"partial_rotary_factor={fraction} of a head size of {head_size} leaves {dim} features to rotate")
    return RopeSpec(dim=dim, theta=theta, interleaved=interleaved, scaling=_scaling(config, rope, dim))


def _scaling(config: HfConfig, rope: Mapping[str, Any], dim: int) -> RopeScaling | None:
    max_len = config.get("max_position_embeddings", 2048)
    match rope.get("rope_type", "default"):
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=float(rope["factor"]))
        case "dynamic":
            original_len = int(rope.get("original_max_position_embeddings", max_len))
            factor = float(rope["factor"])
            return DynamicScaling(factor=factor, original_len=original_len, max_len=int(original_len * factor))
        case "llama3":
            return Llama3Scaling(
                factor=float(rope["factor"]), low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]), original_len=int(rope["original_max_position_embeddings"]),
            )  # fmt: skip
        case "yarn":
            return _yarn(rope, max_len)
        case "longrope" | "su":
            return _longrope(config, rope, dim, max_len)
        case "ntk":
            return NtkScaling(factor=float(rope["factor"]), exponent=float(rope.get("mixed_b", 1.0)))
        case kind:
            raise ConfigError(f"rope_type={kind!r} is not supported; there are default, linear, dynamic, llama3, yarn, longrope, ntk")


def _yarn(rope: Mapping[str, Any], max_len: int) -> YarnScaling:
    original_len = int(rope.get("original_max_position_embeddings", max_len))
    factor = float(rope.get("factor", None) or max_len / original_len)
    attention_factor = rope.get("attention_factor", None)
    mscale, mscale_all = rope.get("mscale", None), rope.get("mscale_all_dim", None)
    if attention_factor is None:
        over, under = (mscale, mscale_all) if mscale and mscale_all else (1.0, 0.0)
        attention_factor = (1 + 0.1 * over * math.log(max(factor, 1.0))) / (1 + 0.1 * under * math.log(max(factor, 1.0)))
    return YarnScaling(
        factor=factor, original_len=original_len, attention_factor=float(attention_factor), beta_fast=float(rope.get("beta_fast", 32.0)),
        beta_slow=float(rope.get("beta_slow", 1.0)), truncate=rope.get("truncate", True) is not False,
    )  # fmt: skip


def _longrope(config: HfConfig, rope: Mapping[str, Any], dim: int, max_len: int) -> LongRopeScaling:
    divisors: list[tuple[float, ...]] = []
    for key in ("short_factor", "long_factor"):
        values = rope[key]
        if not isinstance(values, list) or len(values) != dim // 2 or not all(isinstance(v, int | float) and v > 0 for v in values):
            raise ConfigError(f"{key}={values!r:.80} of the rotary positions is not a list of {dim // 2} positive numbers")
        divisors.append(tuple(float(value) for value in values))
    stated = config.get("original_max_position_embeddings", None)
    original_len = int(rope.get("original_max_position_embeddings", None) or stated or max_len)
    stretch = rope.get("factor", None) or max_len / original_len
    attention_factor, long_factor = rope.get("attention_factor", rope.get("short_mscale", None)), rope.get("long_mscale", None)
    if attention_factor is None:
        attention_factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original_len))
    return LongRopeScaling(
        short=divisors[0], long=divisors[1], attention_factor=float(attention_factor), original_len=original_len, max_len=max_len,
        long_attention_factor=None if long_factor is None else float(long_factor),
    )  # fmt: skip


def read_heads(config: HfConfig) -> tuple[int, int, int]:
    """The numbers of queries and of KV heads, and the head size.

    Raises: ConfigError if they do not fit.
    """
    num_heads = config.require("num_attention_heads", int)
    num_kv_heads = config.get("num_key_value_heads", None) or num_heads
    if not isinstance(num_kv_heads, int) or num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads={num_heads} cannot share num_key_value_heads={num_kv_heads!r}")
    return num_heads, num_kv_heads, config.get("head_dim", 0) or config.require("hidden_size", int) // num_heads


def read_attention(config: HfConfig, *, qkv_bias: bool | None = None, out_bias: bool | None = None) -> AttentionSpec:
    """Attention as Llama has it, without positions; a bias that is not given is attention_bias of the config."""
    num_heads, num_kv_heads, head_size = read_heads(config)
    bias = config.get("attention_bias", False)
    return AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, sm_scale=1 / math.sqrt(head_size), rope=None,
        qkv_bias=bias if qkv_bias is None else qkv_bias, out_bias=bias if out_bias is None else out_bias,
        causal=config.get("is_causal", True),
    )  # fmt: skip


def read_mlp(config: HfConfig, *, activation: str = "hidden_act", default: str = "silu", gated: bool = True) -> MlpSpec:
    """The MLP as Llama has it; `activation` is the key that names its function."""
    return MlpSpec(
        width=config.require("intermediate_size", int), activation=read_activation(config, activation, default),
        bias=config.get("mlp_bias", False), gated=gated,
    )  # fmt: skip


def rms_norm(config: HfConfig, default_eps: float = 1e-6) -> NormSpec:
    """Llama's norm."""
    return NormSpec(eps=config.get("rms_norm_eps", default_eps))


def read_model(
    config: HfConfig, layers: Sequence[LayerSpec] | LayerSpec, *, tied: bool = False, final_norm: NormSpec | None = None
) -> ModelSpec:
    """The model around its layers; one layer is all of them, and its norm is the last norm unless another is given.

    Args:
      tied: whether the head is the embedding when the config says nothing of it.
    """
    if isinstance(layers, LayerSpec):
        layers = (layers,) * num_layers(config)
    max_len = config.get("max_position_embeddings", 2048)
    return ModelSpec(
        width=config.require("hidden_size", int), vocab_size=config.require("vocab_size", int), layers=tuple(layers),
        max_len=max(_usable_len(layer.attention.rope, max_len) for layer in layers), final_norm=final_norm or layers[0].norm,
        tied=config.get("tie_word_embeddings", tied),
    )  # fmt: skip


def _usable_len(rope: RopeSpec | None, max_len: int) -> int:
    """Tokens that a model can take; configs give the length before such scalings as were added to a finished model."""
    match rope and rope.scaling:
        case LinearScaling(factor=factor):
            return int(max_len * factor)
        case DynamicScaling(max_len=stretched):
            return stretched
        case YarnScaling(factor=factor, original_len=original_len):
            return max(max_len, int(factor * original_len))
        case _:
            return max_len


def num_layers(config: HfConfig) -> int:
    """num_hidden_layers."""
    return config.require("num_hidden_layers", int)


def read_layer_types(config: HfConfig, default: Callable[[int], bool]) -> list[str]:
    """FULL or SLIDING for each layer; without layer_types, `default` says whether layer i is sliding.

    Raises: ConfigError on other kinds, and on a list of another length.
    """
    count = num_layers(config)
    kinds = config.get("layer_types")
    if kinds is None:
        return [SLIDING if default(i) else FULL for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise ConfigError(f"layer_types={kinds!r:.80} is not a list of {count} times {FULL} or {SLIDING}")
    return kinds


def read_window(config: HfConfig, default: int | None = None) -> int | None:
    """sliding_window, in tokens.

    Raises: ConfigError if it is not a positive number.
    """
    window = config.get("sliding_window", default or 0) or None
    if window is not None and window < 0:
        raise ConfigError(f"sliding_window={window} must be positive")
    return window


def with_attention(layer: LayerSpec, **fields: Any) -> LayerSpec:
    """The layer with other fields of its attention."""
    return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **fields))


def llama_layer_names(**other: str) -> Names:
    """Llama's names of a layer's parameters; other modules by their path, with __ for a dot, under model.layers.{i}."""
    modules = {
        "attention_norm": "input_layernorm",
        "attention.out": "self_attn.o_proj",
        "attention.q_norm.norm": "self_attn.q_norm",
        "attention.k_norm.norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    } | {path.replace("__", "."): name for path, name in other.items()}
    ways = {path: stored(f"model.layers.{{i}}.{name}") for path, name in modules.items()}
    ways["attention.qkv"] = stored(*(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv")) + stored(
        "model.layers.{i}.self_attn.qkv_proj"
    )
    ways["mlp.gate_up"] = stored("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj") + stored(
        "model.layers.{i}.mlp.gate_up_proj"
    )
    return with_leaves(ways)


def llama_model_names(final_norm: str = "model.norm") -> Names:
    """Llama's names of the parameters outside its layers."""
    return with_leaves({"embed": stored("model.embed_tokens"), "final_norm": stored(final_norm), "head": stored("lm_head")})


def llama_family(spec: Callable[[HfConfig], ModelSpec], *architectures: str) -> Family:
    """A family whose tensors have Llama's names."""
    return Family(architectures=architectures, spec=spec, layer_names=llama_layer_names(), model_names=llama_model_names())
