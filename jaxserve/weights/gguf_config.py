"""What a GGUF file says about its model, in Hugging Face's words: the keys of config.json and the names of tensors.

1. A table per architecture says which tensors are which; an architecture that is not in it is refused.
2. Every metadata key of the architecture is translated, known to be harmless, or refused by name and value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig
from jaxserve.weights.gguf_families import GGUF_FAMILIES, GgufFamily
from jaxserve.weights.gguf_reader import GgufReader

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_LAYER = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", re.ASCII)
_MODEL = re.compile(r"(\w+)\.(weight|bias)", re.ASCII)
# Where the attention's rotary frequencies are kept when they are not powers of a base; not a parameter.
ROPE_FREQS = "rope_freqs.weight"
# The original Llama 3.1 scaling, as all published models of it have it; the file keeps only its effect.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def check_architecture(metadata: Mapping[str, Any]) -> str:
    """general.architecture, if its models can be read.

    Raises: ConfigError naming it and what there is.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise ConfigError(f"GGUF files of architecture {name!r:.80} are not supported; there are {', '.join(GGUF_FAMILIES)}")
    return name


def hf_name(name: str, metadata: Mapping[str, Any]) -> str:
    """Hugging Face's name of a tensor; what has none there keeps its own."""
    if match := _LAYER.fullmatch(name):
        layer, part, leaf = match.groups()
        if part == "ffn_gate_inp_shexp":  # one output, so that the file has a vector where Hugging Face has a matrix
            return f"model.layers.{int(layer)}.mlp.shared_expert_gate.vector"
        names = {**_LAYER_NAMES, **GGUF_FAMILIES[check_architecture(metadata)].layer_names}
        return f"model.layers.{int(layer)}.{names[part]}.{leaf}" if part in names else name
    if (match := _MODEL.fullmatch(name)) and match[1] in _MODEL_NAMES:
        return f"{_MODEL_NAMES[match[1]]}.{match[2]}"
    return name


def rotated_heads(name: str, metadata: Mapping[str, Any]) -> int | None:
    """Number of heads whose rows llama.cpp has interleaved in this tensor, None if it has not.

    Source: LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py.
    """
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in ("attn_q", "attn_k") or not GGUF_FAMILIES[check_architecture(metadata)].has_interleaved_heads:
        return None
    reader = _reader(metadata)
    num_heads = reader.count("attention.head_count")
    return num_heads if match[2] == "attn_q" else reader.count("attention.head_count_kv", num_heads)


def has_added_one(name: str, metadata: Mapping[str, Any]) -> bool:
    """Whether llama.cpp has added 1 to this tensor, which Hugging Face's model does when it runs."""
    return name.endswith("_norm.weight") and GGUF_FAMILIES[check_architecture(metadata)].has_norms_plus_one


def _reader(metadata: Mapping[str, Any]) -> GgufReader:
    return GgufReader(metadata, check_architecture(metadata))


def gguf_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_freqs: np.ndarray | None, source: str) -> HfConfig:
    """The config.json that the model had before it became a GGUF file.

    Args:
      metadata: key -> value; of the tokenizer only the ids are needed.
      shapes: of the tensors, by their names in the file.
      rope_freqs: f32[head size / 2], the tensor of that name if there is one.
    Raises: ConfigError naming what is missing, ill-typed or not understood.
    """
    reader, family = _reader(metadata), GGUF_FAMILIES[check_architecture(metadata)]
    width, num_heads = reader.count("embedding_length"), reader.count("attention.head_count")
    head_size = reader.count("attention.key_length", width // max(num_heads, 1))
    if reader.count("attention.value_length", head_size) != head_size:
        raise ConfigError(f"{source}: values of a size other than the keys' {head_size} are not supported")
    rotary = reader.count("rope.dimension_count", head_size)
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": check_architecture(metadata),
        "hidden_size": width,
        "intermediate_size": reader.count("feed_forward_length"),
        "num_hidden_layers": _num_layers(reader, shapes, source),
        "num_attention_heads": num_heads,
        "num_key_value_heads": reader.count("attention.head_count_kv", num_heads),
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": reader.count("context_length"),
        "vocab_size": _vocab_size(shapes, source),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope_parameters(reader, head_size, rope_freqs),
        "sliding_window": reader.count("attention.sliding_window", 0) or None,
        "attention_bias": any(re.fullmatch(r"blk\.\d+\.attn_(q|k|v|output)\.bias", name) for name in shapes),
        "mlp_bias": any(re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)\.bias", name) for name in shapes),
    }
    if rotary != head_size:
        values["partial_rotary_factor"] = rotary / head_size
    values = _translated(reader, family, values, source)
    reader.refuse_unread(source)
    tokens = _token_ids(metadata)
    return HfConfig(values | tokens, generation=tokens, source=source)


def _translated(reader: GgufReader, family: GgufFamily, values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values as the family's own config.json has them."""
    num_experts = reader.count("expert_count", 0)
    if num_experts and family.experts is None:
        raise ConfigError(f"{source}: experts (expert_count={num_experts}) are not supported in GGUF files for {family.architecture}")
    translate = family.experts if num_experts else family.config
    return values if translate is None else translate(reader, values)


def _num_layers(reader: GgufReader, shapes: Mapping[str, tuple[int, ...]], source: str) -> int:
    stated = reader.count("block_count")
    found = max((int(match[1]) + 1 for name in shapes if (match := _LAYER.fullmatch(name))), default=0)
    if stated != found:
        raise ConfigError(f"{source}: block_count={stated}, but the file holds the tensors of {found} layers")
    return stated


def _vocab_size(shapes: Mapping[str, tuple[int, ...]], source: str) -> int:
    shape = shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2:
        raise ConfigError(f"{source} has no matrix token_embd.weight")
    return shape[0]


def _rope_parameters(reader: GgufReader, head_size: int, rope_freqs: np.ndarray | None) -> dict[str, Any]:
    theta = reader.number("rope.freq_base", 10_000.0)
    kind = reader.text("rope.scaling.type", "none")
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 1.0))
    original_len = reader.count("rope.scaling.original_context_length", 0)
    reader.text("rope.scaling.finetuned", "")
    if rope_freqs is not None:
        return _llama3_scaling(rope_freqs, theta, head_size)
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if kind not in ("none", "linear"):
        rope |= {"rope_type": kind, "factor": factor}
        return rope | ({"original_max_position_embeddings": original_len} if original_len else {})
    if kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    return rope


def _llama3_scaling(divisors: np.ndarray, theta: float, head_size: int) -> dict[str, Any]:
    """The scaling whose effect on each frequency is to divide it by its entry of `divisors`.

    Raises: ConfigError if it is not Llama 3.1's.
    """
    factor = round(float(divisors.max()), 4)
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_size, 2) / head_size)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    if divisors.shape == wavelength.shape and factor >= 1:
        smooth = np.clip((_LLAMA3["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
        if np.allclose(divisors, 1 / (smooth + (1 - smooth) / factor), rtol=1e-3):
            return {"rope_theta": theta, "rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise ConfigError(f"{ROPE_FREQS} does not follow the frequency scaling of Llama 3.1, the only one that is supported in GGUF files")


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin and end a text; several may end it, as with chat models whose turns have an end of their own."""
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token for token in found if isinstance(token, int)))
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    ids: dict[str, Any] = {"bos_token_id": begin} if isinstance(begin, int) else {}
    return ids | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})
