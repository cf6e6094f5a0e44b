"""Token ids to vectors, and hidden states to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import matmul


class Embed(nnx.Module):
    """The [V, D] matrix that embeds tokens, or, as a head of its own, projects to logits."""

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jax.ShapeDtypeStruct((vocab_size, width), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[T, D] for i32[T]; ids outside the vocabulary (padding) take the nearest valid one."""
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def logits(self, x: jax.Array) -> jax.Array:
        """f32[T, V] for [T, D]."""
        return matmul(x, self.weight[...], dtype=jnp.dtype(jnp.float32))
