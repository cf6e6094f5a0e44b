"""The grouped matrix product on TPUs: jax.lax.ragged_dot, which XLA compiles to a Mosaic kernel of its own.

It reads each matrix that has rows once, takes tiles that fit the chip (of 2048 x 1408 weights, 2048 x 640 on v4 to v5p and all of them on
v6e and tpu7x) and needs no temporary of the weights' size. What the compilers of the five chips count for 64 experts of 2048 x 1408 in
bfloat16, beside the least possible and jax.experimental.pallas.ops.tpu.megablox with the best tiles of those tried:

    rows    least     ragged_dot         megablox
     384    372 MB    376 .. 382 MB      400 .. 409 MB
    4096    397 MB    444 .. 511 MB      579 .. 649 MB

So megablox, which also needs the rows to be a multiple of its tile and leaves padding uninitialised, earns no place here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(x: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """See reference.py."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # else float32 is rounded to bfloat16
    out = jax.lax.ragged_dot(x, weights, group_sizes, precision=precision, preferred_element_type=jnp.float32)
    # What is in the rows that no expert owns, is not specified; a select keeps NaN out, a product would not.
    valid = jnp.arange(x.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes)
    return jnp.where(valid[:, None], out, 0).astype(x.dtype)
