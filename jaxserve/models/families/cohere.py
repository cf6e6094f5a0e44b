"""Cohere's Command R and R7B, StableLM and GLM 4: attention and MLP beside each other, or heads rotated in part or in pairs."""

from __future__ import annotations

import dataclasses

from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family, stored
from jaxserve.models.spec import LayerSpec, ModelSpec, NormSpec, QkNormSpec


def cohere_spec(config: HfConfig) -> ModelSpec:
    """One norm for attention and MLP; pairs of neighbours rotated; scaled logits."""
    return _cohere(config, [_cohere_layer(config)] * parts.num_layers(config))


def cohere2_spec(config: HfConfig) -> ModelSpec:
    """The same with windows on three layers of four, and no positions on the fourth."""
    layer, window = _cohere_layer(config), parts.read_window(config, 4096)
    pattern = config.get("sliding_window_pattern", 0) or config.get("_sliding_window_pattern", 4)
    kinds = parts.read_layer_types(config, lambda i: (i + 1) % pattern != 0)
    layers = [
        parts.with_attention(layer, window=window) if kind == parts.SLIDING else parts.with_attention(layer, rope=None) for kind in kinds
    ]
    return _cohere(config, layers)


def _cohere_layer(config: HfConfig) -> LayerSpec:
    norm = NormSpec(eps=config.get("layer_norm_eps", 1e-5), kind="layer")
    attention = parts.read_attention(config)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size, interleaved=True),
        qk_norm=QkNormSpec(norm=norm, over="heads") if config.get("use_qk_norm", False) else None,
    )  # fmt: skip
    return LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=norm, placement="parallel_shared")


def _cohere(config: HfConfig, layers: list[LayerSpec]) -> ModelSpec:
    return dataclasses.replace(parts.read_model(config, layers, tied=True), logit_scale=config.get("logit_scale", 0.0625))


def stablelm_spec(config: HfConfig) -> ModelSpec:
    """Layer norms with a bias, a quarter of each head rotated, a norm of its own for each head."""
    norm = NormSpec(eps=config.get("layer_norm_eps", 1e-5), kind="layer", bias=True)
    attention = parts.read_attention(config, qkv_bias=config.get("use_qkv_bias", False), out_bias=False)
    head_norm = dataclasses.replace(norm, bias=False)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size, partial=0.25),
        qk_norm=QkNormSpec(norm=head_norm, over="heads") if config.get("qk_layernorm", False) else None,
    )  # fmt: skip
    is_parallel = config.get("use_parallel_residual", False)
    layer = LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=norm, placement="parallel_shared" if is_parallel else "pre")
    return parts.read_model(config, layer)


def glm_spec(config: HfConfig) -> ModelSpec:
    """Half of each head rotated in pairs of neighbours, biases on queries, keys and values."""
    return parts.read_model(config, _glm_layer(config))


def glm4_spec(config: HfConfig) -> ModelSpec:
    """The same with norms after attention and MLP too."""
    return parts.read_model(config, dataclasses.replace(_glm_layer(config), placement="sandwich"))


def _glm_layer(config: HfConfig) -> LayerSpec:
    attention = parts.read_attention(config, qkv_bias=config.get("attention_bias", True), out_bias=False)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size, partial=0.5, interleaved=True))
    return LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=parts.rms_norm(config, 1.5625e-7))


_HEAD_NORMS = {
    f"attention.{part}_norm.norm.weight": stored(f"model.layers.{{i}}.self_attn.{part}_layernorm.norms.{{h}}.weight", layout="stacked")
    for part in "qk"
}
COHERE = parts.llama_family(cohere_spec, "CohereForCausalLM")
COHERE2 = parts.llama_family(cohere2_spec, "Cohere2ForCausalLM")
STABLELM = Family(
    architectures=("StableLmForCausalLM",), spec=stablelm_spec,
    layer_names={**parts.llama_layer_names(), **_HEAD_NORMS}, model_names=parts.llama_model_names(),
)  # fmt: skip
GLM = parts.llama_family(glm_spec, "GlmForCausalLM")
GLM4 = Family(
    architectures=("Glm4ForCausalLM",),
    spec=glm4_spec,
    layer_names=parts.llama_layer_names(
        attention_post_norm="post_self_attn_layernorm", mlp_norm="post_attention_layernorm", mlp_post_norm="post_mlp_layernorm"
    ),
    model_names=parts.llama_model_names(),
)
