"""BLOOM and Falcon: queries, keys and values fused head by head, ALiBi or rotary positions."""

from __future__ import annotations

import math

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.families.alibi import alibi_slopes
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.names import Family, stored, with_leaves
from jaxserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec, Placement


def bloom_spec(config: HfConfig) -> ModelSpec:
    """ALiBi, a norm of the embeddings; the residual may be what the norm gives."""
    for key in ("slow_but_exact", "pretraining_tp", "masked_softmax_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv"):
        config.get(key)
    width = _either(config, "hidden_size", "n_embed")
    num_heads = _either(config, "n_head", "num_attention_heads")
    norm = NormSpec(eps=config.get("layer_norm_epsilon", 1e-5), kind="layer", bias=True)
    head_size = width // num_heads
    attention = AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_heads, head_size=head_size, sm_scale=1 / math.sqrt(head_size), rope=None, qkv_bias=True,
        out_bias=True, alibi_slopes=alibi_slopes(num_heads),
    )  # fmt: skip
    mlp = MlpSpec(width=4 * width, activation="gelu_tanh", bias=True, gated=False)
    carried = config.get("apply_residual_connection_post_layernorm", False)
    layer = LayerSpec(attention=attention, mlp=mlp, norm=norm, placement="pre_carried" if carried else "pre")
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=config.get("seq_length", 2048),
        layers=(layer,) * _either(config, "n_layer", "num_hidden_layers"), final_norm=norm, tied=config.get("tie_word_embeddings", True),
        embed_norm=norm,
    )  # fmt: skip


def falcon_spec(config: HfConfig) -> ModelSpec:
    """Three architectures: RW (one after the other, ALiBi), 7B (side by side, one KV head), and the one of 40B, 180B and 11B."""
    bias, is_new = config.get("bias", False), config.get("new_decoder_architecture", False)
    width = config.require("hidden_size", int)
    num_heads = _either(config, "num_attention_heads", "n_head")
    num_layers = _either(config, "num_hidden_layers", "n_layer")
    head_size = width // num_heads
    multi_query = config.get("multi_query", True)
    num_kv_heads = _either(config, "num_kv_heads", "n_head_kv", default=num_heads)
    if not is_new:
        num_kv_heads = 1 if multi_query else num_heads
    sm_scale = 1 / math.sqrt(head_size)
    uses_alibi, rope = config.get("alibi", False), parts.read_rope(config, head_size)
    attention = AttentionSpec(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, sm_scale=sm_scale, qkv_bias=bias, out_bias=bias,
        rope=None if uses_alibi else rope,
        alibi_slopes=tuple(slope * sm_scale for slope in alibi_slopes(num_heads)) if uses_alibi else None,  # it scales the sum
    )  # fmt: skip
    mlp = MlpSpec(
        width=config.get("ffn_hidden_size", 0) or 4 * width, activation=parts.read_activation(config, "activation", "gelu"), bias=bias,
        gated=False,
    )  # fmt: skip
    norm = NormSpec(eps=config.get("layer_norm_epsilon", 1e-5), kind="layer", bias=True)
    layer = LayerSpec(attention=attention, mlp=mlp, norm=norm, placement=_falcon_placement(config, is_new))
    return parts.read_model(config, [layer] * num_layers, tied=True)


def _falcon_placement(config: HfConfig, is_new: bool) -> Placement:
    is_parallel, num_norms = config.get("parallel_attn", True), config.get("num_ln_in_parallel_attn", 2 if is_new else 1)
    if is_new:
        return "parallel" if num_norms == 2 else "parallel_shared"
    return "parallel_shared" if is_parallel else "pre"


def _either(config: HfConfig, key: str, old_key: str, default: int | None = None) -> int:
    """A positive count under its name or under an older one."""
    old = config.get(old_key, 0)
    value = config.get(key, 0) or old or default
    if not value or value < 0:
        raise ConfigError(f"{key}={value} must be a positive number")
    return value


_H = "transformer.h.{i}."
_BLOCK = {
    "attention.qkv": stored(f"{_H}self_attention.query_key_value", layout="by_kv_head"),
    "attention.out": stored(f"{_H}self_attention.dense"),
    "mlp.up": stored(f"{_H}mlp.dense_h_to_4h"),
    "mlp.down": stored(f"{_H}mlp.dense_4h_to_h"),
}
_MODEL = {"embed": stored("transformer.word_embeddings"), "final_norm": stored("transformer.ln_f"), "head": stored("lm_head")}
BLOOM = Family(
    architectures=("BloomForCausalLM",),
    spec=bloom_spec,
    layer_names=with_leaves(
        {**_BLOCK, "attention_norm": stored(f"{_H}input_layernorm"), "mlp_norm": stored(f"{_H}post_attention_layernorm")}
    ),
    model_names=with_leaves({**_MODEL, "embed_norm": stored("transformer.word_embeddings_layernorm")}),
    optional_prefix="transformer.",
)
FALCON = Family(
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    spec=falcon_spec,
    layer_names=with_leaves(
        {
            **_BLOCK,
            "attention_norm": stored(f"{_H}input_layernorm") + stored(f"{_H}ln_attn"),
            "mlp_norm": stored(f"{_H}post_attention_layernorm") + stored(f"{_H}ln_mlp"),
        }
    ),
    model_names=with_leaves(_MODEL),
    optional_prefix="transformer.",
)
