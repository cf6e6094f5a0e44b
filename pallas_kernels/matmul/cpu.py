"""The product on a CPU, at the rate of memory for few rows and of the vector units for many.

An item is a block of up to TOKENS rows of x and some rows of the weights, small enough for the caches next to a core. A row of the result
depends on its row of x alone, bit for bit: a request gets the same numbers in any company and any shape of step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numba import njit

from pallas_kernels.native import ffi
from pallas_kernels.native.tiles import DOT_COLUMNS, DOT_ROWS, LINE, dot_tile

TOKENS = 256  # weights come from memory while the first tokens of an item use them; the more tokens follow, the less that counts
FEW_TOKENS, FEW_FEATURES, MANY_FEATURES = 64, 24, 48  # the latter, for more than FEW_TOKENS, fill half of a cache of 512 KB at D = 1536
GROUP_BYTES = 20 << 10  # of tokens that go through the same weights, all of it in the fastest cache

TARGET = "jaxserve_matmul"
_item_address = ffi.item_address(TARGET)


def matmul(x: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """See reference.py.

    Raises: NotImplementedError for other types than float32, and for D that is no multiple of a cache line.
    """
    T, D = x.shape
    if not (x.dtype == weight.dtype == (dtype or x.dtype) == jnp.float32) or D % LINE or 0 in (T, *weight.shape):
        raise NotImplementedError(f"{x.dtype}[{T}, {D}] times {weight.dtype}{list(weight.shape)}")
    define()
    return jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((T, weight.shape[0]), jnp.float32))(x, weight)


@njit
def _features(T: int) -> int:
    """Rows of the weights in an item."""
    return FEW_FEATURES if T <= FEW_TOKENS else MANY_FEATURES


def _item(operands: int, results: int, index: int) -> int:
    T, D, F = ffi.size(operands, 0, 0), ffi.size(operands, 0, 1), ffi.size(operands, 1, 0)
    x, w, y = ffi.data(operands, 0), ffi.data(operands, 1), ffi.data(results, 0)
    features = _features(T)
    blocks = -(-F // features)
    first = index % blocks * features
    last = min(first + features, F)
    token = index // blocks * TOKENS
    last_token = min(token + TOKENS, T)
    group = max(GROUP_BYTES // (4 * D * DOT_ROWS), 1) * DOT_ROWS
    ahead = DOT_COLUMNS * D  # later rows of x find the weights in the cache
    while token < last_token:
        end = min(token + group, last_token)
        feature = first
        while feature < last:
            columns = DOT_COLUMNS if feature + DOT_COLUMNS <= last else 1
            for row in range(token, end, DOT_ROWS):
                rows = min(DOT_ROWS, end - row)
                dot_tile(rows, columns, x + 4 * row * D, w + 4 * feature * D, y + 4 * (row * F + feature), D, F, ahead)
            feature += columns
        token = end
        ahead = 0
    return 0


def _handler(frame: int) -> int:
    if ffi.executes(frame):
        T, F = ffi.size(ffi.operands(frame), 0, 0), ffi.size(ffi.operands(frame), 1, 0)
        ffi.run(frame, -(-T // TOKENS) * -(-F // _features(T)), _item_address())
    return 0


@ffi.once
def define() -> Any:
    """Make the kernel known to XLA; see ffi.define."""
    return ffi.define(TARGET, _item, _handler)
