"""Families that are Llama but for a feature or two: Mistral, Arcee, Seed-OSS, InternLM, SmolLM3, Granite, MiniCPM, Nemotron, Exaone 3."""

from __future__ import annotations

import dataclasses
import math

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.families.llama import llama_layer
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.spec import LayerSpec, ModelSpec, NormSpec


def mistral_spec(config: HfConfig) -> ModelSpec:
    """Llama with a sliding window on all layers, or on those that layer_types names."""
    window = parts.read_window(config)
    layer = llama_layer(config)
    kinds = parts.read_layer_types(config, lambda i: window is not None)
    return parts.read_model(config, [parts.with_attention(layer, window=window if kind == parts.SLIDING else None) for kind in kinds])


def arcee_spec(config: HfConfig) -> ModelSpec:
    """Llama with a plain MLP of squared ReLU."""
    return parts.read_model(config, dataclasses.replace(llama_layer(config), mlp=parts.read_mlp(config, default="relu2", gated=False)))


def seed_oss_spec(config: HfConfig) -> ModelSpec:
    """Llama with biases on queries, keys and values."""
    biases = {"qkv_bias": config.get("attention_bias", True), "out_bias": config.get("attention_out_bias", False)}
    config.get("pretraining_tp")
    return parts.read_model(config, parts.with_attention(llama_layer(config), **biases))


def internlm_spec(config: HfConfig) -> ModelSpec:
    """Llama whose biases have other names: InternLM 2's are all `bias`, InternLM 3 has qkv_bias beside it."""
    bias, attention_bias = config.get("bias", False), config.get("attention_bias", False)
    layer, mlp = llama_layer(config), parts.read_mlp(config)
    biases = {"qkv_bias": config.get("qkv_bias", bias) or attention_bias, "out_bias": bias or attention_bias}
    mlp = dataclasses.replace(mlp, bias=mlp.bias or (bias and config.architecture.startswith("InternLM3")))
    return parts.read_model(config, dataclasses.replace(parts.with_attention(layer, **biases), mlp=mlp))


def smollm3_spec(config: HfConfig) -> ModelSpec:
    """Llama with layers that have no positions; no_rope_layers is 1 where there are some."""
    layer, count = llama_layer(config), parts.num_layers(config)
    interval = config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    if not isinstance(rotated, list) or len(rotated) != count:
        raise ConfigError(f"no_rope_layers={rotated!r:.80} is not a list of {count} numbers")
    window = parts.read_window(config) if config.get("use_sliding_window", False) else None
    for key in ("sliding_window", "max_window_layers", "pretraining_tp"):
        config.get(key)
    kinds = parts.read_layer_types(config, lambda i: window is not None and not rotated[i])
    layers = [
        parts.with_attention(layer, rope=layer.attention.rope if has_rope else None, window=window if kind == parts.SLIDING else None)
        for has_rope, kind in zip(rotated, kinds, strict=True)
    ]
    return parts.read_model(config, layers, tied=True)


def granite_spec(config: HfConfig) -> ModelSpec:
    """Llama with multipliers of embeddings, scores, residuals and logits."""
    layer = parts.with_attention(llama_layer(config), sm_scale=config.get("attention_multiplier", 1.0))
    layer = dataclasses.replace(layer, residual_scale=config.get("residual_multiplier", 1.0))
    return dataclasses.replace(
        parts.read_model(config, layer), embed_scale=config.get("embedding_multiplier", 1.0),
        logit_scale=1 / config.get("logits_scaling", 1.0),
    )  # fmt: skip


def minicpm_spec(config: HfConfig) -> ModelSpec:
    """Llama with multipliers that follow from the depth and from the width of a smaller model."""
    scale_depth = config.get("scale_depth", 1.4)
    layer = dataclasses.replace(llama_layer(config), residual_scale=scale_depth / math.sqrt(parts.num_layers(config)))
    model = parts.read_model(config, layer, tied=True)
    return dataclasses.replace(
        model, embed_scale=config.get("scale_emb", 1.0), logit_scale=config.get("dim_model_base", float(model.width)) / model.width
    )


