"""Phi 1, 1.5, 2 (parallel blocks), and Phi 3, 3.5, 4 (Llama with fused matrices and longrope)."""

from __future__ import annotations

import dataclasses

from jaxserve.models.families import parts
from jaxserve.models.families.llama import llama_layer
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family
from jaxserve.models.spec import LayerSpec, ModelSpec, NormSpec, QkNormSpec


def phi_spec(config: HfConfig) -> ModelSpec:
    """Attention and MLP beside each other behind one norm; half of each head rotated; biases everywhere, the head's too."""
    norm = NormSpec(eps=config.get("layer_norm_eps", 1e-5), kind="layer", bias=True)
    attention = parts.read_attention(config, qkv_bias=True, out_bias=True)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size, partial=0.5),
        qk_norm=QkNormSpec(norm=norm, over="head") if config.get("qk_layernorm", False) else None,
    )  # fmt: skip
    mlp = dataclasses.replace(parts.read_mlp(config, default="gelu_new", gated=False), bias=True)
    layer = LayerSpec(attention=attention, mlp=mlp, norm=norm, placement="parallel_shared")
    return dataclasses.replace(parts.read_model(config, layer), head_bias=True)


def phi3_spec(config: HfConfig) -> ModelSpec:
    """Llama with a window on all layers, if there is one."""
    config.get("original_max_position_embeddings")
    layer = dataclasses.replace(llama_layer(config), norm=parts.rms_norm(config, 1e-5))
    return parts.read_model(config, parts.with_attention(layer, window=parts.read_window(config)))


PHI = Family(
    architectures=("PhiForCausalLM",),
    spec=phi_spec,
    layer_names=parts.llama_layer_names(
        attention__out="self_attn.dense", attention__q_norm__norm="self_attn.q_layernorm", attention__k_norm__norm="self_attn.k_layernorm",
        mlp__up="mlp.fc1", mlp__down="mlp.fc2",
    ),
    model_names=parts.llama_model_names("model.final_layernorm"),
)  # fmt: skip
PHI3 = parts.llama_family(phi3_spec, "Phi3ForCausalLM")
