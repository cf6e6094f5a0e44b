"""Matrix products with weights stored [out, in], as checkpoints have them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

_WEIGHTS_FIRST_ROWS = 256  # a step of 256 rows of SmolLM2-135M takes 373 against 383 ms, one of 512 rows 864 against 801 ms


class Linear(nnx.Module):
    """y = x W^T (+ b).

    Args:
      num_in, num_out: features.
      bias: whether there is a b.
      repeats: R of the layer group; the parameter is [R, num_out, num_in] until the layer loop slices it.
    """

    def __init__(self, num_in: int, num_out: int, *, bias: bool, repeats: int, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jax.ShapeDtypeStruct((repeats, num_out, num_in), dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((repeats, num_out), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, num_in] to [T, num_out]."""
        y = matmul(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


def matmul(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [T, D] times weight [F, D] -> [T, F], in `dtype` (default: x's), accumulated in float32."""
    return jax.lax.platform_dependent(
        x, weight, cpu=functools.partial(_weights_first, dtype=dtype), default=functools.partial(_rows_first, dtype=dtype)
    )


def _rows_first(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None) -> jax.Array:
    return jnp.einsum("td,fd->tf", x, weight, preferred_element_type=dtype)


def _weights_first(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None) -> jax.Array:
    """The product that XLA's CPU library runs fastest, up to twice as fast as rows first at 8 to 32 rows.

    The barrier keeps XLA from folding the transpose back into the slow form. With many rows the transposes cost more than they save.
    """
    if x.shape[0] == 1 or x.shape[0] > _WEIGHTS_FIRST_ROWS:
        return _rows_first(x, weight, dtype=dtype)
    product = jnp.matmul(weight, x.T, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(product).T
