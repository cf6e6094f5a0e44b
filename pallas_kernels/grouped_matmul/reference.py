"""The contract of the grouped matrix product, in plain jnp: obvious, slow, and right.

Rows of x lie sorted by expert: expert e owns the group_sizes[e] rows after those of the experts before it.

Weights are [E, D, F], in before out. That is what jax.lax.ragged_dot multiplies without a copy on a TPU; of weights [E, F, D], as most
checkpoints have one per expert, it first transposes every expert's at every call: 0.37 GB of temporaries and three times the traffic for 64
experts of 2048 x 1408 in bfloat16. Experts are stacked when they are loaded, which touches every number anyway.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Each row of x times the matrix of the expert that owns it, accumulated in float32.

    Args:
      x: [T, D] bfloat16 or float32, sorted by expert.
      weights: [E, D, F] in x's dtype.
      group_sizes: i32[E], rows of each expert, 0 for those without; their sum is at most T. Rows from the sum on are padding: they may
        hold anything, NaN too.
    Returns: [T, F] in x's dtype; zero in the rows of padding.
    """
    expert = row_experts(x.shape[0], group_sizes)
    valid = expert < weights.shape[0]
    x = jnp.where(valid[:, None], x, 0)  # 0 * NaN is NaN
    own = weights[jnp.minimum(expert, weights.shape[0] - 1)]  # [T, D, F]
    return jnp.einsum("td,tdf->tf", x.astype(jnp.float32), own.astype(jnp.float32), precision="highest").astype(x.dtype)


def row_experts(T: int, group_sizes: jax.Array) -> jax.Array:
    """Expert i32[T] of each row; E for padding."""
    row = jnp.arange(T, dtype=jnp.int32)
    return jnp.searchsorted(jnp.cumsum(group_sizes), row, side="right", method="compare_all").astype(jnp.int32)
