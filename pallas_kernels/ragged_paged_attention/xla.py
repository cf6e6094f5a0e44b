"""Ragged paged attention in plain XLA, fast on a CPU and right everywhere: the contract of reference.py without its memory.

1. Write the new keys and values.
2. Rows with one token (decodes): a block of one query each, longest context first, GROUP_ROWS of them attending together.
3. Rows with more tokens (prefill): blocks of queries of one row, GROUP_BLOCKS of them attending together.
4. A group walks over its context in chunks, up to its longest, folding chunk after chunk into an online softmax.
All trip counts are taken from the batch, so that no shape depends on the context's length.

A block's result depends on its row alone: chunks beyond its context are masked and change nothing, bit for bit.

The cache is [R, num_pages, 2K, page_size * H]: row 2h of a page holds the keys of head h, [H, page_size], row 2h + 1 its values,
[page_size, H]. So pages are gathered as rows of a matrix, and both products find their operands as they want them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.reference import MASKED, encode, token_rows

DECODE_CHUNK = 128  # tokens of context that a group looks at at a time; keys of one page need no transpose
PREFILL_CHUNK = 128
GROUP_ROWS = 16  # decode rows that attend together
GROUP_BLOCKS = 2  # blocks of queries that attend together
QUERY_BLOCKS = (32, 128)  # queries in a block: 128 beats 64 by 1.18, but a row pays for its whole last block
EMPTY = MASKED / 2  # maximum over no keys: finite, and far enough above MASKED for exp(MASKED - EMPTY) to be 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Features:
    sm_scale: float
    causal: bool
    window: jax.Array | int | None
    softcap: float | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None
    distance_bias: jax.Array | None
    k_scale: float
    v_scale: float
    num_groups: int
    value_size: int


def cache_shape(num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
    """Rows of a page: 2h is the keys of head h, [head_size, page_size] flat; 2h + 1 its values, [page_size, head_size] flat."""
    return num_layers, num_pages, 2 * num_kv_heads, page_size * head_size


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
      pages: [R, num_pages, 2K, page_size * H], see above.
      one_token_rows: static promise that row s owns token s or nothing (T == S), which spares the prefill path.
    """
    T, N, _ = q.shape
    K, Hv = k.shape[1], v.shape[2]
    row, position, valid = token_rows(T, query_start, kv_len)
    pages = _write(pages, layer, k, v, row, position, valid, page_table, k_scale, v_scale)
    features = _Features(
        sm_scale=sm_scale, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        distance_bias=distance_bias, k_scale=k_scale, v_scale=v_scale, num_groups=N // K, value_size=Hv,
    )  # fmt: skip
    q = jnp.where(valid[:, None, None], q, 0)
    if one_token_rows:
        out = _decode(q, pages, layer, page_table, jnp.where(valid, kv_len, 0), features)
    else:
        counts = query_start[1:] - query_start[:-1]
        single = counts == 1
        decoded = _decode(q[jnp.clip(query_start[:-1], 0, T - 1)], pages, layer, page_table, jnp.where(single, kv_len, 0), features)
        out = _prefill(q, pages, layer, page_table, query_start, kv_len, jnp.where(single, 0, counts), features)
        out = jnp.where(single[row][:, None, None], decoded[row], out)
    return jnp.where(valid[:, None, None], out, 0).astype(q.dtype), pages


