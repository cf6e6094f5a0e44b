"""How GGUF files of models with experts, and of those with latent attention, differ from Llama's."""

from __future__ import annotations

import types
from collections.abc import Mapping

from jaxserve.errors import ConfigError
from jaxserve.weights.gguf_encoder_families import ENCODERS
from jaxserve.weights.gguf_families import DENSE, GgufFamily, Values, granite_config, has_in_layer
from jaxserve.weights.gguf_reader import GgufReader

_SIGMOID = 2  # llama.cpp's number of this function of a router's logits


def _top_k(reader: GgufReader, count: str) -> Values:
    return {count: reader.count("expert_count"), "num_experts_per_tok": reader.count("expert_used_count")}


def _llama(reader: GgufReader, values: Values) -> Values:
    """Mixtral has Llama's architecture here."""
    if not reader.count("expert_count", 0):
        return {}
    return {"architectures": ["MixtralForCausalLM"], "mlp_bias": None, **_top_k(reader, "num_local_experts")}


def _small_experts(reader: GgufReader, values: Values) -> Values:
    return {"moe_intermediate_size": reader.count("expert_feed_forward_length"), **_top_k(reader, "num_experts")}


def _qwen2_moe(reader: GgufReader, values: Values) -> Values:
    shared = {"shared_expert_intermediate_size": reader.count("expert_shared_feed_forward_length")}
    return _small_experts(reader, values) | shared | {"qkv_bias": values["attention_bias"]}


def _granite_moe(reader: GgufReader, values: Values) -> Values:
    shared = reader.count("expert_shared_feed_forward_length", 0) or None
    return granite_config(reader, values) | _top_k(reader, "num_local_experts") | {"shared_intermediate_size": shared}


def _phimoe(reader: GgufReader, values: Values) -> Values:
    return _top_k(reader, "num_local_experts") | {"lm_head_bias": reader.has_tensor("output.bias")}


def _gpt_oss(reader: GgufReader, values: Values) -> Values:
    rope = values["rope_parameters"]
    if rope["rope_type"] == "yarn":  # all published ones have the ramp between features, not at whole ones
        rope = rope | {"truncate": False}
    width = reader.count("expert_feed_forward_length")
    return {"intermediate_size": width, "rope_parameters": rope, **_top_k(reader, "num_local_experts")}


def _dbrx(reader: GgufReader, values: Values) -> Values:
    attention = {
        "kv_n_heads": values["num_key_value_heads"], "clip_qkv": reader.number_or_none("attention.clamp_kqv"),
        "rope_theta": values["rope_parameters"]["rope_theta"],
    }  # fmt: skip
    experts = {"moe_num_experts": reader.count("expert_count"), "moe_top_k": reader.count("expert_used_count")}
    return {"attn_config": attention, "ffn_config": {"ffn_hidden_size": values["intermediate_size"], **experts}}


def _deepseek_experts(reader: GgufReader) -> Values:
    groups = {"n_group": reader.count("expert_group_count", 0), "topk_group": reader.count("expert_group_used_count", 0)}
    return {
        **_top_k(reader, "n_routed_experts"),
        **{key: count for key, count in groups.items() if count},
        "moe_intermediate_size": reader.count("expert_feed_forward_length"),
        "n_shared_experts": reader.count("expert_shared_count", 0),
        "first_k_dense_replace": reader.count("leading_dense_block_count", 0),
        "routed_scaling_factor": reader.number("expert_weights_scale", 1.0),
        "norm_topk_prob": reader.flag("expert_weights_norm", False),
    }


