"""Every implementation of the grouped matrix product against a loop in numpy, and what the TPU and GPU compilers make of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, gpu, grouped_matmul, tpu
from pallas_kernels.grouped_matmul.cases import CASES, Case, make_inputs
from tests.compiling import COMPILER_OPTIONS
from tests.kernels import aot


def by_hand(x: np.ndarray, weights: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """The definition, an expert at a time, in float64."""
    out = np.zeros((x.shape[0], weights.shape[2]))
    start = 0
    for expert, size in enumerate(group_sizes):
        out[start : start + size] = x[start : start + size].astype(np.float64) @ weights[expert].astype(np.float64)
        start += size
    return out


def roomy(case: Case) -> Case:
    """With padding and experts without rows up to sizes that many cases share: what is interpreted runs fast and compiles slowly."""
    sizes = (*case.group_sizes, *[0] * (16 - len(case.group_sizes)))
    return dataclasses.replace(case, group_sizes=sizes, padding=88 - sum(sizes))


@functools.cache
def jitted(implementation: str) -> Any:
    options = COMPILER_OPTIONS if implementation == "gpu" else None  # compiles faster
    return jax.jit(functools.partial(grouped_matmul, implementation=implementation), compiler_options=options)


def run(implementation: str, *arrays: Any) -> np.ndarray:
    out = jitted(implementation)(*arrays)
    assert out.dtype == arrays[0].dtype
    return np.asarray(out, np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_product_equals_the_definition(case: Case, implementation: str) -> None:
    if implementation == "gpu" and case.name not in ("one row", "odd widths"):
        case = roomy(case)
    inputs = make_inputs(case)
    np.testing.assert_allclose(run(implementation, *inputs), by_hand(*inputs), atol=2e-5, rtol=2e-5)  # float32 sums of 24 products


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation: str) -> None:
    case = Case(name="long sums", group_sizes=(3, 0, 9), num_in=512, padding=2)
    x, weights, group_sizes = make_inputs(case)
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (x, weights)]
    exact = by_hand(np.asarray(narrow[0], np.float32), np.asarray(narrow[1], np.float32), group_sizes)
    out = run(implementation, *narrow, group_sizes)
    np.testing.assert_allclose(out, exact, rtol=2**-8, atol=1e-3)  # only the result is rounded; bfloat16 sums would be off by 1 and more


@given(st.data())
def test_xla_equals_the_definition_on_random_groups(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(0, 12), min_size=6, max_size=6)))
    inputs = make_inputs(Case(name="random", group_sizes=sizes, padding=72 - sum(sizes)), seed=data.draw(st.integers(0, 99)))
    np.testing.assert_allclose(run("xla", *inputs), by_hand(*inputs), atol=2e-5, rtol=2e-5)


def test_gpu_row_is_the_same_in_any_company() -> None:
    """Bit for bit, wherever it lies in its expert's tile, and beside rows of NaN; over two whole steps of depth and a part of one."""
    case = roomy(Case(name="company", group_sizes=(2, 21, 0, 5), num_in=72))
    x, weights, group_sizes = make_inputs(case)
    together = run("gpu", x, weights, group_sizes)
    np.testing.assert_allclose(together, by_hand(x, weights, group_sizes), atol=5e-5, rtol=5e-5)  # float32 sums of 72 products
    for expert, row, place in ((0, 1, 0), (1, 2, 7), (1, 22, 30), (3, 27, 15)):
        others, sizes = np.full_like(x, np.nan), np.zeros_like(group_sizes)
        others[place], sizes[expert] = x[row], place + 1
        np.testing.assert_array_equal(run("gpu", others, weights, sizes)[place], together[row])


def test_gpu_refuses_two_dtypes_and_the_dispatcher_takes_plain_xla() -> None:
    x, weights, group_sizes = make_inputs(CASES[2])
    mixed = jnp.asarray(x), jnp.asarray(weights, jnp.bfloat16), jnp.asarray(group_sizes)
    with pytest.raises(NotImplementedError, match="weights of bfloat16 for rows of float32"):
        gpu.grouped_matmul(*mixed)
    expected = by_hand(x, np.asarray(mixed[1], np.float32), group_sizes)
    np.testing.assert_allclose(grouped_matmul(*mixed, platform="cuda"), expected, atol=2e-5, rtol=2e-5)


