"""GPT-2, GPT-BigCode, GPT-J, GPT-NeoX, StarCoder 2: layer norms with biases and plain MLPs."""

from __future__ import annotations

import dataclasses
import math

from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.spec import AttentionSpec, LayerSpec, LearnedPositions, ModelSpec, NormSpec, RopeSpec


def gpt2_spec(config: HfConfig) -> ModelSpec:
    """Learned positions; scores may be divided by the layer's number too."""
    layer = _gpt2_layer(config, num_kv_heads=config.require("n_head", int), activation="gelu_new")
    config.get("reorder_and_upcast_attn")  # the order of operations, which matters to half precision alone
    by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
    layers = [
        parts.with_attention(layer, sm_scale=layer.attention.sm_scale / (i + 1 if by_layer else 1))
        for i in range(config.require("n_layer", int))
    ]
    return _gpt2_model(config, layers)


def bigcode_spec(config: HfConfig) -> ModelSpec:
    """GPT-2 with one KV head."""
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "num_key_value_heads"):
        config.get(key)
    num_kv_heads = 1 if config.get("multi_query", True) else config.require("n_head", int)
    layer = _gpt2_layer(config, num_kv_heads=num_kv_heads, activation="gelu_pytorch_tanh")
    return _gpt2_model(config, [layer] * config.require("n_layer", int))


def _gpt2_layer(config: HfConfig, *, num_kv_heads: int, activation: str) -> LayerSpec:
    for key in ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "n_ctx"):
        config.get(key)
    width, num_heads = config.require("n_embd", int), config.require("n_head", int)
    head_size = width // num_heads
    attention = AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size,
        sm_scale=1 / math.sqrt(head_size) if config.get("scale_attn_weights", True) else 1.0, rope=None, qkv_bias=True, out_bias=True,
    )  # fmt: skip
    mlp = MlpSpec(
        width=config.get("n_inner", 0) or 4 * width, activation=parts.read_activation(config, "activation_function", activation), bias=True,
        gated=False,
    )  # fmt: skip
    return LayerSpec(attention=attention, mlp=mlp, norm=_norm(config, "layer_norm_epsilon"))


def _gpt2_model(config: HfConfig, layers: list[LayerSpec]) -> ModelSpec:
    max_len = config.get("n_positions", 1024)
    return ModelSpec(
        width=config.require("n_embd", int), vocab_size=config.require("vocab_size", int), max_len=max_len, layers=tuple(layers),
        final_norm=layers[0].norm, tied=config.get("tie_word_embeddings", True), positions=LearnedPositions(num_rows=max_len),
    )  # fmt: skip


def gptj_spec(config: HfConfig) -> ModelSpec:
    """One norm for attention and MLP, neighbours rotated, biases in the MLP and the head alone."""
    layer = _gpt2_layer(config, num_kv_heads=config.require("n_head", int), activation="gelu_new")
    head_size = config.require("n_embd", int) // config.require("n_head", int)
    rope = RopeSpec(dim=config.get("rotary_dim", 0) or head_size, theta=10_000.0, interleaved=True)
    layer = dataclasses.replace(parts.with_attention(layer, rope=rope, qkv_bias=False, out_bias=False), placement="parallel_shared")
    model = _gpt2_model(config, [layer] * config.require("n_layer", int))
    return dataclasses.replace(
        model, positions=None, max_len=config.get("n_positions", 2048), tied=config.get("tie_word_embeddings", False), head_bias=True
    )


def neox_spec(config: HfConfig) -> ModelSpec:
    """Attention and MLP beside each other, each behind its norm; a quarter of each head rotated."""
    bias = config.get("attention_bias", True)
    attention = parts.read_attention(config, qkv_bias=bias, out_bias=bias)
    partial, theta = config.get("rotary_pct", 0.25), config.get("rotary_emb_base", 10_000.0)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size, theta=theta, partial=partial))
    mlp = dataclasses.replace(parts.read_mlp(config, default="gelu", gated=False), bias=True)
    is_parallel = config.get("use_parallel_residual", True)
    layer = LayerSpec(attention=attention, mlp=mlp, norm=_norm(config, "layer_norm_eps"), placement="parallel" if is_parallel else "pre")
    return parts.read_model(config, layer)


