"""Encoders with rotary positions and gated MLPs: GTE 1.5 (also called New, and Arctic Embed 2's medium size) and Nomic Embed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.families.bert import PRETRAINED, encoder_attention, encoder_pool
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import Activation, MlpSpec
from jaxserve.models.names import Family, Names, Stored, stored, with_leaves
from jaxserve.models.spec import AttentionSpec, LayerSpec, ModelSpec, NormSpec, RopeSpec

_NOMIC_GATES: dict[str, Activation] = {"swiglu": "silu", "geglu": "gelu"}


def gte_spec(config: HfConfig) -> ModelSpec:
    """Norms after the sums, one rotation for all layers; of the MLP only the projection down has a bias.

    Source: the modeling code that Alibaba-NLP's checkpoints name, and transformers' Gte.
    """
    _refuse_others(config, {"position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False})
    for key in ("logn_attention_clip1", "pack_qkv", "unpad_inputs", "use_memory_efficient_attention", "attention_probs_dropout_prob"):
        config.get(key)  # about a scale that is off, how tensors are stored, which the tensors tell, and how to compute the same
    width = config.require("hidden_size", int)
    attention = encoder_attention(width, config.require("num_attention_heads", int))
    mlp = MlpSpec(width=config.require("intermediate_size", int), activation=parts.read_activation(config, default="gelu"), down_bias=True)
    return _spec(
        config, dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size)), mlp,
        num_layers=parts.num_layers(config), eps=config.get("layer_norm_eps", 1e-12), token_types=config.get("type_vocab_size", 1),
        max_len=config.get("max_position_embeddings", 2048),
    )  # fmt: skip


def nomic_spec(config: HfConfig) -> ModelSpec:
    """The same without biases; under keys of GPT-2's in Nomic's own files, of BERT's in transformers'."""
    config.get("attention_probs_dropout_prob")
    if "n_embd" in config.values:
        return _published_nomic_spec(config)
    width = config.require("hidden_size", int)
    attention = encoder_attention(width, config.require("num_attention_heads", int))
    if config.get("head_dim", attention.head_size) != attention.head_size:
        raise ConfigError(f"head_dim={config.get('head_dim')!r} is not supported; there is hidden_size / num_attention_heads")
    rope = parts.read_rope(config, attention.head_size, theta=1000.0)
    attention = dataclasses.replace(attention, qkv_bias=False, out_bias=False, rope=rope)
    return _spec(
        config, attention, parts.read_mlp(config), num_layers=parts.num_layers(config), eps=config.get("layer_norm_eps", 1e-12),
        token_types=config.get("type_vocab_size", 2), max_len=config.get("max_position_embeddings", 2048),
    )  # fmt: skip


def _published_nomic_spec(config: HfConfig) -> ModelSpec:
    """Nomic's own config.json; texts beyond max_trained_positions, for which the code would stretch the rotation, are not taken."""
    _refuse_others(
        config, {
            "causal": False, "prenorm": False, "parallel_block": False, "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
            "use_rms_norm": False, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "mlp_fc1_bias": False,
            "mlp_fc2_bias": False, "parallel_block_tied_norm": False,
        },
    )  # fmt: skip
    for key in (
        "dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln", "pad_vocab_size_multiple", "reorder_and_upcast_attn",
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "use_flash_attn",
        "use_xentropy", "rotary_scaling_factor",
    ):  # fmt: skip
        config.get(key)
    gate = config.get("activation_function", "swiglu")
    if gate not in _NOMIC_GATES:
        raise ConfigError(f"activation_function={gate!r:.40} is not supported; there are {', '.join(_NOMIC_GATES)}")
    attention = encoder_attention(config.require("n_embd", int), config.require("n_head", int))
    bias = config.get("qkv_proj_bias", False)
    rope = RopeSpec(dim=attention.head_size, theta=config.get("rotary_emb_base", 1000.0))
    attention = dataclasses.replace(attention, qkv_bias=bias, out_bias=bias, rope=rope)
    mlp = MlpSpec(width=config.require("n_inner", int), activation=_NOMIC_GATES[gate])
    return _spec(
        config, attention, mlp, num_layers=config.require("n_layer", int), eps=config.get("layer_norm_epsilon", 1e-12),
        token_types=config.get("type_vocab_size", 2), max_len=config.get("max_trained_positions", config.get("n_positions", 2048)),
    )  # fmt: skip


