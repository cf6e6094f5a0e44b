"""Attention over the compressed cache in plain XLA, fast on a CPU and right everywhere: the contract of reference.py without its memory.

1. Write the new vectors.
2. Rows with one token (decodes): a block of one query each, longest context first, GROUP_ROWS of them attending together.
3. Rows with more tokens (prefill): blocks of queries of one row, one after the other.
4. A group walks over its context in chunks, up to its longest, folding chunk after chunk into an online softmax.
All trip counts are taken from the batch, so that no shape depends on the context's length.

A block's result depends on its row alone: chunks beyond its context are masked and change nothing, bit for bit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_attention.reference import cache_shape, write_pages
from pallas_kernels.ragged_paged_attention.reference import MASKED, token_rows

__all__ = ["cache_shape", "mla_attention"]

CHUNK = 128  # tokens of context that a group looks at at a time
GROUP_ROWS = 8  # decode rows that attend together; they share the products' set-up and pay for the longest
QUERY_ROWS = 512  # queries times heads of a prefill block
EMPTY = MASKED / 2  # maximum over no keys: finite, and far enough above MASKED for exp(MASKED - EMPTY) to be 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Context:
    """What every block attends to, and how."""

    pages: jax.Array  # [R, num_pages, page_size, C + Hr]
    layer: Any
    page_table: jax.Array
    latent_size: int
    causal: bool


def mla_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    sm_scale: float,
    causal: bool = True,
    one_token_rows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See reference.py.

    Args:
      one_token_rows: static promise that row s owns token s or nothing (T == S), which spares the prefill path.
    """
    T, _, C = q_latent.shape
    row, position, valid = token_rows(T, query_start, kv_len)
    pages = write_pages(pages, layer, latent, rope_key, row=row, position=position, valid=valid, page_table=page_table)
    context = _Context(pages=pages, layer=layer, page_table=page_table, latent_size=C, causal=causal)
    q = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32) * sm_scale
    q = jnp.where(valid[:, None, None], q, 0)
    if one_token_rows:
        out = _decode(q, jnp.where(valid, kv_len, 0), context)
    else:
        counts = query_start[1:] - query_start[:-1]
        single = counts == 1
        decoded = _decode(q[jnp.clip(query_start[:-1], 0, T - 1)], jnp.where(single, kv_len, 0), context)
        out = _prefill(q, query_start, kv_len, jnp.where(single, 0, counts), context)
        out = jnp.where(single[row][:, None, None], decoded[row], out)
    return jnp.where(valid[:, None, None], out, 0).astype(q_latent.dtype), pages


def _decode(q: jax.Array, kv_len: jax.Array, context: _Context) -> jax.Array:
    """One query a row: q [S, N, C + Hr] -> [S, N, C]; rows with kv_len 0 give zeros."""
    S, N, _ = q.shape
    W = min(GROUP_ROWS, S)
    # Rows of like length share a group, and empty ones cost nothing.
    order = jnp.argsort(-kv_len)
    place = jnp.argsort(order)
    order = jnp.pad(order, (0, -S % W), constant_values=-1)

    def body(group: jax.Array, out: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(order, group * W, W)
        lens = jnp.where(row < 0, 0, kv_len[row])
        attended = _attend(q[row][:, None], row, lens - 1, lens, context)
        return jax.lax.dynamic_update_slice_in_dim(out, attended[:, 0], group * W, 0)

    out = jnp.zeros((len(order), N, context.latent_size), jnp.float32)
    return jax.lax.fori_loop(0, -(-jnp.sum(kv_len > 0) // W), body, out)[place]


def _prefill(q: jax.Array, query_start: jax.Array, kv_len: jax.Array, counts: jax.Array, context: _Context) -> jax.Array:
    """Rows with counts > 0 queries each, a block of queries at a time: q [T, N, C + Hr] -> [T, N, C]; other tokens hold anything."""
    T, N, width = q.shape
    C = context.latent_size
    B = min(max(QUERY_ROWS // N, 8), T)
    blocks = -(-counts // B)
    last_block = jnp.cumsum(blocks)

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(last_block, index, side="right", method="compare_all")
        done = (index - (last_block[row] - blocks[row])) * B
        start = query_start[row] + done
        block = jax.lax.dynamic_slice(padded, (start, 0, 0), (B, N, width))
        attended = _attend(block[None], row[None], (kv_len[row] - counts[row] + done)[None], kv_len[row][None], context)[0]
        old = jax.lax.dynamic_slice(out, (start, 0, 0), (B, N, C))
        mine = jnp.arange(B) < counts[row] - done  # beyond the row's end lie the next one's tokens
        return jax.lax.dynamic_update_slice(out, jnp.where(mine[:, None, None], attended, old), (start, 0, 0))

    padded = jnp.pad(q, ((0, B), (0, 0), (0, 0)))
    return jax.lax.fori_loop(0, last_block[-1], body, jnp.zeros((T + B, N, C), jnp.float32))[:T]


def _attend(q: jax.Array, row: jax.Array, position: jax.Array, kv_len: jax.Array, context: _Context) -> jax.Array:
    """A group of blocks, side by side: scaled queries [W, B, N, C + Hr] -> [W, B, N, C].

    Args:
      row, position, kv_len: i32[W], of each block: its row of the page table, its first query's position, its keys (0: the block is empty).
    """
    W, B, N, width = q.shape
    _, num_pages, page_size, _ = context.pages.shape
    P, C = context.page_table.shape[1], context.latent_size
    in_chunk = min(max(CHUNK // page_size, 1), P)
    L = in_chunk * page_size
    all_pages = context.pages.reshape(-1, page_size, width)
    query_position = position[:, None] + jnp.arange(B)  # [W, B]
    end = jnp.minimum(kv_len, position + B) if context.causal else kv_len

    def body(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = state
        column = index * in_chunk + jnp.arange(in_chunk)
        ids = context.layer * num_pages + context.page_table[row[:, None], jnp.minimum(column, P - 1)]
        keys = all_pages.at[ids].get(mode="promise_in_bounds").astype(jnp.float32).reshape(W, L, width)
        key_position = index * L + jnp.arange(L)
        in_row = key_position < kv_len[:, None]  # [W, L]
        keys = jnp.where(in_row[..., None], keys, 0)  # 0 * NaN is NaN
        visible = jnp.broadcast_to(in_row[:, None], (W, B, L))
        if context.causal:
            visible &= key_position <= query_position[..., None]
        scores = jnp.einsum("wqc,wlc->wql", q.reshape(W, B * N, width), keys).reshape(W, B, N, L)
        scores = jnp.where(visible[:, :, None], scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.exp(scores - new_top[..., None])  # 0 where masked: new_top is at least EMPTY
        shrink = jnp.exp(top - new_top)
        added = jnp.einsum("wql,wlc->wqc", weights.reshape(W, B * N, L), keys[..., :C]).reshape(W, B, N, C)
        return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + added

    start = jnp.full((W, B, N), EMPTY, jnp.float32), jnp.zeros((W, B, N), jnp.float32), jnp.zeros((W, B, N, C), jnp.float32)
    _, total, out = jax.lax.fori_loop(0, jnp.max(-(-end // L)), body, start)
    return out / jnp.maximum(total, 1e-30)[..., None]