def _write(
    pages: jax.Array, layer: Any, k: jax.Array, v: jax.Array, row: jax.Array, position: jax.Array, valid: jax.Array,
    page_table: jax.Array, k_scale: float, v_scale: float,
) -> jax.Array:  # fmt: skip
    """The cache with each valid token's key and value in its slot; see reference.write_pages."""
    T, K, H = k.shape
    R, num_pages, _, size = pages.shape
    page_size = size // H
    page = jnp.where(valid, page_table[row, position // page_size], num_pages)  # out of range: dropped
    offset = position % page_size
    # XLA makes something else of a scatter of one token, for which it copies the whole cache.
    more = max(2 - T, 0)
    page, offset = jnp.pad(page, (0, more), constant_values=num_pages), jnp.pad(offset, (0, more))
    k, v = jnp.pad(k, ((0, more), (0, 0), (0, 0))), jnp.pad(v, ((0, more), (0, 0), (0, H - v.shape[2])))
    keys = pages.reshape(R, num_pages, K, 2, H, page_size)
    keys = keys.at[layer, page, :, 0, :, offset].set(encode(k, k_scale, pages.dtype), mode="drop")
    values = keys.reshape(R, num_pages, K, 2, page_size, H)
    return values.at[layer, page, :, 1, offset].set(encode(v, v_scale, pages.dtype), mode="drop").reshape(pages.shape)


def _decode(q: jax.Array, pages: jax.Array, layer: Any, page_table: jax.Array, kv_len: jax.Array, features: _Features) -> jax.Array:
    """One query a row: q [S, N, H] -> [S, N, Hv]; rows with kv_len 0 give zeros."""
    S, N, _ = q.shape
    W = min(GROUP_ROWS, S)
    if S == W:
        return _attend(q[:, None], pages, layer, page_table, jnp.arange(S), kv_len - 1, kv_len, DECODE_CHUNK, features)[:, 0]
    # Rows of like length share a group, and empty ones cost nothing.
    order = jnp.argsort(-kv_len)
    place = jnp.argsort(order)
    order = jnp.pad(order, (0, -S % W), constant_values=-1)

    def body(group: jax.Array, out: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(order, group * W, W)
        lens = jnp.where(row < 0, 0, kv_len[row])
        attended = _attend(q[row][:, None], pages, layer, page_table, row, lens - 1, lens, DECODE_CHUNK, features)
        return jax.lax.dynamic_update_slice_in_dim(out, attended[:, 0], group * W, 0)

    out = jnp.zeros((len(order), N, features.value_size), jnp.float32)
    return jax.lax.fori_loop(0, -(-jnp.sum(kv_len > 0) // W), body, out)[place]


def _prefill(
    q: jax.Array, pages: jax.Array, layer: Any, page_table: jax.Array, query_start: jax.Array, kv_len: jax.Array, counts: jax.Array,
    features: _Features,
) -> jax.Array:  # fmt: skip
    """Rows with counts > 0 queries each, some blocks of queries at a time: q [T, N, H] -> [T, N, Hv]; other rows' tokens hold anything."""
    T, _, H = q.shape
    B = min(max(T // 4, QUERY_BLOCKS[0]), QUERY_BLOCKS[1], T)
    W = min(GROUP_BLOCKS, -(-T // B))
    blocks = -(-counts // B)
    last_block = jnp.cumsum(blocks)
    num_blocks = last_block[-1]

    def body(group: jax.Array, x: jax.Array) -> jax.Array:
        index = group * W + jnp.arange(W)
        row = jnp.searchsorted(last_block, jnp.minimum(index, num_blocks - 1), side="right", method="compare_all")
        done = (index - (last_block[row] - blocks[row])) * B
        start = jnp.where(index < num_blocks, query_start[row] + done, T)
        lens = jnp.where(index < num_blocks, kv_len[row], 0)
        block = jnp.stack([jax.lax.dynamic_slice_in_dim(x, start[i], B) for i in range(W)])
        attended = _attend(block, pages, layer, page_table, row, kv_len[row] - counts[row] + done, lens, PREFILL_CHUNK, features)
        attended = jnp.pad(attended, ((0, 0), (0, 0), (0, 0), (0, H - attended.shape[3])))
        mine = jnp.arange(B) < (counts[row] - done)[:, None]  # beyond the row's end lie the next one's queries
        for i in range(W):
            x = jax.lax.dynamic_update_slice_in_dim(x, jnp.where(mine[i, :, None, None], attended[i], block[i]), start[i], axis=0)
        return x

    # Queries in, outputs out, in one buffer.
    padded = jnp.pad(q.astype(jnp.float32), ((0, B), (0, 0), (0, 0)))
    return jax.lax.fori_loop(0, -(-num_blocks // W), body, padded)[:T, :, : features.value_size]


def _attend(
    q: jax.Array, pages: jax.Array, layer: Any, page_table: jax.Array, row: jax.Array, position: jax.Array, kv_len: jax.Array, chunk: int,
    features: _Features,
) -> jax.Array:  # fmt: skip
    """A group of blocks, side by side: queries [W, B, N, H] -> [W, B, N, Hv].

    Args:
      row, position, kv_len: i32[W], of each block: its row of the page table, its first query's position, its keys (0: the block is empty).
      chunk: tokens of context to look at at a time, rounded to whole pages.
    """
    W, B, N, H = q.shape
    G = features.num_groups
    K = N // G
    page_size, P = pages.shape[3] // H, page_table.shape[1]
    width = min(max(chunk // page_size, 1), P)
    L = width * page_size
    queries = q.reshape(W, B, K, G, H).transpose(0, 2, 3, 1, 4).astype(jnp.float32) * features.sm_scale
    query_position = position[:, None] + jnp.arange(B)  # [W, B]
    beyond = 1 if features.causal else features.window  # a query sees keys below its position plus this
    end = kv_len if beyond is None else jnp.minimum(kv_len, position + (B - 1) + beyond)
    first = jnp.zeros_like(end) if features.window is None else jnp.maximum(position - features.window + 1, 0) // L

    def body(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        column = (first + index)[:, None] * width + jnp.arange(width)
        ids = page_table[row[:, None], jnp.minimum(column, P - 1)]
        key_position = (first + index)[:, None] * L + jnp.arange(L)  # [W, L]
        distance = key_position[:, None] - query_position[..., None]  # [W, B, L]
        in_row = key_position < kv_len[:, None]
        visible = jnp.broadcast_to(in_row[:, None], distance.shape)
        if features.causal:
            visible &= distance <= 0
        if features.window is not None:
            visible &= jnp.abs(distance) < features.window
        keys = _gather(pages, layer, ids, 0).reshape(W, K, width, H, page_size).transpose(0, 1, 3, 2, 4).reshape(W, K, H, L)
        scores = jnp.einsum("wkqh,wkhl->wkql", queries.reshape(W, K, G * B, H), keys).reshape(W, K, G, B, L)
        values = _gather(pages, layer, ids, 1).reshape(W, K, L, H)
        # Zero by its bits: 0 * NaN is NaN, and a select of 64 features is not made into vectors.
        bits = jax.lax.bitcast_convert_type(values, jnp.int32) & -in_row.astype(jnp.int32)[:, None, :, None]
        values = jax.lax.bitcast_convert_type(bits, jnp.float32)[..., : features.value_size]
        return _accumulate(state, scores, distance[:, None, None], visible[:, None, None], values, features)

    _, total, out = jax.lax.fori_loop(0, jnp.max(-(-end // L) - first), body, _start((W, K, G, B), features))
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(W, B, N, features.value_size)


def _gather(pages: jax.Array, layer: Any, ids: jax.Array, which: int) -> jax.Array:
    """The keys (which = 0) or values (1) of pages i32[W, n]: f32[W, K, n, page_size * H]."""
    R, num_pages, heads, size = pages.shape
    rows = ((layer * num_pages + ids) * heads)[:, None] + jnp.arange(which, heads, 2)[:, None]  # [W, K, n]
    return pages.reshape(R * num_pages * heads, size).at[rows].get(mode="promise_in_bounds").astype(jnp.float32)


def _start(shape: tuple[int, ...], features: _Features) -> tuple[jax.Array, ...]:
    """Running maximum, denominator and numerator of an online softmax over blocks of shape [W, K, G, B]."""
    out = jnp.zeros((*shape, features.value_size), jnp.float32)
    if features.sinks is None:
        return jnp.full(shape, EMPTY, jnp.float32), jnp.zeros(shape, jnp.float32), out
    top = jnp.broadcast_to(features.sinks.astype(jnp.float32).reshape(shape[1], shape[2], 1), shape)
    return top, jnp.ones(shape, jnp.float32), out


def _accumulate(
    state: tuple[jax.Array, ...], scores: jax.Array, distance: jax.Array, visible: jax.Array, values: jax.Array, features: _Features
) -> tuple[jax.Array, ...]:
    """Fold one chunk into an online softmax.

    Args:
      scores: [W, K, G, B, L], scaled q . k without the key's scale.
      distance, visible: [W, 1, 1, B, L], key position minus query position, and who sees whom.
      values: [W, K, L, Hv] of the chunk, zero where no row's token lies.
    """
    top, total, out = state
    W, K, G, B, L = scores.shape
    if features.k_scale != 1.0:
        scores = scores * features.k_scale
    if features.softcap is not None:
        scores = features.softcap * jnp.tanh(scores / features.softcap)
    if features.alibi_slopes is not None:
        scores += features.alibi_slopes.reshape(K, G, 1, 1) * distance.astype(jnp.float32)
    if features.distance_bias is not None:
        most = features.distance_bias.shape[1] // 2
        place = jnp.clip(distance[:, 0, 0], -most, most) + most  # [W, B, L]
        scores += features.distance_bias.astype(jnp.float32).reshape(K, G, -1)[:, :, place].transpose(2, 0, 1, 3, 4)
    scores = jnp.where(visible, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])  # 0 where masked: new_top is at least EMPTY
    shrink = jnp.exp(top - new_top)
    added = jnp.einsum("wkql,wklh->wkqh", weights.reshape(W, K, G * B, L), values).reshape(out.shape)
    if features.v_scale != 1.0:
        added = added * features.v_scale
    return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + added
