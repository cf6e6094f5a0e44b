"""The products for CPUs against the plain one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.matmul import matmul
from pallas_kernels.matmul.cpu import FEW_FEATURES, MANY_FEATURES, TOKENS
from pallas_kernels.native.tiles import DOT_COLUMNS, DOT_ROWS, LINE


def operands(T: int, D: int, F: int, *, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((T, D)), jnp.float32), jnp.asarray(rng.standard_normal((F, D)), jnp.float32)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@settings(max_examples=12)
@given(T=st.integers(1, 2 * DOT_ROWS + 1), vectors=st.integers(1, 3), F=st.integers(1, 2 * FEW_FEATURES + DOT_COLUMNS))
def test_equals_the_plain_product(implementation: str, T: int, vectors: int, F: int) -> None:
    x, weight = operands(T, vectors * LINE, F, seed=T * F)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(matmul(x, weight, implementation=implementation), expected, atol=1e-5, rtol=1e-5)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    T, D = TOKENS + DOT_ROWS + 3, 5 * LINE
    x, weight = operands(T, D, MANY_FEATURES + 2)
    together = np.asarray(matmul(x, weight, implementation="cpu"))
    for first, last in ((0, 1), (3, 5), (TOKENS - 1, TOKENS + 2), (T - 7, T)):
        np.testing.assert_array_equal(matmul(x[first:last], weight, implementation="cpu"), together[first:last])


def test_nan_and_infinity_stay_in_their_rows() -> None:
    x, weight = operands(5, LINE, 4)
    x = x.at[1, 0].set(jnp.nan).at[3, 0].set(jnp.inf)
    finite = np.isfinite(matmul(x, weight, implementation="cpu")).all(axis=1)
    np.testing.assert_array_equal(finite, [True, False, True, False, True])


@pytest.mark.parametrize(("dtype", "D"), [("bfloat16", LINE), ("float32", LINE + 1)])
def test_the_default_takes_what_the_kernel_refuses(dtype: str, D: int) -> None:
    x, weight = (array.astype(dtype) for array in operands(3, D, 4))
    with pytest.raises(NotImplementedError, match=dtype):
        matmul(x, weight, implementation="cpu")
    expected = matmul(x, weight, dtype=jnp.dtype("float32"), implementation="reference")
    np.testing.assert_allclose(jax.jit(lambda x, w: matmul(x, w, dtype=jnp.dtype("float32")))(x, weight), expected, atol=1e-5, rtol=1e-5)


def test_many_calls_at_once_do_not_wait_for_each_other_forever() -> None:
    x, weight = operands(TOKENS, 4 * LINE, 8 * FEW_FEATURES)
    call = jax.jit(lambda x, w: sum(matmul(x + i, w, implementation="cpu") for i in range(16)))
    expected = np.asarray(call(x, weight))
    for result in [call(x, weight) for _ in range(20)]:
        np.testing.assert_array_equal(result, expected)


def test_hosts_of_other_devices_compile_no_kernel_for_their_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = operands(3, LINE, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "ffi_call" not in str(jax.make_jaxpr(lambda: matmul(x, weight))())
    monkeypatch.undo()
    assert "ffi_call" in str(jax.make_jaxpr(lambda: matmul(x, weight))())