def _spec(
    config: HfConfig, attention: AttentionSpec, mlp: MlpSpec, *, num_layers: int, eps: float, token_types: int, max_len: int
) -> ModelSpec:
    norm = NormSpec(eps=eps, kind="layer", bias=True)
    width = attention.num_heads * attention.head_size
    for key in ("tie_word_embeddings", "num_labels"):
        config.get(key)
    return ModelSpec(
        width=width, vocab_size=config.require("vocab_size", int), max_len=max_len, final_norm=None, tied=True, embed_norm=norm,
        layers=(LayerSpec(attention=attention, mlp=mlp, norm=norm, placement="post_sum"),) * num_layers, token_types=token_types,
        pool=encoder_pool(config, width, activation="tanh"),
    )  # fmt: skip


def _refuse_others(config: HfConfig, only: dict[str, Any]) -> None:
    """Raise ConfigError naming the first key whose value is not the only one that there is."""
    for key, value in only.items():
        found = config.get(key)
        if found is not None and found != value:
            raise ConfigError(f"{key}={found!r:.40} is not supported; there is {value!r}")


def _either(names: dict[str, str], prefixes: tuple[str, ...]) -> dict[str, tuple[Stored, ...]]:
    """Modules as ways to store them, each with one of these prefixes."""
    return {
        path: tuple(way for prefix in prefixes for way in stored(*(f"{prefix}{name}" for name in joined.split())))
        for path, joined in names.items()
    }


_L, _E = "layers.{i}.", "encoder.layer.{i}."
_TRANSFORMERS = {
    "attention_norm": f"{_L}post_attention_layernorm",
    "attention.qkv": " ".join(f"{_L}self_attn.{part}_proj" for part in "qkv"),
    "attention.out": f"{_L}self_attn.o_proj",
    "mlp_norm": f"{_L}post_mlp_layernorm",
    "mlp.gate_up": f"{_L}mlp.gate_proj {_L}mlp.up_proj",
    "mlp.down": f"{_L}mlp.down_proj",
}
_PUBLISHED_GTE = {
    "attention_norm": f"{_E}attn_ln",
    "attention.qkv": f"{_E}attention.qkv_proj",
    "attention.out": f"{_E}attention.o_proj",
    "mlp_norm": f"{_E}mlp_ln",
    "mlp.down": f"{_E}mlp.down_proj",
}
_N = "encoder.layers.{i}."
_PUBLISHED_NOMIC = {
    "attention_norm": f"{_N}norm1",
    "attention.qkv": f"{_N}attn.Wqkv",
    "attention.out": f"{_N}attn.out_proj",
    "mlp_norm": f"{_N}norm2",
    "mlp.gate_up": f"{_N}mlp.fc12 {_N}mlp.fc11",
    "mlp.down": f"{_N}mlp.fc2",
}


def _layer_names(published: dict[str, tuple[Stored, ...]], prefix: str) -> Names:
    ours = _either(_TRANSFORMERS, (prefix, ""))
    return with_leaves({path: published[path] + ways for path, ways in ours.items()})


def _model_names(embed_norm: str, *prefixes: str) -> Names:
    modules = {"embed": "embeddings.word_embeddings", "token_types": "embeddings.token_type_embeddings"}
    tables = _either(modules, prefixes) | {"embed_norm": stored(f"{prefixes[0]}{embed_norm}")}
    tables["embed_norm"] += _either({"": "embeddings.LayerNorm"}, prefixes)[""]
    return with_leaves(tables | {"pool.0": _either({"": "pooler.dense"}, prefixes)[""], "pool.1": stored("classifier")})


_swapped = functools.partial(stored, layout="halves_swapped")
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")
_SPLIT_QKV = stored(*(f"new.{_E}attention.{part}_proj" for part in "qkv"))
_GTE = _either(_PUBLISHED_GTE, ("new.", "gte."))
GTE = Family(
    architectures=("NewModel", "NewForSequenceClassification", "GteModel", "GteForSequenceClassification"),
    spec=gte_spec,
    layer_names=_layer_names(
        {
            **_GTE,
            "attention.qkv": _GTE["attention.qkv"] + _SPLIT_QKV,
            "mlp.gate_up": _swapped(f"new.{_E}mlp.up_gate_proj") + _swapped(f"gte.{_E}mlp.up_gate_proj"),
        },
        "gte.",
    ),
    model_names=_model_names("embeddings.LayerNorm", "new.", "gte."),
    optional_prefix="new.",
    ignored=(*_POOLER, *PRETRAINED, "classifier.weight", "classifier.bias"),  # GTE multilingual has one for other vectors
)
NOMIC_BERT = Family(
    architectures=("NomicBertModel", "NomicBertForSequenceClassification"),
    spec=nomic_spec,
    layer_names=_layer_names(_either(_PUBLISHED_NOMIC, ("nomic_bert.",)), "nomic_bert."),
    model_names=_model_names("emb_ln", "nomic_bert."),
    optional_prefix="nomic_bert.",
    ignored=(*_POOLER, *PRETRAINED),
)
