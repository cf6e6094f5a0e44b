"""How GGUF files of encoders differ from Llama's."""

from __future__ import annotations

import types
from collections.abc import Mapping

from jaxserve.errors import ConfigError
from jaxserve.weights.gguf_families import GgufFamily, Values
from jaxserve.weights.gguf_names import TOKEN_TYPES
from jaxserve.weights.gguf_reader import GgufReader

_POST = {"attn_output_norm": "attn_norm", "layer_output_norm": "ffn_norm"}
_FIXED = {"head_dim": None, "num_key_value_heads": None, "attention_bias": None}


def _encoder(reader: GgufReader, values: Values) -> Values:
    if reader.flag("attention.causal", False):
        raise ConfigError("attention.causal=true: this architecture is read as an encoder, which sees texts as a whole")
    return {"type_vocab_size": reader.num_rows(TOKEN_TYPES)}


def _bert(reader: GgufReader, values: Values) -> Values:
    """BERT, and RoBERTa whose positions the converter has cut to begin at 0."""
    return _encoder(reader, values) | {"hidden_act": "gelu"}


ENCODERS: Mapping[str, GgufFamily] = types.MappingProxyType(
    {
        "bert": GgufFamily(
            architecture="BertModel", renamed=_POST, keys={"rms_norm_eps": "layer_norm_eps"}, config=_bert,
            fixed=_FIXED | {"rope_parameters": None, "mlp_bias": None},
        ),
        "nomic-bert": GgufFamily(
            architecture="NomicBertModel", renamed=_POST, keys={"rms_norm_eps": "layer_norm_eps"}, config=_encoder, fixed=_FIXED
        ),
    }
)  # fmt: skip
