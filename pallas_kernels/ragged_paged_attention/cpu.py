"""Ragged paged attention on a CPU: reads the pages where they lie, each once for a block of queries and all heads of a group.

An item is a block of up to QUERIES queries of one row, for one KV head. It writes their keys and values, unless the row has more blocks:
then the calling thread has written them before. Then it goes from page to page: scores, a step of an online softmax, weighted values.
A query's result depends on its row alone, bit for bit.
The cache is that of xla.py.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit

from pallas_kernels.native import ffi
from pallas_kernels.native.memory import floats, free, ints, malloc, stay_apart, times_power_of_two
from pallas_kernels.native.tiles import LANES, LINE, OUTER_SHAPES, outer_tile
from pallas_kernels.ragged_paged_attention.reference import MASKED
from pallas_kernels.ragged_paged_attention.xla import cache_shape as cache_shape

QUERIES = 32
FAR = 2**30  # a window that hides nothing

TARGET = "jaxserve_ragged_paged_attention"
_item_address = ffi.item_address(TARGET)
_Q, _K, _V, _PAGES, _TABLE, _START, _LENGTHS, _BLOCKS, _SLOPES, _SINKS, _INTS, _FLOATS = range(12)  # operands
_LAYER, _WINDOW, _CAUSAL = range(3)
_Q_SCALE, _V_SCALE, _SOFTCAP = range(3)
_LOWEST = np.float32(MASKED)
_LOG2_E = np.float32(math.log2(math.e))
_EXP2 = tuple(np.float32(c) for c in (1.0, 0.6931472, 0.24022651, 0.05550411, 0.009618129, 0.0013400432, 0.00015469732))


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    sm_scale: float,
    causal: bool = True,
    window: jax.Array | int | None = None,
    softcap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    distance_bias: jax.Array | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    one_token_rows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See reference.py.

    Args:
      pages: [R, num_pages, 2K, page_size * H] as in xla.py.
    Raises: NotImplementedError for other types than float32, and for head or page sizes that are no multiple of a cache line.
    """
    (T, N, H), page_size = q.shape, pages.shape[3] // q.shape[2]
    if not (q.dtype == k.dtype == v.dtype == pages.dtype == jnp.float32) or H % LINE or page_size % LINE or 0 in (T, len(kv_len)):
        raise NotImplementedError(f"heads of {q.dtype}[{H}], pages of {pages.dtype}[{page_size}]")
    if distance_bias is not None:
        raise NotImplementedError("a bias for each distance: there is one in plain XLA")
    del one_token_rows  # nothing to gain
    define()
    counts = query_start[1:] - query_start[:-1]
    blocks = jnp.cumsum(-(-counts // QUERIES), dtype=jnp.int32)
    slopes = jnp.zeros(N, jnp.float32) if alibi_slopes is None else alibi_slopes.astype(jnp.float32)
    logits = jnp.full(N, MASKED, jnp.float32) if sinks is None else sinks.astype(jnp.float32)
    integers = [jnp.asarray(x, jnp.int32).reshape(()) for x in (layer, FAR if window is None else window, causal)]
    numbers = np.array([sm_scale * k_scale, v_scale, softcap or 0.0], np.float32)
    result = jax.ShapeDtypeStruct((T, N, v.shape[2]), jnp.float32), jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    out, pages = jax.ffi.ffi_call(TARGET, result, input_output_aliases={_PAGES: 1})(
        q, k, v, pages, page_table, query_start, kv_len, blocks, slopes, logits, jnp.stack(integers), numbers
    )
    return out, pages


@njit
def _page(operands: int, results: int, row: int, column: int, head: int) -> tuple[int, int]:
    """Addresses of the keys [H, page_size] and the values [page_size, H] of a row's page."""
    num_pages, heads, numbers = ffi.size(operands, _PAGES, 1), ffi.size(operands, _PAGES, 2), ffi.size(operands, _PAGES, 3)
    page = ints(ffi.data(operands, _TABLE))[row * ffi.size(operands, _TABLE, 1) + column]
    layer = ints(ffi.data(operands, _INTS))[_LAYER]
    keys = ffi.data(results, 1) + 4 * numbers * ((np.int64(layer) * num_pages + page) * heads + 2 * head)
    return keys, keys + 4 * numbers


@njit
def _begin_step(operands: int, results: int) -> None:
    """Zeros into the output of padding tokens; the keys and values of rows that several items attend to."""
    start = ints(ffi.data(operands, _START))
    S = ffi.size(operands, _LENGTHS, 0)
    for row in range(S):
        if start[row + 1] - start[row] > QUERIES:
            for head in range(ffi.size(operands, _K, 1)):
                _write(operands, results, row, head)
    out, per_token = floats(ffi.data(results, 0)), ffi.size(operands, _Q, 1) * ffi.size(operands, _V, 2)
    for i in range(start[S] * per_token, ffi.size(operands, _Q, 0) * per_token):
        out[i] = np.float32(0)


@njit
def _write(operands: int, results: int, row: int, head: int) -> None:
    """A head's new keys and values of a row into their pages, piece by piece of a page."""
    K, H, Hv = ffi.size(operands, _K, 1), ffi.size(operands, _K, 2), ffi.size(operands, _V, 2)
    page_size = ffi.size(operands, _PAGES, 3) // H
    start, lengths = ints(ffi.data(operands, _START)), ints(ffi.data(operands, _LENGTHS))
    k, v = floats(ffi.data(operands, _K)), floats(ffi.data(operands, _V))
    token, end = np.int64(start[row]), np.int64(start[row + 1])
    position = lengths[row] - (end - token)
    while token < end:
        offset = position % page_size
        count = min(page_size - offset, end - token)
        key_address, value_address = _page(operands, results, row, position // page_size, head)
        keys, values = floats(key_address + 4 * offset), floats(value_address + 4 * offset * H)
        for i in range(H):
            for t in range(count):
                keys[i * page_size + t] = k[((token + t) * K + head) * H + i]
        for t in range(count):
            for i in range(H):
                values[t * H + i] = v[((token + t) * K + head) * Hv + i] if i < Hv else np.float32(0)
        token += count
        position += count


def _item(operands: int, results: int, index: int) -> int:
    N, H, K = ffi.size(operands, _Q, 1), ffi.size(operands, _Q, 2), ffi.size(operands, _K, 1)
    page_size, G = ffi.size(operands, _PAGES, 3) // H, N // K
    head, block = index % K, index // K
    row = _row_of(operands, block)
    start, ends, lengths = ints(ffi.data(operands, _START)), ints(ffi.data(operands, _BLOCKS)), ints(ffi.data(operands, _LENGTHS))
    first = (block - (ends[row - 1] if row > 0 else 0)) * QUERIES
    token, length, end_token = int(start[row] + first), int(lengths[row]), int(start[row + 1])
    count = min(QUERIES, end_token - token)
    position = length - (end_token - start[row]) + first
    M = count * G
    if end_token - start[row] <= QUERIES:
        _write(operands, results, row, head)

    scratch = malloc(4 * (M * (page_size + 2 * H + 2) + LANES))
    scores = (scratch + 4 * LANES - 1) // (4 * LANES) * (4 * LANES)
    queries, out = scores + 4 * M * page_size, scores + 4 * M * (page_size + H)
    state = scores + 4 * M * (page_size + 2 * H)  # of each query its largest score and the sum of its weights
    _begin(operands, token, head * G, G, M, queries, out, state)
    low, high = _visible(operands, position, length)[0], _visible(operands, position + count - 1, length)[1]
    for column in range(low // page_size, -(-high // page_size)):
        keys, values = _page(operands, results, row, column, head)
        begin = column * page_size
        some, end = max(low - begin, 0), min(high - begin, page_size)
        wide = -(-end // LANES) * LANES
        for m in range(M):
            for i in range(wide):
                floats(scores)[m * page_size + i] = np.float32(0)
        _multiply(M, wide, queries, H, keys, page_size, scores, page_size, H)
        for m in range(M):
            first_seen, last_seen = _visible(operands, position + m // G, length)
            _weigh(
                operands, scores + 4 * m * page_size, out + 4 * m * H, H, state + 8 * m, head * G + m % G,
                some, end, first_seen - begin, last_seen - begin, begin - position - m // G,
            )  # fmt: skip
        _multiply(M, H, scores + 4 * some, page_size, values + 4 * some * H, H, out, H, end - some)
    _end(operands, results, token, head * G, G, M, out, state)
    free(scratch)
    return 0


@njit
def _row_of(operands: int, block: int) -> int:
    """The row that a block of queries belongs to."""
    ends = ints(ffi.data(operands, _BLOCKS))
    low, high = 0, ffi.size(operands, _BLOCKS, 0) - 1
    while low < high:
        middle = (low + high) // 2
        if ends[middle] > block:
            high = middle
        else:
            low = middle + 1
    return low


@njit
def _visible(operands: int, position: int, length: int) -> tuple[int, int]:
    """The keys that a query sees: from the first number up to below the second."""
    settings = ints(ffi.data(operands, _INTS))
    ahead = 1 if settings[_CAUSAL] else int(settings[_WINDOW])
    return max(position - settings[_WINDOW] + 1, 0), min(length, position + ahead)


@njit
def _begin(operands: int, token: int, head: int, G: int, M: int, queries: int, out: int, state: int) -> None:
    """Scaled queries [M, H] of G heads, zeros for their outputs, and the state of their softmax."""
    N, H = ffi.size(operands, _Q, 1), ffi.size(operands, _Q, 2)
    q, sinks, scale = floats(ffi.data(operands, _Q)), floats(ffi.data(operands, _SINKS)), floats(ffi.data(operands, _FLOATS))[_Q_SCALE]
    for m in range(M):
        source = ((token + m // G) * N + head + m % G) * H
        for i in range(H):
            floats(queries)[m * H + i] = q[source + i] * scale
            floats(out)[m * H + i] = np.float32(0)
        sink = sinks[head + m % G]
        floats(state)[2 * m] = sink
        floats(state)[2 * m + 1] = np.float32(1) if sink > _LOWEST else np.float32(0)


@njit
def _multiply(rows: int, columns: int, a: int, a_stride: int, b: int, b_stride: int, c: int, c_stride: int, depth: int) -> None:
    """c[rows, columns] += a[rows, depth] b[depth, columns]."""
    stay_apart()
    tallest, widest = OUTER_SHAPES[1] if rows <= OUTER_SHAPES[1][0] else OUTER_SHAPES[0]
    row = 0
    while row < rows:
        height = min(tallest, rows - row)
        column = 0
        while column < columns:
            width = min(widest, (columns - column) // LANES)
            to = c + 4 * (row * c_stride + column)
            outer_tile(height, width, a + 4 * row * a_stride, a_stride, b + 4 * column, b_stride, to, c_stride, depth)
            column += width * LANES
        row += height


@njit
def _weigh(
    operands: int, scores: int, out: int, H: int, state: int, head: int, some: int, end: int, first: int, last: int, distance: int
) -> None:
    """Scores of one query on a page become weights, zero in [some, end) where it sees nothing; its output shrinks to the new maximum.

    Args:
      state: address of the largest score so far and the sum of weights.
      first, last: the keys of the page that the query sees, from first up to below last; may lie outside of it.
      distance: of the page's first key from the query.
    """
    s, numbers, slope = floats(scores), floats(ffi.data(operands, _FLOATS)), floats(ffi.data(operands, _SLOPES))[head]
    first, last = max(first, some), min(last, end)
    if first >= last:
        first = last = end
    for t in range(some, first):
        s[t] = np.float32(0)
    for t in range(last, end):
        s[t] = np.float32(0)
    if first == last:
        return
    softcap = numbers[_SOFTCAP]
    if softcap > 0:
        for t in range(first, last):
            s[t] = softcap * np.float32(math.tanh(s[t] / softcap))
    if slope != 0:
        for t in range(first, last):
            s[t] += slope * np.float32(distance + t)
    top = floats(state)[0]
    new_top = _largest(scores, first, last, top)
    total = _exponentials(scores, first, last, new_top)
    if new_top > top:
        shrink = np.float32(math.exp(top - new_top))
        floats(state)[0] = new_top
        floats(state)[1] *= shrink
        for i in range(H):
            floats(out)[i] *= shrink
    floats(state)[1] += total


# Sums and maxima in vectors, which numba must be told is allowed; the order depends on the number of keys alone.
@njit(fastmath={"reassoc", "nsz", "nnan", "contract"})
def _largest(scores: int, first: int, last: int, top: float) -> float:
    s = floats(scores)
    for t in range(first, last):
        top = s[t] if s[t] > top else top
    return top


@njit(fastmath={"reassoc", "nsz", "contract"})
def _exponentials(scores: int, first: int, last: int, top: float) -> float:
    """Scores become exp(score - top), with an error of about 1e-7; their sum."""
    s = floats(scores)
    total: Any = np.float32(0)
    for t in range(first, last):
        x = max((s[t] - top) * _LOG2_E, np.float32(-126))
        whole = np.int32(x - np.float32(0.5))  # the nearest: x is not positive
        part = x - np.float32(whole)
        power = _EXP2[6]
        power = power * part + _EXP2[5]
        power = power * part + _EXP2[4]
        power = power * part + _EXP2[3]
        power = power * part + _EXP2[2]
        power = power * part + _EXP2[1]
        power = power * part + _EXP2[0]
        s[t] = times_power_of_two(power, whole)
        total += s[t]
    return total


@njit
def _end(operands: int, results: int, token: int, head: int, G: int, M: int, out: int, state: int) -> None:
    """The outputs [M, Hv], divided by the sums of weights, to where they belong."""
    N, H, Hv = ffi.size(operands, _Q, 1), ffi.size(operands, _Q, 2), ffi.size(operands, _V, 2)
    result, scale = floats(ffi.data(results, 0)), floats(ffi.data(operands, _FLOATS))[_V_SCALE]
    for m in range(M):
        target = ((token + m // G) * N + head + m % G) * Hv
        factor = scale / max(floats(state)[2 * m + 1], np.float32(1e-30))
        for i in range(Hv):
            result[target + i] = floats(out)[m * H + i] * factor


def _handler(frame: int) -> int:
    if ffi.executes(frame):
        operands = ffi.operands(frame)
        _begin_step(operands, ffi.results(frame))
        blocks = ints(ffi.data(operands, _BLOCKS))[ffi.size(operands, _BLOCKS, 0) - 1]
        ffi.run(frame, blocks * ffi.size(operands, _K, 1), _item_address())
    return 0


@ffi.once
def define() -> Any:
    """Make the kernel known to XLA; see ffi.define."""
    return ffi.define(TARGET, _item, _handler)
