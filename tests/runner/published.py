"""Published models whose whole steps are compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import make_config
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner.programs import Programs, Target
from tests.kernels import aot

LLAMA_8B: dict[str, Any] = {  # meta-llama/Llama-3.1-8B's config.json
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
MPT_7B: dict[str, Any] = {  # mosaicml/mpt-7b's config.json
    "architectures": ["MPTForCausalLM"], "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2048,
    "expansion_ratio": 4, "no_bias": True, "norm_type": "low_precision_layernorm",
    "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention", "clip_qkv": None, "prefix_lm": False, "qk_ln": False,
        "softmax_scale": None,
    },
}  # fmt: skip
BGE_LARGE: dict[str, Any] = {  # BAAI/bge-large-en-v1.5's config.json
    "architectures": ["BertModel"], "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
    "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
}  # fmt: skip

MPNET_BASE: dict[str, Any] = {  # sentence-transformers/all-mpnet-base-v2's config.json
    "architectures": ["MPNetModel"], "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "vocab_size": 30527, "max_position_embeddings": 514, "relative_attention_num_buckets": 32, "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "pad_token_id": 1,
}  # fmt: skip


def one_chip(name: str) -> Target:
    """A chip of a kind, a key of aot.TPUS or aot.GPUS."""
    return Target(platform="tpu" if name in aot.TPUS else "gpu", sharding=NamedSharding(aot.mesh_for(name), PartitionSpec()))


def make_programs(model: dict[str, Any], target: Target, *, num_layers: int | None = None, **config: Any) -> Programs:
    """The programs of a model, or of its first layers."""
    given = HfConfig(model)
    spec = find_family(given).spec(given)
    return Programs(dataclasses.replace(spec, layers=spec.layers[:num_layers]), make_config({"max_len": 2048, **config}), target)


def compile_step(programs: Programs, chip: str, kind: str, tokens: int, num_pages: int) -> tuple[jax.stages.Compiled, ...]:
    """The programs of a step of a kind and size, all of whose rows sample, for the chip that they are for: one where vectors are made."""
    (shape,) = (shape for shape in programs.shapes if shape.kind == kind and shape.tokens == tokens)
    with aot.compiling_for(aot.mesh_for(chip)):
        step = programs.lower_step(shape, num_pages).compile()
        return (step,) if kind == "pool" else (step, programs.lower_sample(shape.rows).compile())
