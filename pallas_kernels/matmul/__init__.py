"""A matrix product with weights as checkpoints store them: y = x W^T."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import cpu, reference, xla

IMPLEMENTATIONS = {"cpu": cpu, "xla": xla, "reference": reference}


def matmul(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None = None, implementation: str | None = None) -> jax.Array:
    """x [T, D] times weight [F, D] -> [T, F], in `dtype` (default: x's), accumulated in float32.

    Args:
      implementation: default: the platform's own, chosen when the program is lowered; "cpu" takes float32 alone and falls back to "xla".
    """
    if implementation is not None:
        return IMPLEMENTATIONS[implementation].matmul(x, weight, dtype=dtype)
    return jax.lax.platform_dependent(
        x, weight, cpu=functools.partial(_native, dtype=dtype), default=functools.partial(reference.matmul, dtype=dtype)
    )


def _native(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None) -> jax.Array:
    if jax.default_backend() != "cpu":  # this branch is traced on TPU and GPU hosts too, where compiling the kernel would be for nothing
        return xla.matmul(x, weight, dtype=dtype)
    try:
        return cpu.matmul(x, weight, dtype=dtype)
    except NotImplementedError:
        return xla.matmul(x, weight, dtype=dtype)
