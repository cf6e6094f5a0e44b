"""What a GGUF file says about its model, in Hugging Face's words: the keys of config.json and the names of tensors.

1. A table says by architecture how it differs from Llama; an architecture that is not in it is refused.
2. Every metadata key of the architecture is translated, known to be harmless, or refused by name and value.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.rope import rope_frequencies
from jaxserve.models.spec import Llama3Scaling, RopeSpec
from jaxserve.weights.gguf_moe_families import GGUF_FAMILIES
from jaxserve.weights.gguf_names import EMBEDDING, LONG_FACTORS, ROPE_FREQS, SHORT_FACTORS
from jaxserve.weights.gguf_reader import GgufReader

_LAYER = re.compile(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", re.ASCII)
# The scalings of Llama 3.1 and of Llama 4, as all published models have them; the file keeps only their effect.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA4 = _LLAMA3 | {"high_freq_factor": 1.0}
ROPE_TENSORS = (ROPE_FREQS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are no parameters, but say by what rotary frequencies are divided."""


def check_architecture(metadata: Mapping[str, Any]) -> str:
    """general.architecture, if its models can be read.

    Raises: ConfigError naming it and what there is.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_FAMILIES:
        raise ConfigError(f"GGUF files of architecture {name!r:.80} are not supported; there are {', '.join(GGUF_FAMILIES)}")
    return name


def common_name(name: str, metadata: Mapping[str, Any], names: Collection[str]) -> str:
    """What most architectures call a tensor.

    Args:
      names: of all tensors of the file.
    """
    renamed = GGUF_FAMILIES[check_architecture(metadata)].renamed
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in renamed or any(f"blk.{match[1]}.{part}.weight" not in names for part in renamed):
        return name
    return f"blk.{match[1]}.{renamed[match[2]]}.{match[3]}"


def rotated_heads(name: str, metadata: Mapping[str, Any]) -> int | None:
    """Number of heads whose rows llama.cpp has interleaved in this tensor, None if it has not.

    Source: LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py.
    """
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in ("attn_q", "attn_k") or not GGUF_FAMILIES[check_architecture(metadata)].has_interleaved_heads:
        return None
    reader = GgufReader(metadata, check_architecture(metadata))
    num_heads = reader.count("attention.head_count")
    return num_heads if match[2] == "attn_q" else reader.count("attention.head_count_kv", num_heads)


def has_added_one(name: str, metadata: Mapping[str, Any]) -> bool:
    """Whether llama.cpp has added 1 to this tensor, which Hugging Face's model does when it runs."""
    return name.endswith("_norm.weight") and GGUF_FAMILIES[check_architecture(metadata)].has_norms_plus_one


def gguf_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_tensors: Mapping[str, np.ndarray], source: str
) -> HfConfig:
    """The config.json that the model had before it became a GGUF file.

    Args:
      metadata: key -> value; of the tokenizer only the ids are needed.
      shapes: of the tensors, by their names in the file.
      rope_tensors: f32[rotated features / 2] each, those of ROPE_TENSORS that there are.
    Raises: ConfigError naming what is missing, ill-typed or not understood.
    """
    name = check_architecture(metadata)
    reader, family = GgufReader(metadata, name, shapes), GGUF_FAMILIES[name]
    width, num_heads = reader.count("embedding_length"), reader.count("attention.head_count")
    head_size = reader.count("attention.key_length", width // max(num_heads, 1))
    if reader.count("attention.value_length", head_size) != head_size and not reader.has("attention.kv_lora_rank"):
        raise ConfigError(f"{source}: values of a size other than the keys' {head_size} are not supported")
    rotary = reader.count("rope.dimension_count", head_size)
    is_rms = reader.has("attention.layer_norm_rms_epsilon")
    other_eps = reader.number("attention.layer_norm_epsilon", 1e-5 if is_rms else None)
    tokens = _token_ids(metadata)
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": name,
        "hidden_size": width,
        "intermediate_size": reader.count("feed_forward_length"),
        "num_hidden_layers": _num_layers(reader, shapes, source),
        "num_attention_heads": num_heads,
        "num_key_value_heads": reader.count("attention.head_count_kv", num_heads),
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon") if is_rms else other_eps,
        "max_position_embeddings": reader.count("context_length"),
        "vocab_size": _vocab_size(shapes, source),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope_parameters(reader, rotary, rope_tensors),
        "partial_rotary_factor": rotary / head_size,
        "sliding_window": reader.count("attention.sliding_window", 0) or None,
        "attention_bias": any(re.fullmatch(r"blk\.\d+\.attn_(q|k|v|qkv|output)\.bias", name) for name in shapes),
        "mlp_bias": any(re.fullmatch(r"blk\.\d+\.ffn_(gate|up|down)\.bias", name) for name in shapes),
    }
    values = family.values(reader, values)
    reader.count("pooling_type", 0)  # read by those who pool
    reader.refuse_unread(source)
    return HfConfig(values | tokens, generation=tokens, source=source)


