"""The contract of ragged paged attention, in plain jnp: obvious, slow, and right.

Cache layout, one array per layer group:   pages[layer, page, offset, 2 * head + (0 for K, 1 for V), feature]
Row s owns tokens query_start[s] .. query_start[s + 1] of the step. They are its newest: positions kv_len[s] - count .. kv_len[s].
Position p of row s lives in page page_table[s, p // page_size] at offset p % page_size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30  # not -inf: a row without any visible key must not turn into NaN


def cache_shape(num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
    """The contract's; implementations may order a page's numbers otherwise."""
    return num_layers, num_pages, page_size, 2 * num_kv_heads, head_size


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
    """Write new keys and values into their pages, then attend to all of each row's pages.

    Order of operations: scale, softcap, ALiBi or bias by distance, mask, softmax (with sink), all in float32.

    Args:
      q: [T, N, H] queries; N a multiple of K.
      k: [T, K, H] new keys. v: [T, K, Hv] new values, Hv <= H; cached padded to H with zeros.
      pages: [R, num_pages, page_size, 2K, H] cache; float, or int8 / float8_e4m3fn with scales. Donated by convention:
        implementations update it in place.
      layer: index into R.
      page_table: i32[S, P]; entries beyond a row's pages are unspecified but valid page ids (pad with 0).
      query_start: i32[S + 1], ascending; tokens from query_start[S] on are padding: q, k and v may hold anything there, NaN too.
      kv_len: i32[S], tokens of each row including the new ones; 0 for an empty row.
      sm_scale: multiplies q . k.
      causal: a query sees keys up to its own position; otherwise all kv_len of them.
      window: a query at p sees keys above p - window, and if not causal below p + window; None is unlimited.
      softcap: scores become softcap * tanh(scores / softcap).
      alibi_slopes: f32[N]; adds slope * (key position - query position).
      distance_bias: f32[N, 2 * D + 1]; adds entry D + (key position - query position), distances beyond D as D. Only here and in xla.py.
      sinks: f32[N]; a logit per head that joins the softmax's denominator and has no value.
      k_scale, v_scale: a cached number times its scale is the true one.
      one_token_rows: static promise that T == S and row s owns token s or, at the end, nothing; implementations may use it.
    Returns: [T, N, Hv] in q's dtype (rows of padding tokens are zero), and the cache.
    Slots that hold no token (beyond kv_len, free pages) may contain anything, NaN too: they never reach the output.
    """
    T, N, H = q.shape
    K, Hv = k.shape[1], v.shape[2]
    G = N // K
    del one_token_rows  # the answer is the same
    row, position, valid = token_rows(T, query_start, kv_len)
    pages = write_pages(
        pages, layer, k, v, row=row, position=position, valid=valid, page_table=page_table, k_scale=k_scale, v_scale=v_scale
    )

    S, P = page_table.shape
    page_size = pages.shape[2]
    cached = pages[layer][page_table].reshape(S, P * page_size, K, 2, H)[row]  # [T, L, K, 2, H]
    keys = cached[..., 0, :].astype(jnp.float32) * k_scale
    values = cached[..., 1, :Hv].astype(jnp.float32) * v_scale
    scores = jnp.einsum("tkgh,tlkh->tkgl", q.astype(jnp.float32).reshape(T, K, G, H), keys) * sm_scale  # [T, K, G, L]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    key_position = jnp.arange(P * page_size)[None, :]
    distance = key_position - position[:, None]  # i32: bfloat16 holds integers only up to 256
    if alibi_slopes is not None:
        scores += alibi_slopes.reshape(1, K, G, 1) * distance[:, None, None, :].astype(jnp.float32)
    if distance_bias is not None:
        most = distance_bias.shape[1] // 2
        scores += distance_bias[:, jnp.clip(distance, -most, most) + most].reshape(K, G, T, -1).transpose(2, 0, 1, 3)
    visible = (key_position < kv_len[row][:, None]) & valid[:, None]
    if causal:
        visible &= distance <= 0
    if window is not None:
        visible &= jnp.abs(distance) < window
    scores = jnp.where(visible[:, None, None, :], scores, MASKED)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = jnp.maximum(top, sinks.reshape(1, K, G, 1))
    weights = jnp.where(visible[:, None, None, :], jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks.reshape(1, K, G, 1) - top)
    values = jnp.where(visible[:, :, None, None], values, 0.0)  # 0 * NaN is NaN
    out = jnp.einsum("tkgl,tlkh->tkgh", weights / jnp.maximum(total, 1e-30), values)
    return jnp.where(valid[:, None, None], out.reshape(T, N, Hv), 0.0).astype(q.dtype), pages


def token_rows(T: int, query_start: jax.Array, kv_len: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row i32[T], position i32[T] and validity bool[T] of each token of the step."""
    S = kv_len.shape[0]
    token = jnp.arange(T, dtype=jnp.int32)
    row = jnp.searchsorted(query_start[1:], token, side="right", method="compare_all").astype(jnp.int32)
    valid = row < S
    row = jnp.minimum(row, S - 1)
    position = kv_len[row] - query_start[row + 1] + token
    return row, jnp.where(valid, position, 0), valid


def write_pages(
    pages: jax.Array,
    layer: jax.Array | int,
    k: jax.Array,
    v: jax.Array,
    *,
    row: jax.Array,
    position: jax.Array,
    valid: jax.Array,
    page_table: jax.Array,
    k_scale: float,
    v_scale: float,
) -> jax.Array:
    """The cache with each valid token's key and value in its slot; shapes as in ragged_paged_attention."""
    T, K, H = k.shape
    num_pages, page_size = pages.shape[1:3]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, H - v.shape[2])))
    new = jnp.stack([encode(k, k_scale, pages.dtype), encode(v, v_scale, pages.dtype)], axis=2).reshape(T, 2 * K, H)
    page = jnp.where(valid, page_table[row, position // page_size], num_pages)  # out of range: dropped
    return pages.at[layer, page, position % page_size].set(new, mode="drop")


def encode(x: jax.Array, scale: float, dtype: jnp.dtype) -> jax.Array:
    """x / scale in the cache's dtype; integers are rounded and clipped to their range, float8 is clipped to its largest."""
    if x.dtype == dtype and scale == 1.0:
        return x
    scaled = x.astype(jnp.float32) / scale
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return jnp.clip(jnp.round(scaled), limits.min, limits.max).astype(dtype)
    if jnp.finfo(dtype).bits == 8:
        largest = float(jnp.finfo(dtype).max)
        scaled = jnp.clip(scaled, -largest, largest)
    return scaled.astype(dtype)
