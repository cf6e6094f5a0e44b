"""Every preset of configs/ as its machine would start it, and its largest steps compiled for devices that need not be there.

Weights, cache and temporaries fit, the cache is updated in place, and devices that share a model exchange no more than they must.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxserve.command_line import parse_args
from jaxserve.errors import ConfigError
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.runner import mesh
from jaxserve.runner.memory import num_bytes
from jaxserve.runner.mesh import MeshPlan, plan_mesh
from jaxserve.runner.programs import Programs, Target
from jaxserve.runner.runner import Runner
from jaxserve.sharding import mesh_of
from tests.kernels import aot
from tests.models.test_moe_published import PUBLISHED
from tests.runner.hlo_traffic import layer_bytes
from tests.runner.published import LLAMA_8B, MPT_7B

ROOT = pathlib.Path(__file__).parents[2]
GIB = 1 << 30
# What programs may take of a device, and how many of them: a TPU keeps 0.25 GiB for itself, a GPU is told to jax without what drivers take.
MACHINES: dict[str, tuple[str, int, int]] = {
    "v5e-1": ("v5e:2x2", 1, 15_750 * GIB // 1000),
    "v5e-8": ("v5e:2x4", 8, 15_750 * GIB // 1000),
    "v5e-16": ("v5e:4x4", 16, 15_750 * GIB // 1000),
    "v6e-1": ("v6e:2x2", 1, 31_250 * GIB // 1000),
    "v6e-8": ("v6e:2x4", 8, 31_250 * GIB // 1000),
    "v5p-4": ("v5p:2x2x1", 4, 95_000 * GIB // 1000),
    "h100": ("sm_90", 1, 79 * GIB),
    "h200": ("sm_90", 1, 139 * GIB),
    "h200-8": ("sm_90", 8, 139 * GIB),
    "cpu": ("cpu", 1, 16 * GIB),
}
SMOLLM2_135M: dict[str, Any] = {  # HuggingFaceTB/SmolLM2-135M-Instruct's config.json
    "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_3B: dict[str, Any] = LLAMA_8B | {  # meta-llama/Llama-3.2-3B-Instruct's config.json
    "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_hidden_layers": 28, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_70B: dict[str, Any] = LLAMA_8B | {  # meta-llama/Llama-3.3-70B-Instruct's config.json
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80,
}  # fmt: skip
MPT_30B: dict[str, Any] = MPT_7B | {"d_model": 7168, "n_heads": 64, "n_layers": 48, "max_seq_len": 8192}  # mosaicml/mpt-30b's config.json
MODELS = {
    "SmolLM2-135M": SMOLLM2_135M, "Llama-3.2-3B": LLAMA_3B, "Llama-3.1-8B": LLAMA_8B, "Llama-3.3-70B": LLAMA_70B, "MPT-30B": MPT_30B,
    "Mixtral-8x7B": PUBLISHED["Mixtral-8x7B"][2],
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model that a preset is for.

    Args:
      options: beside those of the preset.
      mesh: devices along data, expert and tensor.
      kinds: of steps that are compiled, the largest of each.
      traffic: bytes that a layer moves in the largest decode step, without the cache, over the bytes of its weights; where layers are a
        loop, and recorded: more is a loss of speed, less is to be written down here and in docs/parallelism.md.
    """

    preset: str
    model: str
    options: tuple[str, ...] = ()
    mesh: tuple[int, int, int] = (1, 1, 1)
    kinds: tuple[str, ...] = ("decode", "prefill")
    traffic: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        return " ".join((self.model, "on", self.preset, *self.options))

    @property
    def writes_layers_out(self) -> bool:
        """Whether each layer is compiled anew, so that the first two must do."""
        return MACHINES[self.preset][0] in ("cpu", *aot.GPUS)


