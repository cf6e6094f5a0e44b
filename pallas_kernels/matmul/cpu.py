"""The product on a CPU, at the rate of memory for few rows and of the vector units for many.

An item is a block of up to TOKENS rows of x and some rows of the weights, small enough for the caches next to a core. A row of the result
depends on its row of x alone, bit for bit: a request gets the same numbers in any company and any shape of step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numba import cfunc, njit

from pallas_kernels.native import ffi
from pallas_kernels.native.memory import address_of
from pallas_kernels.native.tiles import DOT_COLUMNS, DOT_ROWS, LANES, dot_tile

TOKENS = 64
FEW_FEATURES, MANY_FEATURES = 24, 96  # the latter where there are several blocks of tokens: 512 tokens take 558 instead of 607 ms

_TARGET, _TASK = "jaxserve_matmul", "jaxserve_matmul_task"
_task_address = address_of(_TASK)


def matmul(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """See reference.py.

    Raises: NotImplementedError for other types than float32, and for D that is no multiple of a vector.
    """
    T, D = x.shape
    if not (x.dtype == weight.dtype == (dtype or x.dtype) == jnp.float32) or D % LANES or 0 in (T, *weight.shape):
        raise NotImplementedError(f"{x.dtype}[{T}, {D}] times {weight.dtype}{list(weight.shape)}")
    _compile()
    return jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((T, weight.shape[0]), jnp.float32))(x, weight)


@njit
def _features(T: int) -> int:
    """Rows of the weights in an item."""
    return FEW_FEATURES if T <= TOKENS else MANY_FEATURES


@njit
def _item(operands: int, results: int, index: int) -> None:
    T, D, F = ffi.size(operands, 0, 0), ffi.size(operands, 0, 1), ffi.size(operands, 1, 0)
    x, w, y = ffi.data(operands, 0), ffi.data(operands, 1), ffi.data(results, 0)
    features = _features(T)
    blocks = -(-F // features)
    first = index % blocks * features
    last = min(first + features, F)
    token = index // blocks * TOKENS
    last_token = min(token + TOKENS, T)
    ahead = DOT_COLUMNS * D  # later rows of x find the weights in the cache
    while token < last_token:
        rows = min(DOT_ROWS, last_token - token)
        feature = first
        while feature < last:
            columns = DOT_COLUMNS if feature + DOT_COLUMNS <= last else 1
            dot_tile(rows, columns, x + 4 * token * D, w + 4 * feature * D, y + 4 * (token * F + feature), D, F, ahead)
            feature += columns
        token += rows
        ahead = 0


@ffi.once
def _compile() -> Any:
    cache = ffi.use_cache()

    @cfunc(ffi.TASK, cache=cache)
    def task(state: int) -> None:
        ffi.work(state, _item)

    ffi.publish(_TASK, task)

    @cfunc(ffi.HANDLER, cache=cache)
    def handler(frame: int) -> int:
        if ffi.executes(frame):
            T, F = ffi.size(ffi.operands(frame), 0, 0), ffi.size(ffi.operands(frame), 1, 0)
            state = ffi.share(frame, -(-T // TOKENS) * -(-F // _features(T)), _task_address())
            ffi.work(state, _item)
            ffi.finish(state)
        return 0

    ffi.register(_TARGET, handler)
    return task, handler
