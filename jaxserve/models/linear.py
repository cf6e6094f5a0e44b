"""Matrix products with weights stored [out, in], as checkpoints have them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.sharding import Cut
from pallas_kernels.matmul import matmul


class Linear(nnx.Module):
    """y = x W^T (+ b).

    Args:
      num_in, num_out: features.
      bias: whether there is a b.
      repeats: R of the layer group; the parameter is [R, num_out, num_in] until the layer loop slices it.
      cut: how rows (axis 0) or columns (axis 1) are dealt out to devices; with columns, the devices' products are added up.
    """

    def __init__(self, num_in: int, num_out: int, *, bias: bool, repeats: int, dtype: jnp.dtype, cut: Cut | None = None) -> None:
        self.columns = cut if cut is not None and cut.axis == 1 else None
        rows = cut if self.columns is None else None
        num_in, num_out = size_of(self.columns, num_in), size_of(rows, num_out)
        self.weight = cut_param((repeats, num_out, num_in), dtype, cut)
        self.bias = cut_param((repeats, num_out), dtype, rows) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, num_in] to [T, num_out]."""
        y = matmul(x, self.weight[...])
        if self.columns is not None:
            y = self.columns.sum(y)
        return y if self.bias is None else y + self.bias[...]


def size_of(cut: Cut | None, whole: int) -> int:
    """Entries of an axis that a device holds."""
    return whole if cut is None else cut.size


class WholeParam(nnx.Param):
    """A parameter of a layer group that its layers get as it is, with the number of the layer, not sliced.

    For kernels that find a layer's part themselves: what is sliced for them is copied first.
    """


def cut_param(shape: tuple[int, ...], dtype: jnp.dtype, *cuts: Cut | None) -> nnx.Param[jax.ShapeDtypeStruct]:
    """An abstract parameter of a device's shape, which remembers how its axes are dealt out."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), cuts=tuple(cut for cut in cuts if cut is not None))
