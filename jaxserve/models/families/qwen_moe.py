"""Qwen 2 and 3 with experts."""

from __future__ import annotations

import dataclasses

from jaxserve.models.families import parts
from jaxserve.models.families.experts import moe_names, read_moe, read_sparse_layers
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import RouterSpec
from jaxserve.models.names import Family
from jaxserve.models.spec import LayerSpec, ModelSpec, QkNormSpec


def qwen2_moe_spec(config: HfConfig) -> ModelSpec:
    """Qwen 2 with many small experts and a gated one for all tokens; some layers may have an MLP instead."""
    attention = parts.read_attention(config, qkv_bias=config.get("qkv_bias", True), out_bias=False)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size))
    moe = read_moe(
        config, _router(config), count="num_experts", width="moe_intermediate_size",
        shared_width=config.get("shared_expert_intermediate_size", 5632), shared_gate=True,
    )  # fmt: skip
    layer = LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=parts.rms_norm(config))
    slides = config.get("use_sliding_window", False)
    window, first_full = parts.read_window(config, 4096), config.get("max_window_layers", 28)
    kinds = parts.read_layer_types(config, lambda i: slides and i % 2 == 0 and i < first_full)
    layers = [
        dataclasses.replace(
            parts.with_attention(layer, window=window if slides and kind == parts.SLIDING else None), mlp=moe if sparse else layer.mlp
        )
        for kind, sparse in zip(kinds, read_sparse_layers(config), strict=True)
    ]
    return parts.read_model(config, layers)


def qwen3_moe_spec(config: HfConfig) -> ModelSpec:
    """Qwen 3 with many small experts; some layers may have an MLP instead."""
    norm = parts.rms_norm(config)
    attention = parts.read_attention(config)
    window = parts.read_window(config, 4096)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size), qk_norm=QkNormSpec(norm=norm, over="head"),
        window=window if config.get("use_sliding_window", False) else None,
    )  # fmt: skip
    config.get("max_window_layers")  # nothing reads it: a window is on all layers or on none
    count = "num_local_experts" if config.get("num_local_experts") else "num_experts"  # transformers 5 writes the former
    moe = read_moe(config, _router(config), count=count, width="moe_intermediate_size")
    layer = LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=norm)
    return parts.read_model(config, [dataclasses.replace(layer, mlp=moe if sparse else layer.mlp) for sparse in read_sparse_layers(config)])


def _router(config: HfConfig) -> RouterSpec:
    return RouterSpec(renormalize=config.get("norm_topk_prob", False))


_NAMES = {**parts.llama_layer_names(), **moe_names()}
QWEN2_MOE = Family(architectures=("Qwen2MoeForCausalLM",), spec=qwen2_moe_spec, layer_names=_NAMES, model_names=parts.llama_model_names())
QWEN3_MOE = Family(architectures=("Qwen3MoeForCausalLM",), spec=qwen3_moe_spec, layer_names=_NAMES, model_names=parts.llama_model_names())
