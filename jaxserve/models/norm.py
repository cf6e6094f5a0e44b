"""Normalization of the last axis, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.spec import NormSpec


class Norm(nnx.Module):
    """Root-mean-square norm; the parameter is [R, D] in a layer group, [D] with repeats=None."""

    def __init__(self, spec: NormSpec, width: int, *, repeats: int | None, dtype: jnp.dtype) -> None:
        self.spec = spec
        self.weight = nnx.Param(jax.ShapeDtypeStruct((width,) if repeats is None else (repeats, width), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize [T, D]; statistics in float32, result in x's dtype.

        Source: Zhang and Sennrich 2019, equation 4.
        """
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.spec.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...]
