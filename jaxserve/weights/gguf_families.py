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
    """

    architecture: str
    layer_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_interleaved_heads: bool = False
    has_norms_plus_one: bool = False
    config: Callable[[GgufReader, Values], Values] | None = None


def _qwen2(reader: GgufReader, values: Values) -> Values:
    return values | {"attention_bias": False}  # the family has biases on queries, keys and values without being told


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
GGUF_FAMILIES: Mapping[str, GgufFamily] = types.MappingProxyType(
    {
        "llama": GgufFamily(architecture="LlamaForCausalLM", has_interleaved_heads=True),
        "qwen2": GgufFamily(architecture="Qwen2ForCausalLM", config=_qwen2),
        "qwen3": GgufFamily(architecture="Qwen3ForCausalLM", layer_names=_QK_NORMS),
        "gemma": GgufFamily(architecture="GemmaForCausalLM", has_norms_plus_one=True, config=_gemma),
        "gemma2": GgufFamily(architecture="Gemma2ForCausalLM", layer_names=_SANDWICH, has_norms_plus_one=True, config=_gemma2),
        "gemma3": GgufFamily(architecture="Gemma3ForCausalLM", layer_names=_QK_NORMS | _SANDWICH, has_norms_plus_one=True, config=_gemma3),
    }
)
