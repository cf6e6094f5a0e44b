"""Llama and the checkpoints that are Llamas by another name (SmolLM2, Yi, TinyLlama)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family
from jaxserve.models.spec import Activation, AttentionSpec, LayerSpec, LinearScaling, Llama3Scaling, MlpSpec, ModelSpec, NormSpec, RopeSpec

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def llama_spec(config: HfConfig) -> ModelSpec:
    """The ModelSpec of a Llama config.

    Raises: ConfigError naming the key and value that is not understood.
    """
    width = config.require("hidden_size", int)
    num_heads = config.require("num_attention_heads", int)
    activation = config.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act={activation!r} is not supported; there are {', '.join(_ACTIVATIONS)}")
    config.get("pretraining_tp", 1)  # splits matrices during training, not their product
    head_size = config.get("head_dim", None) or width // num_heads
    bias = config.get("attention_bias", False)
    attention = AttentionSpec(
        num_heads=num_heads, num_kv_heads=config.get("num_key_value_heads", None) or num_heads, head_size=head_size,
        sm_scale=1 / math.sqrt(head_size), rope=_rope(config, head_size), qkv_bias=bias, out_bias=bias,
    )  # fmt: skip
    mlp = MlpSpec(width=config.require("intermediate_size", int), activation=_ACTIVATIONS[activation], bias=config.get("mlp_bias", False))
    norm = NormSpec(eps=config.get("rms_norm_eps", 1e-6))
    layer = LayerSpec(attention=attention, mlp=mlp, norm=norm)
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=config.get("max_position_embeddings", 2048),
        layers=(layer,) * config.require("num_hidden_layers", int), final_norm=norm, tied=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def _rope(config: HfConfig, head_size: int) -> RopeSpec:
    rope = config.rope_parameters()
    theta, kind = float(rope.get("rope_theta", 10_000.0)), rope.get("rope_type", "default")
    match kind:
        case "default":
            return RopeSpec(dim=head_size, theta=theta)
        case "linear":
            return RopeSpec(dim=head_size, theta=theta, scaling=LinearScaling(factor=float(rope["factor"])))
        case "llama3":
            scaling = Llama3Scaling(
                factor=float(rope["factor"]), low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]), original_len=int(rope["original_max_position_embeddings"]),
            )  # fmt: skip
            return RopeSpec(dim=head_size, theta=theta, scaling=scaling)
        case _:
            raise ConfigError(f"rope_type={kind!r} is not supported; there are default, linear, llama3")


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    spec=llama_spec,
    layer_names={
        "attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
        "attention.qkv.weight": tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
        "attention.qkv.bias": tuple(f"model.layers.{{i}}.self_attn.{part}_proj.bias" for part in "qkv"),
        "attention.out.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
        "attention.out.bias": ("model.layers.{i}.self_attn.o_proj.bias",),
        "mlp_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
        "mlp.gate_up.weight": ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        "mlp.gate_up.bias": ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
        "mlp.down.weight": ("model.layers.{i}.mlp.down_proj.weight",),
        "mlp.down.bias": ("model.layers.{i}.mlp.down_proj.bias",),
    },
    model_names={
        "embed.weight": ("model.embed_tokens.weight",),
        "final_norm.weight": ("model.norm.weight",),
        "head.weight": ("lm_head.weight",),
    },
)
