"""Whole steps of models with experts and with latent attention, compiled for one chip: in place, and no weights are copied."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import make_config
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner.memory import num_bytes
from jaxserve.runner.programs import Programs, Target
from tests.kernels import aot
from tests.models.test_moe_published import PUBLISHED

CHIPS = ("v6e", "sm_90")
NUM_PAGES = 1024
LAYERS = 4  # they fold into groups as all layers do: those of DeepSeek into a dense one and three with experts


@functools.cache
def compiled(chip: str, kind: str, tokens: int, model: str) -> tuple[Programs, jax.stages.Compiled]:
    mesh = aot.tpu_mesh(chip) if chip in aot.TPUS else aot.gpu_mesh(chip)
    config = make_config({"max_len": 2048, "decode_rows": (64,), "prefill_tokens": (512,), "max_rows": 64, "max_step_tokens": 512})
    given = HfConfig(PUBLISHED[model][2])
    spec = find_family(given).spec(given)
    spec = dataclasses.replace(spec, layers=spec.layers[:LAYERS])
    programs = Programs(spec, config, Target(platform="tpu" if chip in aot.TPUS else "gpu", sharding=NamedSharding(mesh, PartitionSpec())))
    (shape,) = (shape for shape in programs.shapes if shape.kind == kind and shape.tokens == tokens)
    with aot.compiling_for(mesh):
        return programs, programs.lower_step(shape, NUM_PAGES).compile()


@pytest.mark.aot
@pytest.mark.parametrize("model", ["Mixtral-8x7B", "gpt-oss-20b", "DeepSeek-V2-Lite"])
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("kind", "tokens"), [("decode", 64), ("prefill", 512)])
def test_step_is_in_place_and_copies_no_weights(kind: str, tokens: int, chip: str, model: str) -> None:
    programs, executable = compiled(chip, kind, tokens, model)
    memory, cache = aot.memory_of(executable), jax.tree.leaves(programs.cache_shapes(NUM_PAGES))
    assert memory.alias_size_in_bytes >= num_bytes(cache)
    experts = [leaf for path, leaf in programs.param_shapes.items() if re.search(r"experts\.(gate_up|down)$", path)]
    assert experts
    of_a_layer = max(num_bytes([leaf]) // leaf.shape[0] for leaf in experts)
    assert memory.temp_size_in_bytes < of_a_layer
    text = executable.as_text()
    assert text is not None
    for leaf in (*cache, *experts):
        shape = re.escape(f"bf16[{','.join(map(str, leaf.shape))}]")
        assert not re.findall(rf"= \(?{shape}\S* (?:copy|copy-start|dynamic-slice|dynamic-update-slice|transpose)\(.*", text)
