"""Every implementation of the grouped matrix product against a loop in numpy, and what the TPU compiler makes of it."""

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

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, tpu
from pallas_kernels.grouped_matmul.cases import CASES, Case, make_inputs
from tests.kernels import aot


def by_hand(x: np.ndarray, weights: np.ndarray, group_sizes: np.ndarray) -> np.ndarray:
    """The definition, an expert at a time, in float64."""
    out = np.zeros((x.shape[0], weights.shape[2]))
    start = 0
    for expert, size in enumerate(group_sizes):
        out[start : start + size] = x[start : start + size].astype(np.float64) @ weights[expert].astype(np.float64)
        start += size
    return out


@functools.cache
def jitted(implementation: str) -> Any:
    return jax.jit(functools.partial(grouped_matmul, implementation=implementation))


def run(implementation: str, *arrays: Any) -> np.ndarray:
    out = jitted(implementation)(*arrays)
    assert out.dtype == arrays[0].dtype
    return np.asarray(out, np.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_product_equals_the_definition(case: Case, implementation: str) -> None:
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
    Shape = jax.ShapeDtypeStruct
    arguments = (Shape((call.T, call.D), call.dtype), Shape((call.E, call.D, call.F), call.dtype), Shape((call.E,), jnp.int32))
    executable = aot.compile_for(aot.tpu_mesh(target), tpu.grouped_matmul, arguments)
    assert "ragged_dot_tiling" in aot.text_of(executable)  # XLA's kernel, not a product of every row with every matrix
    item = jnp.dtype(call.dtype).itemsize
    activations = call.T * (call.D + call.F)
    assert aot.memory_of(executable).temp_size_in_bytes <= 2 * activations * 4 + (1 << 20)
    cost = executable.cost_analysis()
    assert cost is not None
    assert cost["bytes accessed"] <= call.traffic * (call.E * call.D * call.F + activations) * item
