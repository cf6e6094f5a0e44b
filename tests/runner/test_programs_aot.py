"""Whole engine steps of published models, compiled for one chip that need not be there: in place, no copies, little beside the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import pytest

from jaxserve.runner.memory import num_bytes
from jaxserve.runner.programs import Programs
from pallas_kernels import tuning
from tests.kernels import aot
from tests.runner.hlo_traffic import hbm_bytes, layer_bytes
from tests.runner.published import BGE_LARGE, LLAMA_8B, MPNET_BASE, MPT_7B, compile_step, make_programs, one_chip

HBM = {"v6e": 32 << 30, "sm_90": 141_000_000_000}  # one TPU v6e chip, one H200
MODELS = {"llama": LLAMA_8B, "mpt": MPT_7B, "bge": BGE_LARGE, "mpnet": MPNET_BASE}
NUM_PAGES = {"llama": 4096, "mpt": 1024, "bge": 1024, "mpnet": 1024}  # of 16 tokens: 8 GiB of cache; 1.5 GiB for the encoder


@functools.cache
def programs_for(chip: str, model: str) -> Programs:
    return make_programs(MODELS[model], one_chip(chip), decode_rows=(64, 256), prefill_tokens=(512, 2048))


def traffic(step: Sequence[jax.stages.Compiled], programs: Programs, chip: str, model: str) -> float:
    """Bytes that a step moves over those of the weights, read once. Contexts are data and come on top of both."""
    forward, cache = aot.text_of(step[0]), jax.tree.leaves(programs.cache_shapes(NUM_PAGES[model]))[0].size
    moved = sum(sum(hbm_bytes(aot.text_of(program), but_not=cache).values()) for program in step)
    if chip in aot.TPUS:  # where layers are a loop, elsewhere they are written out
        (repeats,) = {group.repeats for group in programs.groups}
        stacked = {leaf.size for path, leaf in programs.param_shapes.items() if path.startswith("groups.")}
        moved += repeats * sum(layer_bytes(forward, repeats=repeats, stacked=stacked, cache=cache).values())
    looked_up = {"embed.weight"} if "head.weight" in programs.param_shapes else set()
    return moved / num_bytes(leaf for name, leaf in programs.param_shapes.items() if name not in looked_up)


@pytest.mark.aot
@pytest.mark.parametrize("chip", HBM)
@pytest.mark.parametrize(
    ("model", "kind", "tokens"),
    [("llama", "decode", 64), ("llama", "prefill", 2048), ("mpt", "decode", 256), ("mpt", "prefill", 512), ("bge", "pool", 2048)],
)
def test_step_is_in_place_on_one_chip(model: str, kind: str, tokens: int, chip: str) -> None:
    programs = programs_for(chip, model)
    step = compile_step(programs, chip, kind, tokens, NUM_PAGES[model])
    forward, *samplers = step
    caches = jax.tree.leaves(programs.cache_shapes(NUM_PAGES[model]))
    aot.check_in_place(forward, caches, temporaries=0.02 * HBM[chip])
    for sampler in samplers:
        memory = aot.memory_of(sampler)
        assert memory.alias_size_in_bytes >= num_bytes(jax.tree.leaves(programs.state_shapes))
        assert memory.temp_size_in_bytes <= 0.02 * HBM[chip]
        assert not aot.copies_of([programs.param_shapes[path] for path in programs.head_paths], sampler, fusions=False, any_shape=False)
    assert all("all-gather" not in aot.text_of(program) for program in step)
    times = traffic(step, programs, chip, model)
    print(f"{chip}, {model}, {kind} {tokens}: {times:.3f} times the bytes of the weights")
    assert times <= 1.05 or kind != "decode" or chip not in aot.TPUS


@pytest.fixture
def hopper_is_faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if it had been measured; jax keeps what it has traced, and looks at arguments alone."""
    monkeypatch.setattr(tuning, "tuned", lambda device, op, key: {"mosaic": 1} if key.startswith("prefill") else None)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.aot
@pytest.mark.usefixtures("hopper_is_faster")
def test_prompts_go_to_the_kernel_for_hopper_where_it_was_measured_to_be_faster() -> None:
    programs = make_programs(LLAMA_8B, one_chip("sm_90"), num_layers=4, decode_rows=(64,), prefill_tokens=(2048,))
    forward, _ = compile_step(programs, "sm_90", "prefill", 2048, NUM_PAGES["llama"])
    aot.check_in_place(forward, jax.tree.leaves(programs.cache_shapes(NUM_PAGES["llama"])), temporaries=0.02 * HBM["sm_90"])
    assert aot.text_of(forward).count("prefill_hopper") >= 4


@pytest.mark.aot
@pytest.mark.parametrize("chip", HBM)
def test_bias_by_distance_fits_in_plain_xla(chip: str) -> None:
    """MPNet's; without a kernel the cache, of two steps for an encoder, is copied where it is written, and padded on a TPU."""
    programs = programs_for(chip, "mpnet")
    (step,) = compile_step(programs, chip, "pool", 512, NUM_PAGES["mpnet"])
    memory = aot.memory_of(step)
    assert memory.alias_size_in_bytes >= num_bytes(jax.tree.leaves(programs.cache_shapes(NUM_PAGES["mpnet"])))
    assert memory.temp_size_in_bytes < (0.15 if chip in aot.TPUS else 0.02) * HBM[chip]


@pytest.mark.aot
@pytest.mark.parametrize("chip", HBM)
@pytest.mark.parametrize("program", ["lower_seed_slot", "lower_set_masks"])
def test_sampling_state_is_updated_in_place(program: str, chip: str) -> None:
    """What a request brings along, and the masks of constrained decoding: 256 slots of Llama's vocabulary, whose counts take 131 MB."""
    programs = programs_for(chip, "llama")
    with aot.compiling_for(aot.mesh_for(chip)):
        executable = getattr(programs, program)().compile()
    memory, state = aot.memory_of(executable), programs.state_shapes
    assert memory.alias_size_in_bytes >= num_bytes(jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < num_bytes([state.mask])  # 4 MB, which a TPU takes into its VMEM
