"""The contract of the product, in plain jnp; XLA's own product where no kernel is better."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """x [T, D] times weight [F, D] -> [T, F], in `dtype` (default: x's)."""
    return jnp.einsum("td,fd->tf", x, weight, preferred_element_type=dtype)
