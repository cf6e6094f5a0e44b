"""Ragged paged attention in plain XLA, fast on a CPU and right everywhere: the contract of reference.py without its memory.

1. Write the new keys and values.
2. Rows with one token (decodes): a work list of (row, chunk of context) items, so that ragged rows cost what they have.
3. Rows with more tokens (prefill): a work list of (row, block of queries), each over the chunks that its block can see.
4. Fold chunk after chunk into an online softmax.
All trip counts are taken from the batch, so that no shape depends on the context's length.

An item's result depends on its row alone, and a row's items follow each other, so a row's result is the same, bit for bit, in any company.

Figures below: two cores of an AMD Zen 4, float32, 9 heads, 3 KV heads of 64 features, microseconds of one core for 256 tokens of one row:
gathering keys and values 34, q . k 8, softmax 4, weights . values 4, and about 10 for the loop itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.reference import MASKED, token_rows, write_pages

DECODE_CHUNK = 256  # tokens of context in an item; 128 and 64 take 1.15 and 1.4 times as long, whatever the page size
PREFILL_CHUNK = 128  # the same for a block of queries; with 256, 4 prompts of 128 take 1.4 times as long, one of 512 takes 0.9
QUERY_BLOCKS = (32, 128)  # queries of one row that attend together: 128 beats 64 by 1.18, but a row pays for its whole last block
EMPTY = MASKED / 2  # maximum over no keys: finite, and far enough above MASKED for exp(MASKED - EMPTY) to be 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Features:
    sm_scale: float
    causal: bool
    window: jax.Array | int | None
    softcap: float | None
    alibi_slopes: jax.Array | None
    sinks: jax.Array | None
    k_scale: float
    v_scale: float
    num_groups: int
    value_size: int


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
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    one_token_rows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See reference.py.

    Args:
      one_token_rows: static promise that row s owns token s or nothing (T == S), which spares the prefill path.
    """
    T, N, _ = q.shape
    K, Hv = k.shape[1], v.shape[2]
    row, position, valid = token_rows(T, query_start, kv_len)
    slots = {"row": row, "position": position, "valid": valid, "page_table": page_table}
    pages = write_pages(pages, layer, k, v, **slots, k_scale=k_scale, v_scale=v_scale)
    features = _Features(
        sm_scale=sm_scale, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, num_groups=N // K, value_size=Hv,
    )  # fmt: skip
    q = jnp.where(valid[:, None, None], q, 0)
    if one_token_rows:
        out = _decode(q, pages, layer, page_table, jnp.where(valid, kv_len, 0), features)
        return jnp.where(valid[:, None, None], out, 0).astype(q.dtype), pages
    counts = query_start[1:] - query_start[:-1]
    single = counts == 1
    decoded = _decode(q[jnp.clip(query_start[:-1], 0, T - 1)], pages, layer, page_table, jnp.where(single, kv_len, 0), features)
    out = _prefill(q, pages, layer, page_table, query_start, kv_len, jnp.where(single, 0, counts), features)
    out = jnp.where(single[row][:, None, None], decoded[row], out)
    return jnp.where(valid[:, None, None], out, 0).astype(q.dtype), pages


