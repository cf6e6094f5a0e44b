"""How GGUF files of other architectures differ from Llama's."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.weights.gguf_reader import GgufReader

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """One general.architecture.

    Args:
      architecture: Hugging Face's name for it.
      layer_names: tensor in a layer -> Hugging Face's name, where it is not Llama's.
      has_interleaved_heads: the rows of queries and keys are reordered so that neighbours rotate together.
      has_norms_plus_one: norms are stored with the 1 that Hugging Face's model adds itself.
      config: makes config.json of the values that a Llama would have.
      experts: does so instead if the file has experts; without it such files are refused.
    """

    architecture: str
    layer_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_interleaved_heads: bool = False
    has_norms_plus_one: bool = False
    config: Callable[[GgufReader, Values], Values] | None = None
    experts: Callable[[GgufReader, Values], Values] | None = None


def _qwen2(reader: GgufReader, values: Values) -> Values:
    return values | {"attention_bias": False}  # the family has biases on queries, keys and values without being told


def _mixtral(reader: GgufReader, values: Values) -> Values:
    kept = {key: value for key, value in values.items() if key != "mlp_bias"}
    return kept | {"architectures": ["MixtralForCausalLM"], "num_local_experts": reader.count("expert_count"), **_top_k(reader)}


def _qwen2_moe(reader: GgufReader, values: Values) -> Values:
    shared = {"shared_expert_intermediate_size": reader.count("expert_shared_feed_forward_length")}
    return _small_experts(reader, values) | shared | {"qkv_bias": values["attention_bias"], "attention_bias": False}


def _qwen3_moe(reader: GgufReader, values: Values) -> Values:
    return _small_experts(reader, values) | {"norm_topk_prob": True}  # the file does not say, but all published ones are


def _small_experts(reader: GgufReader, values: Values) -> Values:
    width = reader.count("expert_feed_forward_length")
    return values | {"num_experts": reader.count("expert_count"), "moe_intermediate_size": width, **_top_k(reader)}


def _top_k(reader: GgufReader) -> Values:
    return {"num_experts_per_tok": reader.count("expert_used_count")}


def _gemma(reader: GgufReader, values: Values) -> Values:
    dropped = ("hidden_act", "mlp_bias", "sliding_window")
    return {key: value for key, value in values.items() if key not in dropped} | {"hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(reader: GgufReader, values: Values) -> Values:
    capped = {
        "attn_logit_softcapping": reader.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reader.number("final_logit_softcapping", 30.0),
    }
    window = {"sliding_window": reader.count("attention.sliding_window", 4096)}
    return _gemma(reader, values) | capped | window | _query_scalar(values, num_layers_of_27b=46)


def _gemma3(reader: GgufReader, values: Values) -> Values:
    window = {
        "sliding_window": reader.count("attention.sliding_window"),
        "sliding_window_pattern": reader.count("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": reader.number("rope.freq_base_swa", 10_000.0),
    }
    return _gemma(reader, values) | window | _query_scalar(values, num_layers_of_27b=62)


def _query_scalar(values: Values, num_layers_of_27b: int) -> Values:
    """The file does not say by what scores are divided; llama.cpp knows the 27B models, by their depth, as an exception."""
    if values["num_hidden_layers"] == num_layers_of_27b:
        return {"query_pre_attn_scalar": float(values["hidden_size"] // values["num_attention_heads"])}
    return {"query_pre_attn_scalar": float(values["head_dim"])}


_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.w1", "ffn_up_exps": "block_sparse_moe.experts.w3",
    "ffn_down_exps": "block_sparse_moe.experts.w2",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj", "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
GGUF_FAMILIES: Mapping[str, GgufFamily] = types.MappingProxyType(
    {
        "llama": GgufFamily(architecture="LlamaForCausalLM", layer_names=_MIXTRAL, has_interleaved_heads=True, experts=_mixtral),
        "qwen2": GgufFamily(architecture="Qwen2ForCausalLM", config=_qwen2),
        "qwen3": GgufFamily(architecture="Qwen3ForCausalLM", layer_names=_QK_NORMS),
        "qwen2moe": GgufFamily(architecture="Qwen2MoeForCausalLM", layer_names=_EXPERTS, experts=_qwen2_moe),
        "qwen3moe": GgufFamily(architecture="Qwen3MoeForCausalLM", layer_names=_EXPERTS | _QK_NORMS, experts=_qwen3_moe),
        "gemma": GgufFamily(architecture="GemmaForCausalLM", has_norms_plus_one=True, config=_gemma),
        "gemma2": GgufFamily(architecture="Gemma2ForCausalLM", layer_names=_SANDWICH, has_norms_plus_one=True, config=_gemma2),
        "gemma3": GgufFamily(architecture="Gemma3ForCausalLM", layer_names=_QK_NORMS | _SANDWICH, has_norms_plus_one=True, config=_gemma3),
    }
)
