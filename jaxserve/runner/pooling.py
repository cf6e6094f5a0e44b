"""The step of models that turn texts into vectors: packed words -> batch -> decoder -> pooling -> the vectors of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.kv_cache import KVCache
from jaxserve.models.params import ModelGraph, Params, merge_model
from jaxserve.models.pooling import finish_pool, pool_step, pooled_tokens
from jaxserve.models.spec import PoolMethod
from jaxserve.runner.pack import Layout, unpack, unpack_rows
from jaxserve.runner.sampling import INVALID_TOKEN
from jaxserve.runner.step import StepOutputs

POOLED_TOKEN = 0  # stands for a vector in the scheduler's accounts: a request for one ends with its first token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """What the device remembers per slot between steps; donated.

    Args:
      sums: f32[M, D], what the tokens of the slot's text add up to so far; see pool_step.
    """

    sums: jax.Array


def pool_state_shapes(max_rows: int, width: int) -> PoolState:
    """Abstract PoolState."""
    sums: Any = jax.ShapeDtypeStruct((max_rows, width), jnp.float32)
    return PoolState(sums=sums)


PoolStep = Callable[[Params, KVCache, PoolState, jax.Array], tuple[KVCache, tuple[PoolState, StepOutputs]]]


def make_pool_step(graphdef: ModelGraph, layout: Layout, method: PoolMethod) -> PoolStep:
    """The whole step of one shape, to be jitted with the cache and the state donated."""

    def step(params: Params, cache: KVCache, state: PoolState, packed: jax.Array) -> tuple[KVCache, tuple[PoolState, StepOutputs]]:
        model = merge_model(graphdef, params)
        batch, words, _ = unpack(packed, layout, jnp.zeros(1, jnp.int32))
        rows = unpack_rows(words[:, : layout.shape.rows])
        hidden, cache = model(batch, cache, pooled_tokens(method, batch))
        with jax.named_scope("pool"):
            before = state.sums[jnp.maximum(rows.slot, 0)]
            sums = pool_step(method, model.normed(hidden), before, batch)
            pooled = finish_pool(method, sums, batch.kv_len, list(model.pool))
            slot = jnp.where(rows.slot >= 0, rows.slot, state.sums.shape[0])  # out of range: dropped
            state = PoolState(sums=state.sums.at[slot].set(sums, mode="drop"))
            tokens = jnp.where(jnp.all(jnp.isfinite(pooled), axis=-1), POOLED_TOKEN, INVALID_TOKEN)
        return cache, (state, StepOutputs(tokens=tokens, logprobs=None, prompt=None, pooled=pooled))

    step.__name__ = f"step_{layout.shape.name}"
    return step