def _num_layers(reader: GgufReader, shapes: Mapping[str, tuple[int, ...]], source: str) -> int:
    stated = reader.count("block_count")
    found = max((int(match[1]) + 1 for name in shapes if (match := _LAYER.fullmatch(name))), default=0)
    if stated != found:
        raise ConfigError(f"{source}: block_count={stated}, but the file holds the tensors of {found} layers")
    return stated


def _vocab_size(shapes: Mapping[str, tuple[int, ...]], source: str) -> int:
    shape = shapes.get(EMBEDDING)
    if shape is None or len(shape) != 2:
        raise ConfigError(f"{source} has no matrix token_embd.weight")
    return shape[0]


def _rope_parameters(reader: GgufReader, rotary: int, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    theta = reader.number("rope.freq_base", 10_000.0)
    kind = reader.text("rope.scaling.type", "none")
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 1.0))
    original_len = reader.count("rope.scaling.original_context_length", 0)
    attention_factor = reader.number_or_none("rope.scaling.attn_factor") or reader.number_or_none("rope.scaling.yarn_attn_factor")
    ramp = {key: reader.number_or_none(f"rope.scaling.yarn_{key}") for key in ("beta_fast", "beta_slow")}
    reader.text("rope.scaling.finetuned", "")
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if ROPE_FREQS in tensors:
        return _llama3_scaling(tensors[ROPE_FREQS], theta, rotary)
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        factors = {"long_factor": tensors[LONG_FACTORS], "short_factor": tensors[SHORT_FACTORS]}
        rope |= {"rope_type": "longrope", **{key: [float(str(value)) for value in values] for key, values in factors.items()}}
    elif kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        rope |= {"rope_type": kind, "factor": factor}
    if rope["rope_type"] in ("default", "linear"):
        return rope
    given = {"original_max_position_embeddings": original_len or None, "attention_factor": attention_factor, **ramp}
    return rope | {key: value for key, value in given.items() if value is not None}


def _llama3_scaling(divisors: np.ndarray, theta: float, rotary: int) -> dict[str, Any]:
    """The scaling whose effect on each frequency is to divide it by its entry of `divisors`.

    Raises: ConfigError if it is neither Llama 3.1's nor Llama 4's.
    """
    factor = max(round(float(divisors.max()), 4), 1.0)
    for numbers in (_LLAMA3, _LLAMA4):
        scaling = Llama3Scaling(
            factor=factor, low_freq_factor=numbers["low_freq_factor"], high_freq_factor=numbers["high_freq_factor"],
            original_len=int(numbers["original_max_position_embeddings"]),
        )  # fmt: skip
        plain, scaled = (rope_frequencies(RopeSpec(dim=rotary, theta=theta, scaling=kind)) for kind in (None, scaling))
        if divisors.shape == plain.shape and np.allclose(divisors, plain / scaled, rtol=1e-3):
            return {"rope_theta": theta, "rope_type": "llama3", "factor": factor, **numbers}
    raise ConfigError(f"{ROPE_FREQS} does not follow the frequency scaling of Llama 3.1 or 4, the only ones supported in GGUF files")


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ids that begin and end a text; several may end it, as with chat models whose turns have an end of their own."""
    found = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token for token in found if isinstance(token, int)))
    begin = metadata.get("tokenizer.ggml.bos_token_id")
    ids: dict[str, Any] = {"bos_token_id": begin} if isinstance(begin, int) else {}
    return ids | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})
