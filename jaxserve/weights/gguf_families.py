"""How GGUF files of other architectures differ from Llama's: the keys of their configs, and what the converter did to tensors.

Source: the conversion and the graphs of llama.cpp, an architecture at a time.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.weights.gguf_reader import GgufReader

Values = dict[str, Any]
Further = Callable[[GgufReader, Values], Values]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """One general.architecture.

    Args:
      architecture: Hugging Face's name for it.
      renamed: tensors of a layer -> what other architectures call the same part, in layers that have all of them.
      has_interleaved_heads: the rows of queries and keys are reordered so that neighbours rotate together.
      has_norms_plus_one: norms are stored with the 1 that Hugging Face's model adds itself.
      keys: Llama's key of config.json -> the family's.
      fixed: what the family's config.json says of all its models; None takes out what a Llama's would say.
      config: what else is in config.json, of the file and of the values that a Llama would have.
    """

    architecture: str
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_interleaved_heads: bool = False
    has_norms_plus_one: bool = False
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Further | None = None

    def values(self, reader: GgufReader, values: Values) -> Values:
        """The config.json of the family, given a Llama's."""
        found = {self.keys.get(key, key): value for key, value in values.items()} | dict(self.fixed)
        found |= self.config(reader, values) if self.config else {}
        return {key: value for key, value in found.items() if value is not None}


def has_in_layer(reader: GgufReader, name: str) -> bool:
    """Whether the first layer has a tensor."""
    return reader.has_tensor(f"blk.0.{name}")


def layer_types(reader: GgufReader, values: Values) -> Values:
    """Which layers have a window, as the file lists them."""
    flags = reader.flags("attention.sliding_window_pattern", values["num_hidden_layers"])
    return {"layer_types": ["sliding_attention" if flag else "full_attention" for flag in flags]}


def _windows(reader: GgufReader, values: Values) -> Values:
    return layer_types(reader, values) if values["sliding_window"] else {}


def _olmo2(reader: GgufReader, values: Values) -> Values:
    """OLMo 3 is an OLMo 2 with windows here."""
    if not values["sliding_window"]:
        return {}
    rope = values["rope_parameters"]
    if reader.has("rope.freq_base_swa"):
        local = {"rope_type": "default", "rope_theta": reader.number("rope.freq_base_swa")}
        rope = {"sliding_attention": local, "full_attention": rope}
    return {"architectures": ["Olmo3ForCausalLM"], "rope_parameters": rope, **layer_types(reader, values)}


def _gemma2(reader: GgufReader, values: Values) -> Values:
    return {
        "attn_logit_softcapping": reader.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": reader.number("final_logit_softcapping", 30.0),
        "sliding_window": reader.count("attention.sliding_window", 4096),
        **_query_scalar(values, num_layers_of_27b=46),
    }


