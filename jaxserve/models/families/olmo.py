"""OLMo 1 (norms without weights), OLMo 2 (norms after), OLMo 3 (the same with windows), and Exaone 4, which is built like them."""

from __future__ import annotations

import dataclasses

from jaxserve.models.families import parts
from jaxserve.models.families.llama import llama_layer
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family
from jaxserve.models.spec import LayerSpec, ModelSpec, NormSpec, QkNormSpec, RopeSpec


def olmo_spec(config: HfConfig) -> ModelSpec:
    """Llama with layer norms that have nothing to learn."""
    layer = parts.with_attention(llama_layer(config), clip=config.get("clip_qkv", 0.0) or None)
    return parts.read_model(config, dataclasses.replace(layer, norm=NormSpec(eps=1e-5, kind="layer", weight=False)))


def olmo2_spec(config: HfConfig) -> ModelSpec:
    """Llama with its norms after attention and MLP, and norms of all queries and of all keys."""
    return parts.read_model(config, _post(llama_layer(config), config))


def olmo3_spec(config: HfConfig) -> ModelSpec:
    """OLMo 2 with a window on three layers of four, whose positions are not scaled."""
    attention = parts.read_attention(config)
    layer = _post(LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=parts.rms_norm(config, 1e-5)), config)
    window = parts.read_window(config, 4096)
    full = parts.read_rope(config, attention.head_size, theta=500_000.0, kind=parts.FULL)
    given = config.values.get("rope_parameters")
    by_kind = isinstance(given, dict) and parts.SLIDING in given
    local = parts.read_rope(config, attention.head_size, theta=500_000.0, kind=parts.SLIDING) if by_kind else _unscaled(full)
    kinds = parts.read_layer_types(config, lambda i: (i + 1) % 4 != 0)
    layers = [
        parts.with_attention(layer, window=window, rope=local) if kind == parts.SLIDING else parts.with_attention(layer, rope=full)
        for kind in kinds
    ]
    return parts.read_model(config, layers)


def exaone4_spec(config: HfConfig) -> ModelSpec:
    """Norms after, norms of queries and keys head by head; among layers with windows, those without have no positions."""
    layer = dataclasses.replace(llama_layer(config), placement="post", norm=parts.rms_norm(config, 1e-5))
    layer = parts.with_attention(layer, qk_norm=QkNormSpec(norm=layer.norm, over="head"), qkv_bias=False, out_bias=False)
    window = parts.read_window(config)
    pattern = config.get("sliding_window_pattern")
    kinds = parts.read_layer_types(config, lambda i: window is not None and bool(_is_sliding(pattern, i, parts.num_layers(config))))
    if window is None:
        return parts.read_model(config, layer)
    layers = [
        parts.with_attention(layer, window=window) if kind == parts.SLIDING else parts.with_attention(layer, rope=None) for kind in kinds
    ]
    return parts.read_model(config, layers)


def _is_sliding(pattern: object, index: int, count: int) -> bool:
    """Of a number, every so many layers sees everything; of letters, L is a window and G, like the last layer, is none."""
    if isinstance(pattern, str):
        return index != count - 1 and pattern[index % len(pattern)] == "L"
    return (index + 1) % (pattern if isinstance(pattern, int) and pattern > 0 else 4) != 0


def _post(layer: LayerSpec, config: HfConfig) -> LayerSpec:
    norm = parts.rms_norm(config, 1e-5)
    return parts.with_attention(dataclasses.replace(layer, norm=norm, placement="post"), qk_norm=QkNormSpec(norm=norm, over="width"))


def _unscaled(rope: RopeSpec) -> RopeSpec:
    return dataclasses.replace(rope, scaling=None)


_POST = parts.llama_layer_names(attention_norm="post_attention_layernorm", mlp_norm="post_feedforward_layernorm")
OLMO = parts.llama_family(olmo_spec, "OlmoForCausalLM")
OLMO2 = Family(architectures=("Olmo2ForCausalLM",), spec=olmo2_spec, layer_names=_POST, model_names=parts.llama_model_names())
OLMO3 = Family(architectures=("Olmo3ForCausalLM",), spec=olmo3_spec, layer_names=_POST, model_names=parts.llama_model_names())
EXAONE4 = Family(architectures=("Exaone4ForCausalLM",), spec=exaone4_spec, layer_names=_POST, model_names=parts.llama_model_names())
