"""Whole engine steps of published models, compiled for one chip that need not be there: in place, no copies, little beside the weights."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import make_config
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner.memory import num_bytes
from jaxserve.runner.programs import Programs, Target
from tests.kernels import aot
from tests.runner.hlo_traffic import hbm_bytes

HBM = {"v6e": 32 << 30, "sm_90": 141_000_000_000}  # one TPU v6e chip, one H200
NUM_PAGES = {"llama": 4096, "mpt": 1024, "bge": 1024}  # of 16 tokens: 8 GiB of cache; 1.5 GiB for the encoder


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
MODELS = {"llama": LLAMA_8B, "mpt": MPT_7B, "bge": BGE_LARGE}


@functools.cache
def compiled(
    chip: str, kind: str, tokens: int, model: str = "llama", layers: int = 32, loop: str = "auto"
) -> tuple[Programs, jax.stages.Compiled]:
    mesh = aot.tpu_mesh(chip) if chip in aot.TPUS else aot.gpu_mesh(chip)
    config = make_config({"max_len": 2048, "decode_rows": (64, 256), "prefill_tokens": (512, 2048), "layer_loop": loop})
    given = HfConfig(MODELS[model])
    spec = find_family(given).spec(given)
    spec = dataclasses.replace(spec, layers=spec.layers[:layers])
    programs = Programs(spec, config, Target(platform="tpu" if chip in aot.TPUS else "gpu", sharding=NamedSharding(mesh, PartitionSpec())))
    (shape,) = (shape for shape in programs.shapes if shape.kind == kind and shape.tokens == tokens)
    with aot.compiling_for(mesh):
        return programs, programs.lower_step(shape, NUM_PAGES[model]).compile()


def text_of(executable: jax.stages.Compiled) -> str:
    text = executable.as_text()
    assert text is not None, "these compilers always give one"
    return text


@pytest.mark.aot
@pytest.mark.parametrize("chip", HBM)
@pytest.mark.parametrize(
    ("model", "kind", "tokens"),
    [
        *((model, *step) for model in ("llama", "mpt") for step in (("decode", 64), ("decode", 256), ("prefill", 512), ("prefill", 2048))),
        ("bge", "pool", 2048),
    ],
)
def test_step_is_in_place_on_one_chip(model: str, kind: str, tokens: int, chip: str) -> None:
    programs, executable = compiled(chip, kind, tokens, model)
    memory = aot.memory_of(executable)
    cache = jax.tree.leaves(programs.cache_shapes(NUM_PAGES[model]))
    assert memory.alias_size_in_bytes >= num_bytes(cache)
    assert memory.temp_size_in_bytes < 0.02 * HBM[chip]
    text = text_of(executable)
    for leaf in cache:
        shape = re.escape(f"bf16[{','.join(map(str, leaf.shape))}]")
        assert not re.findall(rf"= \(?{shape}\S* (?:copy|copy-start|dynamic-slice|dynamic-update-slice|fusion|transpose)\(.*", text)
    assert "all-gather" not in text


@pytest.mark.aot
def test_decode_step_of_llama_8b_moves_little_beside_its_weights() -> None:
    """Two and four layers, written out, tell what 32 take: loops are counted once. Contexts are data and come on top."""
    moved, weights = [], []
    for layers in (2, 4):
        programs, executable = compiled("v6e", "decode", 64, layers=layers, loop="unroll")
        (cache,) = {leaf.shape for leaf in jax.tree.leaves(programs.cache_shapes(NUM_PAGES["llama"]))}
        moved.append(sum(hbm_bytes(text_of(executable), but_not=cache).values()))
        weights.append(num_bytes(leaf for name, leaf in programs.param_shapes.items() if name != "embed.weight"))
    of_32_layers = [two + 15 * (four - two) for two, four in (moved, weights)]
    assert of_32_layers[0] <= 1.05 * of_32_layers[1]