def _deepseek2(reader: GgufReader, values: Values) -> Values:
    """DeepSeek V2 and V3, which the file tells apart by the router.

    Newer files have latent attention as llama.cpp computes it, with one KV head of the latent's size, and what it stands for under other
    keys.
    """
    rope_size = reader.count("rope.dimension_count")
    key_size = reader.count("attention.key_length_mla", reader.count("attention.key_length"))
    attention = {
        "q_lora_rank": reader.count("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": reader.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_size,
        "qk_nope_head_dim": key_size - rope_size,
        "v_head_dim": reader.count("attention.value_length_mla", reader.count("attention.value_length")),
        "attention_bias": has_in_layer(reader, "attn_kv_a_mqa.bias"),
        "rope_parameters": values["rope_parameters"] | _mscale(reader),
    }
    experts, has_sigmoid = _deepseek_experts(reader), reader.count("expert_gating_func", 1) == _SIGMOID
    if has_sigmoid or reader.has_tensor(f"blk.{values['num_hidden_layers'] - 1}.exp_probs_b.bias"):
        return attention | experts | {"architectures": ["DeepseekV3ForCausalLM"]}
    return attention | experts | {"topk_method": "group_limited_greedy" if experts.get("n_group", 1) > 1 else "greedy"}


def _mscale(reader: GgufReader) -> Values:
    """A tenth of DeepSeek's factor of scores is in the file; that of cosine and sine, which it has beside it, is equal to it."""
    scale = reader.number_or_none("rope.scaling.yarn_log_multiplier")
    return {} if scale is None else {"mscale": 10 * scale, "mscale_all_dim": 10 * scale}


def _glm4_moe(reader: GgufReader, values: Values) -> Values:
    ahead = reader.count("nextn_predict_layers", 0)  # layers that guess further tokens, counted with the others
    reader.count("expert_gating_func", _SIGMOID)
    return {
        "num_hidden_layers": values["num_hidden_layers"] - ahead,
        "use_qk_norm": has_in_layer(reader, "attn_q_norm.weight"),
        **_deepseek_experts(reader),
    }


# What llama.cpp knows of Llama 4, as its files do not say it: no positions on each fourth layer, chunks and temperature on the others.
_LLAMA4 = {
    "no_rope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True, "floor_scale": 8192, "attn_scale": 0.1,
}  # fmt: skip
_EXPERTS_OF_MAVERICK = 128


def _llama4(reader: GgufReader, values: Values) -> Values:
    if reader.has("attention.sliding_window"):  # 0 says that there are no chunks
        raise ConfigError(f"attention.sliding_window={values['sliding_window'] or 0} of a Llama 4 is not supported")
    experts = _top_k(reader, "num_local_experts")
    return experts | {
        "intermediate_size": reader.count("expert_feed_forward_length"),
        "intermediate_size_mlp": values["intermediate_size"],
        "interleave_moe_layer_step": reader.count("interleave_moe_layer_step"),
        "use_qk_norm": experts["num_local_experts"] != _EXPERTS_OF_MAVERICK,
        **_LLAMA4,
    }


_SPARSE: Mapping[str, GgufFamily] = types.MappingProxyType(
    {
        "llama": GgufFamily(architecture="LlamaForCausalLM", has_interleaved_heads=True, config=_llama),
        "qwen2moe": GgufFamily(architecture="Qwen2MoeForCausalLM", fixed={"attention_bias": False}, config=_qwen2_moe),
        # The file does not say whether weights are renormalized, but those of all published models are.
        "qwen3moe": GgufFamily(architecture="Qwen3MoeForCausalLM", fixed={"norm_topk_prob": True}, config=_small_experts),
        "olmoe": GgufFamily(
            architecture="OlmoeForCausalLM", fixed={"mlp_bias": None}, config=lambda reader, values: _top_k(reader, "num_experts")
        ),
        "phimoe": GgufFamily(architecture="PhiMoEForCausalLM", fixed={"mlp_bias": None}, config=_phimoe),
        "granitemoe": GgufFamily(architecture="GraniteMoeForCausalLM", has_interleaved_heads=True, config=_granite_moe),
        "dbrx": GgufFamily(
            architecture="DbrxForCausalLM", renamed={"attn_output_norm": "ffn_norm"}, config=_dbrx,
            keys={
                "hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers",
                "max_position_embeddings": "max_seq_len",
            },
            fixed={
                "head_dim": None, "num_key_value_heads": None, "hidden_act": None, "rope_parameters": None, "attention_bias": None,
                "mlp_bias": None, "intermediate_size": None, "rms_norm_eps": None,
            },
        ),
        "gpt-oss": GgufFamily(
            architecture="GptOssForCausalLM", renamed={"post_attention_norm": "ffn_norm"}, fixed={"mlp_bias": None}, config=_gpt_oss
        ),
        "deepseek2": GgufFamily(
            architecture="DeepseekV2ForCausalLM", config=_deepseek2,
            fixed={"head_dim": None, "num_key_value_heads": None, "partial_rotary_factor": None},
        ),
        "llama4": GgufFamily(architecture="Llama4ForCausalLM", fixed={"mlp_bias": None}, config=_llama4),
        "glm4moe": GgufFamily(architecture="Glm4MoeForCausalLM", renamed={"post_attention_norm": "ffn_norm"}, config=_glm4_moe),
    }
)  # fmt: skip
GGUF_FAMILIES: Mapping[str, GgufFamily] = types.MappingProxyType({**_SPARSE, **DENSE, **ENCODERS})
