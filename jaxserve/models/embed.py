"""Token ids to vectors, and hidden states to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import cut_param, size_of
from jaxserve.models.spec import LearnedPositions
from jaxserve.sharding import WHOLE, Split
from pallas_kernels.matmul import matmul


class Embed(nnx.Module):
    """The [V, D] matrix that embeds tokens, or, as a head of its own, projects to logits, with a bias if there is one.

    Its rows are dealt out: a token is embedded by the device that has its row, and the logits of all are brought together.
    """

    def __init__(self, vocab_size: int, width: int, *, dtype: jnp.dtype, bias: bool = False, split: Split = WHOLE) -> None:
        self.vocab_size, self.cut = vocab_size, split.even("vocab", 0, vocab_size)
        num_rows = size_of(self.cut, vocab_size)
        self.weight = cut_param((num_rows, width), dtype, self.cut)
        self.bias = cut_param((num_rows,), dtype, self.cut) if bias else None

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[T, D] for i32[T]; ids outside the vocabulary (padding) take the nearest valid one."""
        if self.cut is None:
            return jnp.take(self.weight[...], tokens, axis=0, mode="clip")
        row = jnp.clip(tokens, 0, self.vocab_size - 1) - self.cut.index() * self.cut.size
        found = jnp.take(self.weight[...], row, axis=0, mode="clip")
        return self.cut.sum(jnp.where(((row >= 0) & (row < self.cut.size))[:, None], found, jnp.zeros((), found.dtype)))

    def logits(self, x: jax.Array) -> jax.Array:
        """f32[T, V] for [T, D]: of this device's rows only; see `gather`."""
        logits = matmul(x, self.weight[...], dtype=jnp.dtype(jnp.float32))
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        return logits

    def gather(self, logits: jax.Array) -> jax.Array:
        """The logits of all devices, f32[T, V]."""
        return logits if self.cut is None else self.cut.gather(logits)[:, : self.vocab_size]


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
