"""Mixtral, and the families that are Mixtrals but for a feature or two: OLMoE, Phi 3.5 MoE, Granite MoE."""

from __future__ import annotations

import dataclasses

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.families.experts import moe_names, read_moe
from jaxserve.models.families.relatives import granite_spec
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import RouterSpec
from jaxserve.models.names import Family, stored
from jaxserve.models.spec import LayerSpec, ModelSpec, NormSpec, QkNormSpec


def mixtral_spec(config: HfConfig) -> ModelSpec:
    """Llama whose MLP is eight experts, two for each token."""
    attention = parts.read_attention(config, qkv_bias=False, out_bias=False)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size, theta=1_000_000.0), window=parts.read_window(config)
    )
    mlp = read_moe(config, RouterSpec(renormalize=True))
    return parts.read_model(config, LayerSpec(attention=attention, mlp=mlp, norm=parts.rms_norm(config, 1e-5)))


def olmoe_spec(config: HfConfig) -> ModelSpec:
    """Norms of all queries and of all keys, clipping, and 64 small experts."""
    norm = parts.rms_norm(config, 1e-5)
    attention = parts.read_attention(config)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size), qk_norm=QkNormSpec(norm=norm, over="width"),
        clip=config.get("clip_qkv", 0.0) or None, clip_normed=True,
    )  # fmt: skip
    mlp = read_moe(config, RouterSpec(renormalize=config.get("norm_topk_prob", False)), count="num_experts")
    return parts.read_model(config, LayerSpec(attention=attention, mlp=mlp, norm=norm))


def phimoe_spec(config: HfConfig) -> ModelSpec:
    """Layer norms, biases, longrope, and a router of its own.

    Where texts may exceed the original length, the long divisors hold, as in Microsoft's code; transformers takes the short ones.
    """
    attention = parts.read_attention(config)
    config.get("original_max_position_embeddings")
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size, theta=1_000_000.0), window=parts.read_window(config)
    )
    mlp = read_moe(config, RouterSpec(scores="sparsemixer", jitter=config.get("router_jitter_noise", 0.01)))
    if mlp.top_k != 2:
        raise ConfigError(f"num_experts_per_tok={mlp.top_k}: the router of Phi-MoE chooses two")
    norm = NormSpec(eps=config.get("rms_norm_eps", 1e-5), kind="layer", bias=True)
    model = parts.read_model(config, LayerSpec(attention=attention, mlp=mlp, norm=norm))
    return dataclasses.replace(model, head_bias=config.get("lm_head_bias", False))


def granite_moe_spec(config: HfConfig) -> ModelSpec:
    """Granite with experts, and one more for all tokens in the shared variant."""
    model = granite_spec(config)
    mlp = read_moe(config, RouterSpec(renormalize=True), shared_width=config.get("shared_intermediate_size", 0))
    return dataclasses.replace(model, layers=tuple(dataclasses.replace(layer, mlp=mlp) for layer in model.layers))


_LLAMA = parts.llama_layer_names()
_W = ("w1", "w3", "w2")
MIXTRAL = Family(
    architectures=("MixtralForCausalLM",),
    spec=mixtral_spec,
    layer_names={**_LLAMA, **moe_names("block_sparse_moe", each=_W)},
    model_names=parts.llama_model_names(),
)
OLMOE = Family(
    architectures=("OlmoeForCausalLM",), spec=olmoe_spec, layer_names={**_LLAMA, **moe_names()}, model_names=parts.llama_model_names()
)
PHIMOE = Family(
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    spec=phimoe_spec,
    layer_names=MIXTRAL.layer_names,
    model_names=parts.llama_model_names(),
)
_GRANITE = "model.layers.{i}.block_sparse_moe"
_SHARED = "model.layers.{i}.shared_mlp"
GRANITE_MOE = Family(
    architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    spec=granite_moe_spec,
    layer_names={
        **_LLAMA,
        "mlp.router.weight": stored(f"{_GRANITE}.router.layer.weight"),
        "mlp.experts.gate_up": stored(f"{_GRANITE}.input_linear.weight", layout="expert"),
        "mlp.experts.down": stored(f"{_GRANITE}.output_linear.weight", layout="expert"),
        "mlp.shared.gate_up.weight": stored(f"{_SHARED}.input_linear.weight"),
        "mlp.shared.down.weight": stored(f"{_SHARED}.output_linear.weight"),
    },
    model_names=parts.llama_model_names(),
)