def _decode(q: jax.Array, pages: jax.Array, layer: Any, page_table: jax.Array, kv_len: jax.Array, features: _Features) -> jax.Array:
    """One query a row: q [S, N, H] -> [S, N, Hv]; rows with kv_len 0 give zeros."""
    S, N, H = q.shape
    G = features.num_groups
    K = N // G
    queries = q.reshape(S, K, G, H).astype(jnp.float32) * features.sm_scale
    width, table = _chunked(page_table, DECODE_CHUNK, pages.shape[2])
    L = width * pages.shape[2]
    first = jnp.zeros_like(kv_len) if features.window is None else jnp.maximum(kv_len - features.window, 0) // L
    counts = -(-kv_len // L) - first
    ends = jnp.cumsum(counts)

    def body(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row = jnp.searchsorted(ends, index, side="right", method="compare_all").astype(jnp.int32)
        chunk = first[row] + index - (ends[row] - counts[row])
        ids = jax.lax.dynamic_slice(table, (row, chunk * width), (1, width))[0]
        key_position = chunk * L + jnp.arange(L)
        visible = key_position < kv_len[row]
        if features.window is not None:
            visible &= key_position >= kv_len[row] - features.window
        scores = jnp.einsum("kgh,klh->kgl", queries[row], _gather(pages, layer, ids, 0, H))
        values = jnp.where(visible[:, None], _gather(pages, layer, ids, 1, features.value_size), 0.0)  # 0 * NaN is NaN
        before = tuple(part[row] for part in state)
        after = _accumulate(before, scores, key_position - kv_len[row] + 1, visible, values, "kgl,klh->kgh", (K, G, 1), features)
        return tuple(jax.lax.dynamic_update_index_in_dim(part, new, row, 0) for part, new in zip(state, after, strict=True))

    _, total, out = jax.lax.fori_loop(0, ends[-1], body, _start((S, K, G), features, (1, K, G)))
    return (out / jnp.maximum(total, 1e-30)[..., None]).reshape(S, N, features.value_size)


def _prefill(
    q: jax.Array, pages: jax.Array, layer: Any, page_table: jax.Array, query_start: jax.Array, kv_len: jax.Array, counts: jax.Array,
    features: _Features,
) -> jax.Array:  # fmt: skip
    """Rows with counts > 0 queries each, a block of queries at a time: q [T, N, H] -> [T, N, Hv]; other rows' tokens hold anything."""
    T, N, _ = q.shape
    B = min(max(T // 4, QUERY_BLOCKS[0]), QUERY_BLOCKS[1], T)
    blocks = -(-counts // B)
    last_block = jnp.cumsum(blocks)
    padded = jnp.pad(q, ((0, B), (0, 0), (0, 0)))

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(last_block, index, side="right", method="compare_all")
        done = (index - (last_block[row] - blocks[row])) * B
        start = query_start[row] + done
        block = jax.lax.dynamic_slice_in_dim(padded, start, B)
        position = kv_len[row] - counts[row] + done + jnp.arange(B)
        attended = _attend_block(block, pages, layer, page_table[row], position, kv_len[row], features)
        # A block that ends beyond its row spills into the next one's tokens, which a later block overwrites.
        return jax.lax.dynamic_update_slice_in_dim(out, attended, start, axis=0)

    out = jnp.zeros((T + B, N, features.value_size), jnp.float32)
    return jax.lax.fori_loop(0, last_block[-1], body, out)[:T]


def _attend_block(
    q: jax.Array, pages: jax.Array, layer: Any, page_ids: jax.Array, position: jax.Array, kv_len: jax.Array, features: _Features
) -> jax.Array:
    """Queries [B, N, H] of one row at consecutive positions i32[B] -> [B, N, Hv]."""
    B, N, H = q.shape
    G = features.num_groups
    K = N // G
    page_size = pages.shape[2]
    width, table = _chunked(page_ids[None], PREFILL_CHUNK, page_size)
    queries = q.reshape(B, K, G, H).transpose(1, 2, 0, 3).astype(jnp.float32) * features.sm_scale  # [K, G, B, H]
    end = jnp.minimum(kv_len, position[-1] + 1) if features.causal else kv_len
    first = jnp.int32(0) if features.window is None else jnp.maximum(position[0] - features.window + 1, 0) // (width * page_size)

    def body(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        ids = jax.lax.dynamic_slice(table[0], (index * width,), (width,))
        key_position = index * width * page_size + jnp.arange(width * page_size)
        distance = key_position - position[:, None]  # [B, L]
        in_row = key_position < kv_len
        visible = jnp.broadcast_to(in_row, distance.shape)
        if features.causal:
            visible &= distance <= 0
        if features.window is not None:
            visible &= distance > -features.window
        scores = jnp.einsum("kgbh,klh->kgbl", queries, _gather(pages, layer, ids, 0, H))
        values = jnp.where(in_row[:, None], _gather(pages, layer, ids, 1, features.value_size), 0.0)
        return _accumulate(state, scores, distance, visible, values, "kgbl,klh->kgbh", (K, G, 1, 1), features)

    _, total, out = jax.lax.fori_loop(first, -(-end // (width * page_size)), body, _start((K, G, B), features, (K, G, 1)))
    out = out / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(2, 0, 1, 3).reshape(B, N, features.value_size)


def _chunked(page_table: jax.Array, tokens: int, page_size: int) -> tuple[int, jax.Array]:
    """Pages per chunk of about `tokens` tokens, and the table [S, P] padded to whole chunks."""
    P = page_table.shape[1]
    width = min(max(tokens // page_size, 1), P)
    return width, jnp.pad(page_table, ((0, 0), (0, -P % width)))


def _gather(pages: jax.Array, layer: Any, ids: jax.Array, which: int, size: int) -> jax.Array:
    """The keys (which = 0) or values (1) of some pages: f32[K, len(ids) * page_size, size], heads first, as products want them."""
    R, num_pages, page_size, heads, H = pages.shape
    K = heads // 2
    # One gather, of the half that is wanted: a slice or a transpose behind a gather of whole pages is a pass over memory of its own.
    start = jnp.stack([jnp.broadcast_to(layer, ids.shape), ids, jnp.full_like(ids, which)], axis=-1)
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(1, 2, 3), collapsed_slice_dims=(0, 1, 4), start_index_map=(0, 1, 4))
    cached = pages.reshape(R, num_pages, page_size, K, 2, H)
    x = jax.lax.gather(cached, start, numbers, (1, 1, page_size, K, 1, size), mode="promise_in_bounds")
    x = x.reshape(-1, K, size).transpose(1, 0, 2).astype(jnp.float32)
    # Changes nothing but -inf. LLVM unrolls a bare copy of 64 features into scalar moves before it vectorizes loops; with one operation
    # more it keeps the loop and makes vectors of it: 34 microseconds instead of 90.
    return jnp.maximum(x, jnp.finfo(jnp.float32).min)


def _start(shape: tuple[int, ...], features: _Features, head_shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Running maximum, denominator and numerator of an online softmax."""
    out = jnp.zeros((*shape, features.value_size), jnp.float32)
    if features.sinks is None:
        return jnp.full(shape, EMPTY, jnp.float32), jnp.zeros(shape, jnp.float32), out
    top = jnp.broadcast_to(features.sinks.astype(jnp.float32).reshape(head_shape), shape)
    return top, jnp.ones(shape, jnp.float32), out


def _accumulate(
    state: tuple[jax.Array, ...], scores: jax.Array, distance: jax.Array, visible: jax.Array, values: jax.Array, product: str,
    head_shape: tuple[int, ...], features: _Features,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Fold one chunk into an online softmax.

    Args:
      scores: scaled q . k without the key's scale, keys on the last axis.
      distance, visible: key position minus query position, and who sees whom; broadcast against scores.
      values: of the chunk, zero where no row's token lies.
      product: einsum of weights and values.
      head_shape: how [N] broadcasts against scores.
    """
    top, total, out = state
    if features.k_scale != 1.0:
        scores = scores * features.k_scale
    if features.softcap is not None:
        scores = features.softcap * jnp.tanh(scores / features.softcap)
    if features.alibi_slopes is not None:
        scores += features.alibi_slopes.reshape(head_shape) * distance.astype(jnp.float32)
    scores = jnp.where(visible, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])  # 0 where masked: new_top is at least EMPTY
    shrink = jnp.exp(top - new_top)
    added = jnp.einsum(product, weights, values)
    if features.v_scale != 1.0:
        added = added * features.v_scale
    return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + added