def _gemma3(reader: GgufReader, values: Values) -> Values:
    return {
        "sliding_window": reader.count("attention.sliding_window"),
        "sliding_window_pattern": reader.count("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": reader.number("rope.freq_base_swa", 10_000.0),
        **_query_scalar(values, num_layers_of_27b=62),
    }


def _query_scalar(values: Values, num_layers_of_27b: int) -> Values:
    """The file does not say by what scores are divided; llama.cpp knows the 27B models, by their depth, as an exception."""
    if values["num_hidden_layers"] == num_layers_of_27b:
        return {"query_pre_attn_scalar": float(values["hidden_size"] // values["num_attention_heads"])}
    return {"query_pre_attn_scalar": float(values["head_dim"])}


def _starcoder2(reader: GgufReader, values: Values) -> Values:
    return {"use_bias": values["attention_bias"]}


def _falcon(reader: GgufReader, values: Values) -> Values:
    num_norms = 2 if has_in_layer(reader, "attn_norm_2.weight") else 1
    is_new = num_norms == 2 or values["num_key_value_heads"] > 1
    return {"new_decoder_architecture": is_new, **({"num_ln_in_parallel_attn": num_norms} if is_new else {})}


def _mpt(reader: GgufReader, values: Values) -> Values:
    num_heads, num_kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    alibi_bias_max, clip = reader.number_or_none("attention.max_alibi_bias"), reader.number_or_none("attention.clamp_kqv")
    attention = {
        "alibi": alibi_bias_max is not None, "alibi_bias_max": alibi_bias_max, "clip_qkv": clip, "kv_n_heads": num_kv_heads,
        "attn_type": "multihead_attention" if num_kv_heads == num_heads else "grouped_query_attention",
        "qk_ln": has_in_layer(reader, "attn_q_norm.weight"),
    }  # fmt: skip
    return {
        "attn_config": {key: value for key, value in attention.items() if value is not None},
        "ffn_config": {"ffn_hidden_size": values["intermediate_size"]},
        "learned_pos_emb": reader.has_tensor("position_embd.weight"),
        "no_bias": not has_in_layer(reader, "attn_norm.bias"),
    }


def _parallel(reader: GgufReader, values: Values) -> Values:
    return {"use_parallel_residual": reader.flag("use_parallel_residual", True)}


def _stablelm(reader: GgufReader, values: Values) -> Values:
    norms = {"qk_layernorm": has_in_layer(reader, "attn_q_norm.weight")}
    return _parallel(reader, values) | norms | {"use_qkv_bias": values["attention_bias"]}


def _cohere(reader: GgufReader, values: Values) -> Values:
    return {"logit_scale": reader.number("logit_scale"), "use_qk_norm": has_in_layer(reader, "attn_q_norm.weight") or None}


def _olmo(reader: GgufReader, values: Values) -> Values:
    return {"clip_qkv": reader.number_or_none("attention.clamp_kqv")}


def _gptj(reader: GgufReader, values: Values) -> Values:
    return {"rotary_dim": reader.count("rope.dimension_count")}


def _seed_oss(reader: GgufReader, values: Values) -> Values:
    return {"attention_out_bias": has_in_layer(reader, "attn_output.bias")}


def granite_config(reader: GgufReader, values: Values) -> Values:
    """The multipliers, each of which is 1 if the file has none."""
    return {
        "attention_multiplier": reader.number("attention.scale", values["head_dim"] ** -0.5),
        "embedding_multiplier": reader.number("embedding_scale", 1.0),
        "residual_multiplier": reader.number("residual_scale", 1.0),
        "logits_scaling": reader.number("logit_scale", 1.0),
    }


def _minicpm(reader: GgufReader, values: Values) -> Values:
    """What the config derives from the depth and the width, derived back; llama.cpp has the numbers of the 2B model for old files."""
    width, num_layers = values["hidden_size"], values["num_hidden_layers"]
    return {
        "scale_emb": reader.number("embedding_scale", 12.0),
        "scale_depth": reader.number("residual_scale", 1.4 / math.sqrt(num_layers)) * math.sqrt(num_layers),
        "dim_model_base": width / reader.number("logit_scale", width / 256),
    }


_BARE = {
    "head_dim": None,
    "num_key_value_heads": None,
    "hidden_act": None,
    "rope_parameters": None,
    "attention_bias": None,
    "mlp_bias": None,
}
_GPT2_KEYS = {
    "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions", "rms_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
_LAYER_NORM = {"rms_norm_eps": "layer_norm_eps"}
_GEMMA = {"hidden_act": None, "mlp_bias": None, "sliding_window": None, "hidden_activation": "gelu_pytorch_tanh"}
_POST = {"post_attention_norm": "attn_norm", "post_ffw_norm": "ffn_norm"}
_MPT_KEYS = {
    "hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers", "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
}  # fmt: skip

DENSE: Mapping[str, GgufFamily] = types.MappingProxyType(
    {
        # The family has biases on queries, keys and values without being told.
        "qwen2": GgufFamily(architecture="Qwen2ForCausalLM", fixed={"attention_bias": False}),
        "qwen3": GgufFamily(architecture="Qwen3ForCausalLM"),
        "gemma": GgufFamily(architecture="GemmaForCausalLM", has_norms_plus_one=True, fixed=_GEMMA),
        "gemma2": GgufFamily(architecture="Gemma2ForCausalLM", has_norms_plus_one=True, fixed=_GEMMA, config=_gemma2),
        "gemma3": GgufFamily(architecture="Gemma3ForCausalLM", has_norms_plus_one=True, fixed=_GEMMA, config=_gemma3),
        "phi2": GgufFamily(architecture="PhiForCausalLM", keys=_LAYER_NORM, fixed={"hidden_act": "gelu_new"}),
        "phi3": GgufFamily(architecture="Phi3ForCausalLM"),
        "gpt2": GgufFamily(architecture="GPT2LMHeadModel", keys=_GPT2_KEYS, fixed=_BARE),
        "starcoder": GgufFamily(
            architecture="GPTBigCodeForCausalLM", keys=_GPT2_KEYS, fixed=_BARE,
            config=lambda reader, values: {"multi_query": values["num_key_value_heads"] == 1},
        ),
        "starcoder2": GgufFamily(
            architecture="Starcoder2ForCausalLM", keys={"rms_norm_eps": "norm_epsilon"}, fixed={"hidden_act": "gelu_pytorch_tanh"},
            config=_starcoder2,
        ),
        "gptneox": GgufFamily(architecture="GPTNeoXForCausalLM", keys=_LAYER_NORM, fixed={"hidden_act": "gelu"}, config=_parallel),
        "bloom": GgufFamily(
            architecture="BloomForCausalLM", fixed=_BARE | {"intermediate_size": None},
            keys={
                "num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "max_position_embeddings": "seq_length",
                "rms_norm_eps": "layer_norm_epsilon",
            },
        ),
        "falcon": GgufFamily(
            architecture="FalconForCausalLM", renamed={"attn_norm": "ffn_norm", "attn_norm_2": "attn_norm"}, config=_falcon,
            keys={"num_key_value_heads": "num_kv_heads", "intermediate_size": "ffn_hidden_size", "rms_norm_eps": "layer_norm_epsilon"},
            fixed={"head_dim": None, "hidden_act": None, "attention_bias": None, "mlp_bias": None},
        ),
        "mpt": GgufFamily(architecture="MPTForCausalLM", keys=_MPT_KEYS, fixed=_BARE | {"intermediate_size": None}, config=_mpt),
        "stablelm": GgufFamily(architecture="StableLmForCausalLM", keys=_LAYER_NORM, config=_stablelm),
        "command-r": GgufFamily(architecture="CohereForCausalLM", keys=_LAYER_NORM, config=_cohere),
        "cohere2": GgufFamily(architecture="Cohere2ForCausalLM", keys=_LAYER_NORM, config=_cohere),
        "olmo": GgufFamily(architecture="OlmoForCausalLM", has_interleaved_heads=True, config=_olmo),
        "olmo2": GgufFamily(architecture="Olmo2ForCausalLM", renamed=_POST, config=_olmo2),
        "nemotron": GgufFamily(
            architecture="NemotronForCausalLM", has_norms_plus_one=True, keys={"rms_norm_eps": "norm_eps"}, fixed={"hidden_act": "relu2"}
        ),
        "exaone": GgufFamily(
            architecture="ExaoneForCausalLM", fixed={"mlp_bias": None},
            keys={"num_hidden_layers": "num_layers", "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon"},
        ),
        "exaone4": GgufFamily(architecture="Exaone4ForCausalLM", renamed=_POST, config=_windows),
        "internlm2": GgufFamily(architecture="InternLM2ForCausalLM", has_interleaved_heads=True),
        "minicpm": GgufFamily(architecture="MiniCPMForCausalLM", has_interleaved_heads=True, config=_minicpm),
        "granite": GgufFamily(architecture="GraniteForCausalLM", has_interleaved_heads=True, config=granite_config),
        "arcee": GgufFamily(architecture="ArceeForCausalLM", has_interleaved_heads=True, fixed={"hidden_act": "relu2"}),
        "smollm3": GgufFamily(architecture="SmolLM3ForCausalLM", has_interleaved_heads=True),
        "seed_oss": GgufFamily(architecture="SeedOssForCausalLM", renamed={"post_attention_norm": "ffn_norm"}, config=_seed_oss),
        "chatglm": GgufFamily(architecture="GlmForCausalLM"),
        "glm4": GgufFamily(architecture="Glm4ForCausalLM"),
        "gptj": GgufFamily(
            architecture="GPTJForCausalLM", keys=_GPT2_KEYS, fixed=_BARE | {"partial_rotary_factor": None}, config=_gptj
        ),
    }
)  # fmt: skip