@given(st.lists(st.integers(0, 300), min_size=2, max_size=9), st.sampled_from([16, 32, 128]))
def test_gpu_grid_holds_every_row_block(sizes: list[int], rows: int) -> None:
    *experts, padding = sizes
    blocks = gpu.num_row_blocks(sum(sizes), len(experts), rows)
    assert sum(-(-size // rows) for size in (*experts, padding)) <= blocks <= sum(sizes)


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_tiles_fit_the_chip_and_hold_the_rows_of_a_decode(dtype: str, shared_kib: int) -> None:
    chip = dataclasses.replace(tuning.SMALLEST_GPU, shared_bytes=shared_kib * tuning.KIB)
    depths = set()
    for mean, rows in ((1, 16), (8, 16), (16, 32), (32, 64), (64, 128), (512, 128)):
        tiles = gpu.choose_tiles(8 * mean, 8, 4096, jnp.dtype(dtype), chip)
        assert tiles.rows == (rows if dtype == "bfloat16" else min(rows, 32))
        assert tiles.shared_bytes(jnp.dtype(dtype).itemsize) <= chip.shared_bytes
        assert tiles.stages >= gpu.LEAST_STAGES
        assert tiles.columns >= gpu.LEAST_TILE
        depths.add(tiles.depth)
    assert len(depths) == 1


# --- the compiler


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A product to compile; the bound is on the compiler's count of bytes over the least possible."""

    name: str
    T: int
    E: int
    D: int
    F: int
    dtype: Any = jnp.bfloat16
    traffic: float = 1.35

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Rows, weights and group sizes."""
        Shape = jax.ShapeDtypeStruct
        weights = Shape((self.E, self.D, self.F), self.dtype)
        return Shape((self.T, self.D), self.dtype), weights, Shape((self.E,), jnp.int32)


TARGETS = (
    Compiled(name="mixtral 8x7B decode, up", T=128, E=8, D=4096, F=14336, traffic=1.05),
    Compiled(name="deepseek V2 lite decode, up", T=384, E=64, D=2048, F=1408, traffic=1.05),
    Compiled(name="deepseek V2 lite decode, down", T=384, E=64, D=1408, F=2048, traffic=1.05),
    Compiled(name="deepseek V2 lite prefill, up", T=4096, E=64, D=2048, F=1408),
    Compiled(name="qwen3 30B-A3B decode of one row, gate and up", T=8, E=128, D=2048, F=1536, traffic=1.05),
    Compiled(name="gpt-oss 20B, widths of 2880", T=256, E=32, D=2880, F=5760, traffic=1.05),
    Compiled(name="float32", T=64, E=16, D=1024, F=512, dtype=jnp.float32, traffic=1.05),
)


@pytest.mark.aot
@pytest.mark.parametrize("call", TARGETS, ids=lambda call: call.name)
@pytest.mark.parametrize("target", aot.TPUS)
def test_product_compiles_to_one_pass_over_the_weights(target: str, call: Compiled) -> None:
    executable = aot.compile_for(aot.tpu_mesh(target), tpu.grouped_matmul, call.arguments())
    assert "ragged_dot_tiling" in aot.text_of(executable)  # XLA's kernel, not a product of every row with every matrix
    item = jnp.dtype(call.dtype).itemsize
    activations = call.T * (call.D + call.F)
    assert aot.memory_of(executable).temp_size_in_bytes <= 2 * activations * 4 + (1 << 20)
    cost = executable.cost_analysis()
    assert cost is not None
    assert cost["bytes accessed"] <= call.traffic * (call.E * call.D * call.F + activations) * item


GPU_TARGETS = (
    Compiled(name="mixtral 8x7B decode, gate and up", T=128, E=8, D=4096, F=28672),
    Compiled(name="mixtral 8x7B prefill, down", T=4096, E=8, D=14336, F=4096),
    Compiled(name="qwen3 30B-A3B decode of one row, gate and up", T=8, E=128, D=2048, F=1536),
    Compiled(name="qwen3 30B-A3B prefill, down", T=16384, E=128, D=768, F=2048),
    Compiled(name="gpt-oss 20B decode, gate and up, widths of 2880", T=256, E=32, D=2880, F=5760),
    Compiled(name="gpt-oss 20B prefill, down, widths of 2880", T=8192, E=32, D=2880, F=2880),
    Compiled(name="deepseek V3 decode, weights of 15 GB", T=512, E=256, D=7168, F=4096),
    Compiled(name="float32, no whole tiles", T=64, E=16, D=1000, F=500, dtype=jnp.float32),
)


@pytest.mark.aot
@pytest.mark.parametrize("call", GPU_TARGETS, ids=lambda call: call.name)
@pytest.mark.parametrize("target", aot.GPUS)
def test_gpu_kernel_compiles_without_temporaries(target: str, call: Compiled) -> None:
    executable = aot.compile_for(aot.gpu_mesh(target), gpu.grouped_matmul, call.arguments())
    assert "grouped_matmul" in aot.text_of(executable)
    assert aot.memory_of(executable).temp_size_in_bytes <= 64 * tuning.KIB  # which block is whose; nothing of the rows' or weights' size
    assert not aot.copies_of(call.arguments()[:2], executable, any_shape=False)