def starcoder2_spec(config: HfConfig) -> ModelSpec:
    """Llama's attention between layer norms, with biases and a window."""
    bias = config.get("use_bias", True)
    attention = parts.read_attention(config, qkv_bias=bias, out_bias=bias)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size), window=parts.read_window(config))
    config.get("mlp_type")
    config.get("norm_type")
    mlp = dataclasses.replace(parts.read_mlp(config, default="gelu_pytorch_tanh", gated=False), bias=bias)
    return parts.read_model(config, LayerSpec(attention=attention, mlp=mlp, norm=_norm(config, "norm_epsilon")), tied=True)


def _norm(config: HfConfig, key: str) -> NormSpec:
    return NormSpec(eps=config.get(key, 1e-5), kind="layer", bias=True)


_H, _L = "transformer.h.{i}.", "gpt_neox.layers.{i}."
_EMBED = {"embed": stored("transformer.wte"), "final_norm": stored("transformer.ln_f"), "head": stored("lm_head")}
_GPT2_MODEL = with_leaves({**_EMBED, "positions": stored("transformer.wpe")})
_GPT2_NORMS = {"attention_norm": stored(f"{_H}ln_1"), "mlp_norm": stored(f"{_H}ln_2")}
_MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")

GPT2 = Family(
    architectures=("GPT2LMHeadModel",),
    spec=gpt2_spec,
    layer_names=with_leaves(
        {
            **_GPT2_NORMS,
            "attention.qkv": stored(f"{_H}attn.c_attn", layout="transposed"),
            "attention.out": stored(f"{_H}attn.c_proj", layout="transposed"),
            "mlp.up": stored(f"{_H}mlp.c_fc", layout="transposed"),
            "mlp.down": stored(f"{_H}mlp.c_proj", layout="transposed"),
        }
    ),
    model_names=_GPT2_MODEL,
    optional_prefix="transformer.",
    ignored=_MASKS,
)
GPT_BIGCODE = Family(
    architectures=("GPTBigCodeForCausalLM",),
    spec=bigcode_spec,
    layer_names=with_leaves(
        {
            **_GPT2_NORMS,
            "attention.qkv": stored(f"{_H}attn.c_attn", layout="by_kv_head"),
            "attention.out": stored(f"{_H}attn.c_proj"),
            "mlp.up": stored(f"{_H}mlp.c_fc"),
            "mlp.down": stored(f"{_H}mlp.c_proj"),
        }
    ),
    model_names=_GPT2_MODEL,
    optional_prefix="transformer.",
    ignored=_MASKS,
)
GPTJ = Family(
    architectures=("GPTJForCausalLM",),
    spec=gptj_spec,
    layer_names=with_leaves(
        {
            **_GPT2_NORMS,
            "attention.qkv": stored(*(f"{_H}attn.{part}_proj" for part in "qkv")),
            "attention.out": stored(f"{_H}attn.out_proj"),
            "mlp.up": stored(f"{_H}mlp.fc_in"),
            "mlp.down": stored(f"{_H}mlp.fc_out"),
        }
    ),
    model_names=with_leaves(_EMBED),
    optional_prefix="transformer.",
    ignored=_MASKS,
)
GPT_NEOX = Family(
    architectures=("GPTNeoXForCausalLM",),
    spec=neox_spec,
    layer_names=with_leaves(
        {
            "attention_norm": stored(f"{_L}input_layernorm"),
            "attention.qkv": stored(f"{_L}attention.query_key_value", layout="by_kv_head"),
            "attention.out": stored(f"{_L}attention.dense"),
            "mlp_norm": stored(f"{_L}post_attention_layernorm"),
            "mlp.up": stored(f"{_L}mlp.dense_h_to_4h"),
            "mlp.down": stored(f"{_L}mlp.dense_4h_to_h"),
        }
    ),
    model_names=with_leaves(
        {
            "embed": stored("gpt_neox.embed_in"),
            "final_norm": stored("gpt_neox.final_layer_norm"),
            "head": stored("embed_out") + stored("lm_head"),
        }
    ),
    ignored=_MASKS,
)
STARCODER2 = Family(
    architectures=("Starcoder2ForCausalLM",),
    spec=starcoder2_spec,
    layer_names=parts.llama_layer_names(mlp__up="mlp.c_fc", mlp__down="mlp.c_proj"),
    model_names=parts.llama_model_names(),
)