CASES = (
    Case(preset="cpu", model="SmolLM2-135M"),
    Case(preset="v5e-1", model="Llama-3.2-3B", traffic=1.0),
    Case(preset="v6e-1", model="Llama-3.1-8B", traffic=1.02),
    Case(preset="v5e-8", model="MPT-30B", mesh=(1, 1, 8), traffic=1.0),
    Case(preset="v6e-8", model="Llama-3.1-8B", mesh=(1, 1, 8), kinds=("decode",), traffic=1.05),
    Case(preset="v6e-8", model="Llama-3.3-70B", mesh=(1, 1, 8), traffic=1.08),
    Case(preset="v6e-8", model="Mixtral-8x7B", mesh=(1, 1, 8), kinds=("decode",), traffic=1.0),
    Case(preset="v6e-8", model="Mixtral-8x7B", options=("--mesh", "expert=8"), mesh=(1, 8, 1), kinds=("decode",), traffic=1.0),
    Case(preset="v5p-4", model="Llama-3.3-70B", mesh=(1, 1, 4), traffic=1.18),
    Case(preset="v5e-16", model="Llama-3.3-70B", mesh=(1, 1, 16), traffic=1.0),
    Case(preset="h100", model="Llama-3.1-8B"),
    Case(preset="h200", model="Llama-3.1-8B"),
    Case(preset="h200-8", model="Llama-3.3-70B", mesh=(1, 1, 8)),
)
TOO_LARGE = (("v5e-1", "Llama-3.1-8B"), ("v6e-1", "Llama-3.3-70B"), ("v5e-8", "Llama-3.3-70B"), ("h100", "Llama-3.3-70B"))


def devices_of(preset: str) -> Sequence[Any]:
    target, count, _ = MACHINES[preset]
    if target == "cpu":
        return jax.devices("cpu")[:1]
    return (aot.gpu_devices(target, count) if target in aot.GPUS else aot.tpu_devices(target))[:count]


@functools.cache
def planned(preset: str, model: str, options: tuple[str, ...] = ()) -> tuple[MeshPlan, Runner]:
    """What a server decides at its start, before it reads any weight.

    Raises: ConfigError if the model does not fit.
    """
    config = parse_args(["--config", str(ROOT / "configs" / f"{preset}.toml"), "--max-len", "8192", *options])
    given = HfConfig(MODELS[model])
    family = find_family(given)
    spec = family.spec(given)
    with mock.patch.object(mesh, "device_bytes", return_value=MACHINES[preset][2]):
        plan = plan_mesh(config, spec, devices_of(preset))
    with compiling_for(plan.targets[0]):
        return plan, Runner(spec, family, config, plan.targets[0], eos_ids=frozenset())


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    with aot.compiling_for(mesh_of(target.sharding) or Mesh(np.array(list(target.sharding.device_set)), ("x",))):
        yield


@functools.cache
def compiled(case: Case, kind: str) -> tuple[Programs, jax.stages.Compiled]:
    """The largest decoder of a kind of step, with the pages that a server would have."""
    plan, runner = planned(case.preset, case.model, case.options)
    programs = runner._programs
    if case.writes_layers_out:
        programs = Programs(dataclasses.replace(runner._spec, layers=runner._spec.layers[:2]), runner._config, plan.targets[0])
    shape = max(shape for shape in programs.shapes if shape.kind == kind)
    with compiling_for(plan.targets[0]):
        return programs, programs.lower_step(shape, runner.memory.num_pages).compile()


@functools.cache
def compiled_sampler(case: Case) -> tuple[Programs, jax.stages.Compiled]:
    """Head and sampler for as many rows as there may be."""
    plan, runner = planned(case.preset, case.model, case.options)
    programs = runner._programs
    with compiling_for(plan.targets[0]):
        return programs, programs.lower_sample(max(programs.sample_sizes)).compile()


