"""Token ids to vectors, and hidden states to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import matmul
from jaxserve.models.spec import LearnedPositions


class Embed(nnx.Module):
    """The [V, D] matrix that embeds tokens, or, as a head of its own, projects to logits, with a bias if there is one."""

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype, bias: bool = False) -> None:
        self.weight = nnx.Param(jax.ShapeDtypeStruct((vocab_size, width), dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((vocab_size,), dtype)) if bias else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[T, D] for i32[T]; ids outside the vocabulary (padding) take the nearest valid one."""
        return jnp.take(self.weight[...], tokens, axis=0, mode="clip")

    def logits(self, x: jax.Array) -> jax.Array:
        """f32[T, V] for [T, D]."""
        logits = matmul(x, self.weight[...], dtype=jnp.dtype(jnp.float32))
        return logits if self.bias is None else logits + self.bias[...].astype(jnp.float32)


class PositionEmbed(nnx.Module):
    """The table of learned positions."""

    def __init__(self, spec: LearnedPositions, width: int, *, dtype: jnp.dtype) -> None:
        self.spec = spec
        self.weight = nnx.Param(jax.ShapeDtypeStruct((spec.num_rows, width), dtype))

    def __call__(self, positions: jax.Array) -> jax.Array:
        """[T, D] for i32[T]; positions beyond the table, which only padding has, take its last row."""
        return jnp.take(self.weight[...], positions + self.spec.offset, axis=0, mode="clip")


class Projection(nnx.Module):
    """A matrix between the width of embeddings and the decoder's, without a bias."""

    def __init__(self, num_in: int, num_out: int, *, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jax.ShapeDtypeStruct((num_out, num_in), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, num_in] to [T, num_out]."""
        return matmul(x, self.weight[...])
