"""Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

import dataclasses
import math

from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import Activation, MlpSpec
from jaxserve.models.names import Family
from jaxserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec, QkNormSpec, RopeSpec


def gemma_spec(config: HfConfig) -> ModelSpec:
    """Pre-norm with norms kept less one, embeddings scaled by the root of the width."""
    attention = parts.read_attention(config)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size))
    return _model(config, [LayerSpec(attention=attention, mlp=_mlp(config), norm=_norm(config))] * parts.num_layers(config))


def gemma2_spec(config: HfConfig) -> ModelSpec:
    """Norms before and after, every other layer with a window, softcaps."""
    attention = _scaled(config)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size), softcap=config.get("attn_logit_softcapping", 50.0)
    )
    layer = LayerSpec(attention=attention, mlp=_mlp(config), norm=_norm(config), placement="sandwich")
    window = parts.read_window(config, 4096)
    kinds = parts.read_layer_types(config, lambda i: i % 2 == 0)
    layers = [parts.with_attention(layer, window=window if kind == parts.SLIDING else None) for kind in kinds]
    return dataclasses.replace(_model(config, layers), logit_softcap=config.get("final_logit_softcapping", 30.0))


def gemma3_spec(config: HfConfig) -> ModelSpec:
    """Gemma 2 with norms of queries and keys instead of softcaps, and positions of their own for layers with a window."""
    attention, norm = _scaled(config), _norm(config)
    attention = dataclasses.replace(
        attention, qk_norm=QkNormSpec(norm=norm, over="head"), softcap=config.get("attn_logit_softcapping", 0.0) or None
    )
    layer = LayerSpec(attention=attention, mlp=_mlp(config), norm=norm, placement="sandwich")
    pattern = config.get("sliding_window_pattern", 0) or config.get("_sliding_window_pattern", 6)
    kinds = parts.read_layer_types(config, lambda i: (i + 1) % pattern != 0)
    window, full_rope, local_rope = parts.read_window(config, 4096), *_ropes(config, attention.head_size)
    if config.get("use_bidirectional_attention", False):  # EmbeddingGemma, half of whose window is before a token and half after it
        layer, window = parts.with_attention(layer, causal=False), window and window // 2 + 1
    layers = [
        parts.with_attention(layer, window=window, rope=local_rope)
        if kind == parts.SLIDING
        else parts.with_attention(layer, rope=full_rope)
        for kind in kinds
    ]
    return dataclasses.replace(_model(config, layers), logit_softcap=config.get("final_logit_softcapping", 0.0) or None)


def _ropes(config: HfConfig, head_size: int) -> tuple[RopeSpec, RopeSpec]:
    """Of layers that see everything and of those with a window; older configs have the second's base under a key of its own."""
    full = parts.read_rope(config, head_size, theta=1_000_000.0, kind=parts.FULL)
    given = config.values.get("rope_parameters")
    if isinstance(given, dict) and parts.SLIDING in given:
        return full, parts.read_rope(config, head_size, kind=parts.SLIDING)
    return full, RopeSpec(dim=head_size, theta=config.get("rope_local_base_freq", 10_000.0))


def _scaled(config: HfConfig) -> AttentionSpec:
    return dataclasses.replace(parts.read_attention(config), sm_scale=1 / math.sqrt(config.get("query_pre_attn_scalar", 256.0)))


def _norm(config: HfConfig) -> NormSpec:
    return dataclasses.replace(parts.rms_norm(config), plus_one=True)


def _mlp(config: HfConfig) -> MlpSpec:
    """hidden_activation is what counts; hidden_act of Gemma 1 said gelu and meant its approximation by tanh."""
    activation: Activation = parts.read_activation(config, "hidden_activation", config.get("hidden_act", "gelu_pytorch_tanh"))
    config.get("hidden_act")
    return MlpSpec(width=config.require("intermediate_size", int), activation="gelu_tanh" if activation == "gelu" else activation)


def _model(config: HfConfig, layers: list[LayerSpec]) -> ModelSpec:
    model = parts.read_model(config, layers, tied=True)
    return dataclasses.replace(model, embed_scale=math.sqrt(model.width))


_SANDWICH = parts.llama_layer_names(
    attention_post_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm", mlp_post_norm="post_feedforward_layernorm"
)
GEMMA = parts.llama_family(gemma_spec, "GemmaForCausalLM")
GEMMA2 = Family(architectures=("Gemma2ForCausalLM",), spec=gemma2_spec, layer_names=_SANDWICH, model_names=parts.llama_model_names())
GEMMA3 = Family(
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"), spec=gemma3_spec, layer_names=_SANDWICH,
    model_names=parts.llama_model_names(),
)  # fmt: skip
