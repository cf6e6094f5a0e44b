"""Normalization of the last axis, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.linear import cut_param
from jaxserve.models.spec import NormSpec
from jaxserve.sharding import Cut


class Norm(nnx.Module):
    """Root-mean-square or layer norm; its parameters are [R, *shape] in a layer group, of that shape with repeats=None.

    Args:
      shape: of the weights: the width of the last axis, or the last axes if vectors before it have weights of their own.
      cut: how such vectors are dealt out to devices; shape is a device's.
    """

    def __init__(
        self, spec: NormSpec, shape: int | tuple[int, ...], *, repeats: int | None, dtype: jnp.dtype, cut: Cut | None = None
    ) -> None:
        self.spec = spec
        whole = (*(() if repeats is None else (repeats,)), *((shape,) if isinstance(shape, int) else shape))
        self.weight = cut_param(whole, dtype, cut) if spec.weight else None
        self.bias = cut_param(whole, dtype, cut) if spec.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize [..., *shape]; statistics in float32, result in x's dtype.

        Source: Zhang and Sennrich 2019, equation 4; Ba et al. 2016, equation 4.
        """
        wide = x.astype(jnp.float32)
        if self.spec.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.spec.eps)
        if self.spec.plus_one and self.weight is not None:
            # float32: 1 + weight has more digits than bfloat16
            return self._shift((wide * scale * (1 + self.weight[...].astype(jnp.float32))).astype(x.dtype))
        normalized = (wide * scale).astype(x.dtype)
        return self._shift(normalized if self.weight is None else normalized * self.weight[...])

    def _shift(self, x: jax.Array) -> jax.Array:
        return x if self.bias is None else x + self.bias[...]
