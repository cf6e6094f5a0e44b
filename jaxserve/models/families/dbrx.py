"""DBRX: sixteen experts whose matrices lie one above the other in three tensors, fused queries, keys and values that are clipped."""

from __future__ import annotations

import math

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec, MoeSpec, RouterSpec
from jaxserve.models.names import Family, stored
from jaxserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec


def dbrx_spec(config: HfConfig) -> ModelSpec:
    """DBRX; its config is like MPT's.

    Raises: ConfigError naming the key and value that is not understood.
    """
    width, num_heads = config.require("d_model", int), config.require("n_heads", int)
    given = config.child("attn_config")
    num_kv_heads, head_size = given.get("kv_n_heads", 1), width // num_heads
    if width % num_heads or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ConfigError(f"n_heads={num_heads} and kv_n_heads={num_kv_heads} do not divide d_model={width} or each other")
    theta = given.get("rope_theta", 10_000.0)
    rope = config.rope_parameters()
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type={rope['rope_type']!r} is not supported; there is default")
    for key in ("resid_pdrop", "emb_pdrop", "num_key_value_heads"):
        config.get(key)
    attention = AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, sm_scale=1 / math.sqrt(head_size),
        rope=RopeSpec(dim=head_size, theta=float(rope.get("rope_theta", theta))), clip=given.get("clip_qkv", 0.0) or None,
    )  # fmt: skip
    norm = NormSpec(eps=1e-5, kind="layer")
    layer = LayerSpec(attention=attention, mlp=_read_experts(config.child("ffn_config"), width), norm=norm)
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=config.get("max_seq_len", 2048),
        layers=(layer,) * config.require("n_layers", int), final_norm=norm, tied=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def _read_experts(config: HfConfig, width: int) -> MoeSpec:
    activation = config.child("ffn_act_fn")
    if config.get("hidden_size", width) != width:
        raise ConfigError(f"ffn_config: hidden_size={config.get('hidden_size')} is not the model's {width}")
    for key in ("moe_jitter_eps", "moe_loss_weight"):  # of training
        config.get(key)
    power = config.get("moe_normalize_expert_weights", 1.0)
    if power != 1:
        raise ConfigError(f"ffn_config: moe_normalize_expert_weights={power!r} is not supported; there are null and 1")
    top_k, num_experts = config.get("moe_top_k", 1), config.get("moe_num_experts", 4)
    if not 0 < top_k <= num_experts:
        raise ConfigError(f"ffn_config: moe_top_k={top_k}: there are {num_experts} experts to choose from")
    is_normalized = config.values.get("moe_normalize_expert_weights", 1.0) is not None
    expert = MlpSpec(width=config.get("ffn_hidden_size", 3584), activation=parts.read_activation(activation, "name"))
    return MoeSpec(num_experts=num_experts, top_k=top_k, expert=expert, router=RouterSpec(renormalize=is_normalized))


_AT = "transformer.blocks.{i}"
DBRX = Family(
    architectures=("DbrxForCausalLM",),
    spec=dbrx_spec,
    layer_names={
        "attention_norm.weight": stored(f"{_AT}.norm_attn_norm.norm_1.weight"),
        "attention.qkv.weight": stored(f"{_AT}.norm_attn_norm.attn.Wqkv.weight"),
        "attention.out.weight": stored(f"{_AT}.norm_attn_norm.attn.out_proj.weight"),
        "mlp_norm.weight": stored(f"{_AT}.norm_attn_norm.norm_2.weight"),
        "mlp.router.weight": stored(f"{_AT}.ffn.router.layer.weight"),
        "mlp.experts.gate_up": stored(f"{_AT}.ffn.experts.mlp.w1", f"{_AT}.ffn.experts.mlp.v1", layout="expert"),
        "mlp.experts.down": stored(f"{_AT}.ffn.experts.mlp.w2", layout="expert_transposed"),
    },
    model_names={
        "embed.weight": stored("transformer.wte.weight"),
        "final_norm.weight": stored("transformer.norm_f.weight"),
        "head.weight": stored("lm_head.weight"),
    },
)