def collectives(text: str) -> dict[str, int]:
    """Collectives in a program, a loop's once."""
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(", text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


def step_cases() -> list[Any]:
    return [
        pytest.param(
            case, kind, id=f"{case.name}-{kind}", marks=[pytest.mark.slow] if kind == "prefill" and math.prod(case.mesh) > 1 else []
        )
        for case in CASES
        for kind in case.kinds
    ]  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize(("case", "kind"), step_cases())
def test_step_fits_the_machine_of_its_preset(case: Case, kind: str) -> None:
    plan, runner = planned(case.preset, case.model, case.options)
    programs, executable = compiled(case, kind)
    memory, total = aot.memory_of(executable), MACHINES[case.preset][2]
    assert (plan.data, plan.split.expert, plan.split.tensor) == case.mesh
    assert memory.alias_size_in_bytes >= num_bytes(jax.tree.leaves(programs.cache_shapes(runner.memory.num_pages)))
    if case.preset != "cpu":
        assert memory.temp_size_in_bytes < 0.02 * total
    if not case.writes_layers_out:
        assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 0.95 * total
    if plan.split.num_devices > 1:  # two a layer, one after the embedding
        num_layers = 2 if case.writes_layers_out else 1
        assert collectives(aot.text_of(executable)) == {"all-reduce": 2 * num_layers + 1}


@pytest.mark.aot
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sampler_fits_the_machine_of_its_preset(case: Case) -> None:
    programs, executable = compiled_sampler(case)
    memory, total = aot.memory_of(executable), MACHINES[case.preset][2]
    assert memory.alias_size_in_bytes >= num_bytes(jax.tree.leaves(programs.state_shapes))
    if case.preset != "cpu":  # the logits of 128,256 tokens are much for a chip of 16 GiB alone
        assert memory.temp_size_in_bytes < (0.03 if case.preset == "v5e-1" else 0.02) * total
    several = math.prod(case.mesh) > 1  # the logits are gathered
    assert collectives(aot.text_of(executable)) == ({"all-gather": 1} if several else {})


@pytest.mark.aot
@pytest.mark.parametrize("case", [case for case in CASES if case.traffic is not None], ids=lambda case: case.name)
def test_decode_step_moves_little_beside_its_weights(case: Case) -> None:
    programs, executable = compiled(case, "decode")
    (group,) = programs.groups
    (cache,) = jax.tree.leaves(programs.cache_shapes(planned(case.preset, case.model, case.options)[1].memory.num_pages))
    stacked = [leaf for path, leaf in programs.param_shapes.items() if path.startswith("groups.")]
    moved = layer_bytes(aot.text_of(executable), repeats=group.repeats, stacked={leaf.size for leaf in stacked}, cache=cache.size)
    times = sum(moved.values()) * group.repeats / num_bytes(stacked)
    print(f"{case.name}: {times:.3f} times the bytes of the weights")
    assert times == pytest.approx(case.traffic, rel=0.03)


@pytest.mark.aot
@pytest.mark.parametrize(("preset", "model"), TOO_LARGE, ids=[" on ".join(pair[::-1]) for pair in TOO_LARGE])
def test_model_that_does_not_fit_is_refused_with_what_it_needs(preset: str, model: str) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(preset, model)
    said = str(refused.value)
    assert all(f"  {part} " in said for part in ("weights", "cache", "sampling state", "temporaries")), said
    assert f"memory of one device: {MACHINES[preset][2] / GIB:.3f} GiB" in said


def test_every_preset_has_a_case() -> None:
    assert {case.preset for case in CASES} == {path.stem for path in (ROOT / "configs").glob("*.toml")} == set(MACHINES)


def test_documented_table_is_the_one_that_is_compiled() -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text("utf-8")
    for case in CASES:
        mesh_of_case, traffic = "x".join(map(str, case.mesh)), "" if case.traffic is None else f"{case.traffic:.2f}"
        assert f"| {case.model} | {case.preset} | {mesh_of_case} | {', '.join(case.kinds)} | {traffic} |\n" in page
    assert page.count(" | decode") == len(CASES)
