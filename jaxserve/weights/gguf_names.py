"""Where each parameter is in a GGUF file: llama.cpp has one name for a tensor's part in a model, whatever the family."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

from jaxserve.models.names import Family, Layout, Names, Stored, stored, with_leaves

EMBEDDING, TOKEN_TYPES = "token_embd.weight", "token_types.weight"
# Rotary frequencies that are no powers of a base; they become part of the config.
ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"


def of_layer(*names: str, layout: Layout = "rows") -> tuple[Stored, ...]:
    """One way of storing a layer's parameter."""
    return stored(*(f"blk.{{i}}.{name}" for name in names), layout=layout)


_MODULES = {
    "attention_norm": of_layer("attn_norm"),
    "attention.qkv": of_layer("attn_q", "attn_k", "attn_v") + of_layer("attn_qkv"),
    "attention.q_norm.norm": of_layer("attn_q_norm"),
    "attention.k_norm.norm": of_layer("attn_k_norm"),
    "attention.out": of_layer("attn_output"),
    "attention_post_norm": of_layer("post_attention_norm"),
    "attention.q_down": of_layer("attn_q_a"),
    "attention.q_norm": of_layer("attn_q_a_norm"),
    "attention.q_up": of_layer("attn_q_b") + of_layer("attn_q"),
    "attention.kv_down": of_layer("attn_kv_a_mqa"),
    "attention.kv_norm": of_layer("attn_kv_a_norm"),
    "mlp_norm": of_layer("ffn_norm"),
    "mlp.gate_up": of_layer("ffn_gate", "ffn_up") + of_layer("ffn_up"),
    "mlp.up": of_layer("ffn_up"),
    "mlp.down": of_layer("ffn_down"),
    "mlp_post_norm": of_layer("post_ffw_norm"),
    "mlp.router": of_layer("ffn_gate_inp"),
    "mlp.shared.gate_up": of_layer("ffn_gate_shexp", "ffn_up_shexp"),
    "mlp.shared.down": of_layer("ffn_down_shexp"),
}
LAYER_NAMES: Names = types.MappingProxyType(
    {
        **with_leaves(_MODULES),
        "attention.sinks": of_layer("attn_sinks.weight"),
        "attention.key_up": of_layer("attn_k_b.weight", layout="transposed") + of_layer("attn_kv_b.weight", layout="head_starts"),
        "attention.value_up": of_layer("attn_v_b.weight") + of_layer("attn_kv_b.weight", layout="head_ends"),
        "mlp.router.correction": of_layer("exp_probs_b.bias"),
        "mlp.shared_gate.weight": of_layer("ffn_gate_inp_shexp.weight", layout="stacked"),
        "mlp.experts.gate_up": of_layer("ffn_gate_exps.weight", "ffn_up_exps.weight", layout="expert")
        + of_layer("ffn_gate_up_exps.weight", layout="expert"),
        "mlp.experts.down": of_layer("ffn_down_exps.weight", layout="expert"),
        "mlp.experts.gate_up_bias": of_layer("ffn_gate_exps.bias", "ffn_up_exps.bias", layout="expert"),
        "mlp.experts.down_bias": of_layer("ffn_down_exps.bias", layout="expert"),
    }
)
MODEL_NAMES: Names = types.MappingProxyType(
    with_leaves(
        {
            "embed": stored("token_embd"),
            "embed_norm": stored("token_embd_norm"),
            "positions": stored("position_embd"),
            "token_types": stored("token_types"),
            "final_norm": stored("output_norm"),
            "head": stored("output"),
        }
    )
)


def named_as_stored(family: Family, tensors: Mapping[str, object]) -> Family:
    """The family with the names under which a checkpoint of these tensors keeps its parameters: its own, or llama.cpp's."""
    if EMBEDDING not in tensors:
        return family
    ours = {path: ways for path, ways in family.model_names.items() if path.startswith("pool.")}  # llama.cpp has no names for those
    return dataclasses.replace(
        family, layer_names=LAYER_NAMES, model_names={**MODEL_NAMES, **ours}, optional_prefix="",
        ignored=(ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS),
    )  # fmt: skip
