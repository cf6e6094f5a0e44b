"""Llama and the checkpoints that are Llamas by another name (SmolLM2, Yi, TinyLlama)."""

from __future__ import annotations

import dataclasses

from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.spec import LayerSpec, ModelSpec


def llama_layer(config: HfConfig) -> LayerSpec:
    """One layer of a Llama."""
    attention = parts.read_attention(config)
    attention = dataclasses.replace(attention, rope=parts.read_rope(config, attention.head_size))
    return LayerSpec(attention=attention, mlp=parts.read_mlp(config), norm=parts.rms_norm(config))


def llama_spec(config: HfConfig) -> ModelSpec:
    """The ModelSpec of a Llama config.

    Raises: ConfigError naming the key and value that is not understood.
    """
    config.get("pretraining_tp", 1)  # splits matrices during training, not their product
    return parts.read_model(config, llama_layer(config))


LLAMA = parts.llama_family(llama_spec, "LlamaForCausalLM")