def nemotron_spec(config: HfConfig) -> ModelSpec:
    """Layer norms whose weight is kept less one, half of each head rotated, a plain MLP of squared ReLU."""
    attention = parts.read_attention(config)
    partial = config.get("rope_percent", 0.5)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size, partial=partial))
    norm = NormSpec(eps=config.get("norm_eps", 1e-5), kind="layer", plus_one=True, bias=True)
    mlp = parts.read_mlp(config, default="relu2", gated=False)
    return parts.read_model(config, LayerSpec(attention=attention, mlp=mlp, norm=norm))


def exaone_spec(config: HfConfig) -> ModelSpec:
    """Llama under other keys."""
    attention = parts.read_attention(config)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size))
    mlp = MlpSpec(width=config.require("intermediate_size", int), activation=parts.read_activation(config, "activation_function"))
    layer = LayerSpec(attention=attention, mlp=mlp, norm=NormSpec(eps=config.get("layer_norm_epsilon", 1e-5)))
    return parts.read_model(config, (layer,) * config.require("num_layers", int))


_H, _I = "transformer.h.{i}.", "model.layers.{i}."
MISTRAL = parts.llama_family(mistral_spec, "MistralForCausalLM", "MinistralForCausalLM")
ARCEE = parts.llama_family(arcee_spec, "ArceeForCausalLM")
SEED_OSS = parts.llama_family(seed_oss_spec, "SeedOssForCausalLM")
SMOLLM3 = parts.llama_family(smollm3_spec, "SmolLM3ForCausalLM")
GRANITE = parts.llama_family(granite_spec, "GraniteForCausalLM")
MINICPM = parts.llama_family(minicpm_spec, "MiniCPMForCausalLM")
NEMOTRON = parts.llama_family(nemotron_spec, "NemotronForCausalLM")
INTERNLM3 = parts.llama_family(internlm_spec, "InternLM3ForCausalLM")
INTERNLM2 = Family(
    architectures=("InternLM2ForCausalLM",),
    spec=internlm_spec,
    layer_names=with_leaves(
        {
            "attention_norm": stored(f"{_I}attention_norm"),
            "attention.qkv": stored(f"{_I}attention.wqkv", layout="by_kv_head"),
            "attention.out": stored(f"{_I}attention.wo"),
            "mlp_norm": stored(f"{_I}ffn_norm"),
            "mlp.gate_up": stored(f"{_I}feed_forward.w1", f"{_I}feed_forward.w3"),
            "mlp.down": stored(f"{_I}feed_forward.w2"),
        }
    ),
    model_names=with_leaves(
        {"embed": stored("model.tok_embeddings"), "final_norm": stored("model.norm"), "head": stored("output")},
    ),
)
EXAONE = Family(
    architectures=("ExaoneForCausalLM",),
    spec=exaone_spec,
    layer_names=with_leaves(
        {
            "attention_norm": stored(f"{_H}ln_1"),
            "attention.qkv": stored(*(f"{_H}attn.attention.{part}_proj" for part in "qkv")),
            "attention.out": stored(f"{_H}attn.attention.out_proj"),
            "mlp_norm": stored(f"{_H}ln_2"),
            "mlp.gate_up": stored(f"{_H}mlp.c_fc_0", f"{_H}mlp.c_fc_1"),
            "mlp.down": stored(f"{_H}mlp.c_proj"),
        }
    ),
    model_names=with_leaves({"embed": stored("transformer.wte"), "final_norm": stored("transformer.ln_f"), "head": stored("lm_head")}),
)
RELATIVES = (MISTRAL, ARCEE, SEED_OSS, INTERNLM2, INTERNLM3, SMOLLM3, GRANITE, MINICPM, NEMOTRON, EXAONE)
