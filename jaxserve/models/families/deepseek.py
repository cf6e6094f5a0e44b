"""DeepSeek V2 and V3 (latent attention, groups of small experts, shared experts), and GLM 4.5, whose experts are V3's."""

from __future__ import annotations

import dataclasses
import math

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.families.experts import moe_names, read_moe
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MoeSpec, RouterSpec
from jaxserve.models.names import Family, Names, stored, with_leaves
from jaxserve.models.spec import LayerSpec, MlaSpec, ModelSpec, NormSpec, QkNormSpec


def deepseek_v2_spec(config: HfConfig) -> ModelSpec:
    """Softmax router, whose groups are ranked by their best expert."""
    if config.get("norm_topk_prob", False):
        raise ConfigError("norm_topk_prob=True: DeepSeek's code and transformers disagree on what it does in DeepSeek V2")
    _expect(config, scoring_func="softmax", moe_layer_freq=1, ep_size=1)
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"topk_method={method!r} is not supported; there are greedy and group_limited_greedy")
    groups, top_groups = config.get("n_group", 1), config.get("topk_group", 1)
    router = RouterSpec(scale=config.get("routed_scaling_factor", 1.0))
    if method != "greedy":
        router = dataclasses.replace(router, num_groups=groups, top_groups=top_groups)
    moe = _read_moe(config, router)
    layer = LayerSpec(attention=read_mla(config, interleaved=True), mlp=parts.read_mlp(config), norm=parts.rms_norm(config))
    return parts.read_model(config, _after_dense(config, layer, moe, 0))


def deepseek_v3_spec(config: HfConfig) -> ModelSpec:
    """Sigmoid router with a correction, whose groups are ranked by their best two."""
    _expect(config, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1)
    attention = read_mla(config, interleaved=config.get("rope_interleave", True))
    layer = LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=parts.rms_norm(config))
    return parts.read_model(config, _after_dense(config, layer, _read_moe(config, _v3_router(config, 2.5, 8, 4)), 3))


def glm4_moe_spec(config: HfConfig) -> ModelSpec:
    """Attention as in Qwen 3, half of each head rotated, with DeepSeek V3's experts."""
    norm = parts.rms_norm(config, 1e-5)
    attention = parts.read_attention(config, out_bias=False)
    attention = dataclasses.replace(
        attention, rope=parts.read_rope(config, attention.head_size, partial=0.5),
        qk_norm=QkNormSpec(norm=norm, over="head") if config.get("use_qk_norm", False) else None,
    )  # fmt: skip
    layer = LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=norm)
    return parts.read_model(config, _after_dense(config, layer, _read_moe(config, _v3_router(config, 1.0, 1, 1)), 1))


def read_mla(config: HfConfig, *, interleaved: bool) -> MlaSpec:
    """Latent attention as DeepSeek's configs describe it."""
    rope_size, nope_size = config.require("qk_rope_head_dim", int), config.require("qk_nope_head_dim", int)
    for key in ("head_dim", "qk_head_dim", "num_key_value_heads"):  # said again by the sizes of the parts; all heads share one latent
        config.get(key)
    bias = config.get("attention_bias", False)
    return MlaSpec(
        num_heads=config.require("num_attention_heads", int), latent_size=config.require("kv_lora_rank", int), nope_size=nope_size,
        value_size=config.require("v_head_dim", int), q_rank=config.get("q_lora_rank"),
        rope=parts.read_rope(config, rope_size, interleaved=interleaved),
        sm_scale=_scale_factor(config) / math.sqrt(nope_size + rope_size), norm=NormSpec(eps=1e-6), down_bias=bias, out_bias=bias,
    )  # fmt: skip


def _scale_factor(config: HfConfig) -> float:
    """By which scores are multiplied where positions are scaled; see YarnScaling.attention_factor for the part of cosine and sine."""
    rope = config.rope_parameters()
    over_all = rope.get("mscale_all_dim", None)
    if rope.get("rope_type", "default") == "default" or not over_all:
        return 1.0
    factor = float(rope.get("factor", 1.0))
    return (0.1 * float(over_all) * math.log(factor) + 1.0) ** 2 if factor > 1 else 1.0


def _v3_router(config: HfConfig, scale: float, num_groups: int, top_groups: int) -> RouterSpec:
    """DeepSeek V3's; the arguments are defaults."""
    return RouterSpec(
        scores="sigmoid", renormalize=config.get("norm_topk_prob", True), scale=config.get("routed_scaling_factor", scale),
        correction=True, num_groups=config.get("n_group", num_groups), top_groups=config.get("topk_group", top_groups),
        group_score="two_highest",
    )  # fmt: skip


def _read_moe(config: HfConfig, router: RouterSpec) -> MoeSpec:
    width = config.require("moe_intermediate_size", int)
    shared = config.get("n_shared_experts", 0) * width
    return read_moe(config, router, count="n_routed_experts", width="moe_intermediate_size", shared_width=shared)


def _after_dense(config: HfConfig, layer: LayerSpec, moe: MoeSpec, default: int) -> list[LayerSpec]:
    """All layers, the first few of which have no experts."""
    dense = config.get("first_k_dense_replace", default)
    config.get("num_nextn_predict_layers")  # layers that predict further tokens; their tensors are left out
    config.get("num_mtp_layers")
    return [layer if i < dense else dataclasses.replace(layer, mlp=moe) for i in range(parts.num_layers(config))]


def _expect(config: HfConfig, **values: str | int) -> None:
    """Raise ConfigError if a key is there and not the one value that is understood."""
    for key, value in values.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{key}={config.get(key)!r} is not supported; there is {value!r}")


def _deepseek_names() -> Names:
    at = "model.layers.{i}.self_attn"
    mla = with_leaves(
        {
            "attention.q_down": stored(f"{at}.q_a_proj"),
            "attention.q_norm": stored(f"{at}.q_a_layernorm"),
            "attention.q_up": stored(f"{at}.q_b_proj") + stored(f"{at}.q_proj"),
            "attention.kv_down": stored(f"{at}.kv_a_proj_with_mqa"),
            "attention.kv_norm": stored(f"{at}.kv_a_layernorm"),
        }
    )
    up = f"{at}.kv_b_proj.weight"
    return {
        **parts.llama_layer_names(),
        **mla,
        "attention.key_up": stored(up, layout="head_starts"),
        "attention.value_up": stored(up, layout="head_ends"),
        **moe_names(shared="shared_experts"),
    }


DEEPSEEK_V2 = Family(
    architectures=("DeepseekV2ForCausalLM",),
    spec=deepseek_v2_spec,
    layer_names=_deepseek_names(),
    model_names=parts.llama_model_names(),
)
DEEPSEEK_V3 = Family(
    architectures=("DeepseekV3ForCausalLM",),
    spec=deepseek_v3_spec,
    layer_names=_deepseek_names(),
    model_names=parts.llama_model_names(),
    predicts_ahead=True,
)
GLM4_MOE = Family(
    architectures=("Glm4MoeForCausalLM",),
    spec=glm4_moe_spec,
    layer_names={**parts.llama_layer_names(), **moe_names(shared="shared_experts")},
    model_names=parts.llama_model_names(),
    predicts_ahead=True,
)
