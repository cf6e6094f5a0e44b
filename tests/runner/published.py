"""Published models whose whole steps are compiled for devices that need not be there."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import make_config
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner.programs import Programs, Target
from tests.kernels import aot

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "models"
LLAMA_8B: dict[str, Any] = json.loads((_CONFIGS / "llama-3.1-8b.json").read_text())  # of meta-llama/Llama-3.1-8B
MPT_7B: dict[str, Any] = json.loads((_CONFIGS / "mpt-7b.json").read_text())  # of mosaicml/mpt-7b
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
