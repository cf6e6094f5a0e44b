"""Whole steps of published models, compiled for slices of TPUs that need not be there: they fit, two all-reduces a layer, in place."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import pytest

from jaxserve.config import make_config
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner.memory import num_bytes
from jaxserve.runner.programs import Programs, Target
from jaxserve.sharding import Split, mesh_of, one_copy
from tests.kernels import aot
from tests.models.test_moe_published import PUBLISHED
from tests.runner.test_programs_aot import LLAMA_8B, MPT_7B, text_of

GIB = 1 << 30
HBM = {"v5e": 16 * GIB, "v6e": 32 * GIB}
LLAMA_70B: dict[str, Any] = LLAMA_8B | {  # meta-llama/Llama-3.3-70B-Instruct's config.json
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80,
}  # fmt: skip
MPT_30B: dict[str, Any] = MPT_7B | {"d_model": 7168, "n_heads": 64, "n_layers": 48, "max_seq_len": 8192}  # mosaicml/mpt-30b's config.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a slice.

    Args:
      num_pages: of 16 tokens, each with the KV heads of one chip.
    """

    model: dict[str, Any]
    slice: str
    split: Split
    num_pages: int


CASES = {
    "llama-3.1-8b on v6e-8": Case(model=LLAMA_8B, slice="v6e:2x4", split=Split(tensor=8), num_pages=16384),
    "llama-3.3-70b on v6e-8": Case(model=LLAMA_70B, slice="v6e:2x4", split=Split(tensor=8), num_pages=8192),
    "llama-3.3-70b on v5e-16": Case(model=LLAMA_70B, slice="v5e:4x4", split=Split(tensor=16), num_pages=4096),
    "mixtral-8x7b on v6e-8": Case(model=PUBLISHED["Mixtral-8x7B"][2], slice="v6e:2x4", split=Split(expert=8), num_pages=8192),
    "mpt-30b on v5e-8": Case(model=MPT_30B, slice="v5e:2x4", split=Split(tensor=8), num_pages=512),
}


@functools.cache
def compiled(name: str, kind: str, tokens: int) -> tuple[Programs, jax.stages.Compiled]:
    case = CASES[name]
    config = make_config({"max_len": 2048, "decode_rows": (64,), "prefill_tokens": (2048,)})
    given = HfConfig(case.model)
    target = Target(platform="tpu", sharding=one_copy(aot.tpu_devices(case.slice), case.split))
    programs = Programs(find_family(given).spec(given), config, target)
    (shape,) = (shape for shape in programs.shapes if shape.kind == kind and shape.tokens == tokens)
    mesh = mesh_of(target.sharding)
    assert mesh is not None, f"{case.split=}"
    with aot.compiling_for(mesh):
        return programs, programs.lower_step(shape, case.num_pages).compile()


def collectives(text: str) -> dict[str, int]:
    """Collectives in a program, a loop's once."""
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


@pytest.mark.aot
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("kind", "tokens"), [("decode", 64), ("prefill", 2048)])
def test_step_fits_a_slice(name: str, kind: str, tokens: int) -> None:
    programs, executable = compiled(name, kind, tokens)
    memory, hbm = aot.memory_of(executable), HBM[CASES[name].slice.partition(":")[0]]
    cache = jax.tree.leaves(programs.cache_shapes(CASES[name].num_pages))
    assert memory.alias_size_in_bytes >= num_bytes(cache)
    assert memory.temp_size_in_bytes < 0.02 * hbm
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.95 * hbm
    # Two in the loop over layers, one after the embedding; the logits are gathered.
    assert collectives(text_of(executable)) == {"all-gather": 1, "all-reduce": 3}
