"""Hidden states of texts to one vector each, over as many steps as a text takes, and the layers behind that."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.batch import Batch
from jaxserve.models.mlp import ACTIVATIONS
from jaxserve.models.norm import Norm
from jaxserve.models.spec import PoolLayerSpec, PoolMethod
from pallas_kernels.matmul import matmul


class PoolLayer(nnx.Module):
    """norm(activation(W x + b)), in float32: vectors are few."""

    def __init__(self, spec: PoolLayerSpec, num_in: int, *, dtype: jnp.dtype) -> None:
        self.spec = spec
        self.weight = nnx.Param(jax.ShapeDtypeStruct((spec.width, num_in), dtype))
        self.bias = nnx.Param(jax.ShapeDtypeStruct((spec.width,), dtype)) if spec.bias else None
        self.norm = None if spec.norm is None else Norm(spec.norm, spec.width, repeats=None, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map f32[S, num_in] to f32[S, width]."""
        y = matmul(x, self.weight[...].astype(jnp.float32))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        match self.spec.activation:
            case "identity":
                pass
            case "tanh":
                y = jnp.tanh(y)
            case name:
                y = ACTIVATIONS[name](y)
        return y if self.norm is None else self.norm(y)


def pooled_tokens(method: PoolMethod, batch: Batch) -> jax.Array | None:
    """i32[S], the one token of each row whose hidden state counts in this step; None if all of them do."""
    last_of_all = batch.tokens.shape[0] - 1
    if method == "cls":
        return jnp.clip(batch.query_start[:-1], 0, last_of_all)
    return jnp.clip(batch.query_start[1:] - 1, 0, last_of_all) if method == "last" else None


def pool_step(method: PoolMethod, hidden: jax.Array, before: jax.Array, batch: Batch) -> jax.Array:
    """What the rows' tokens so far add up to, f32[S, D].

    Args:
      hidden: [S, D] of the tokens that `pooled_tokens` names, or [T, D] of all.
      before: f32[S, D], the same from the steps before; anything for a row that begins.
    """
    T, S = batch.tokens.shape[0], batch.kv_len.shape[0]
    hidden = hidden.astype(jnp.float32)
    begin = batch.query_start[:-1]
    is_new = (batch.kv_len - (batch.query_start[1:] - begin) == 0)[:, None]
    if method == "last":
        return hidden
    if method == "cls":
        return jnp.where(is_new, hidden, before)
    if method == "weighted_mean":
        hidden = hidden * (batch.positions + 1).astype(jnp.float32)[:, None]
    combine = jnp.maximum if method == "max" else jnp.add
    is_first = jnp.zeros(T, jnp.bool_).at[begin].set(True, mode="drop")
    here = _sums_in_rows(hidden, is_first, combine)[jnp.clip(batch.query_start[1:] - 1, 0, T - 1)]
    assert here.shape[0] == S, f"{here.shape=} {S=}"
    return jnp.where(is_new, here, combine(here, before))


def finish_pool(method: PoolMethod, sums: jax.Array, kv_len: jax.Array, layers: Sequence[PoolLayer]) -> jax.Array:
    """The vectors of rows of kv_len tokens each, f32[S, width]; only those of rows that are complete mean anything."""
    count = jnp.maximum(kv_len, 1).astype(jnp.float32)[:, None]
    match method:
        case "mean":
            sums = sums / count
        case "weighted_mean":
            sums = sums / (count * (count + 1) / 2)
        case "mean_sqrt_len":
            sums = sums / jnp.sqrt(count)
        case "cls" | "last" | "max":
            pass
    for layer in layers:
        sums = layer(sums)
    return sums


def _sums_in_rows(x: jax.Array, is_first: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Running totals [T, D] that begin anew where is_first: a row's total holds nothing of its neighbours, be they NaN."""

    def join(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (a_first, a), (b_first, b) = left, right
        return a_first | b_first, jnp.where(b_first[:, None], b, combine(a, b))

    return jax.lax.associative_scan(join, (is_first, x))[1]
