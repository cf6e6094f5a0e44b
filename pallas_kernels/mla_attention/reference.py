"""The contract of attention over DeepSeek's compressed cache (multi-head latent attention, projections absorbed), in plain jnp.

A token is cached as one vector for all heads: its latent, C numbers, and its rotated rope key, Hr numbers. A head's keys and values are
linear in the latent, so its query is brought into the latent space before, and its output out of it after. What remains is attention with
one KV head, whose keys are the vectors and whose values are the first C numbers of the same vectors:

    pages[layer, page, offset] = latent (C) | rope key (Hr)

Rows, positions and pages are as in ragged_paged_attention/reference.py.
Source: DeepSeek-V2, section 2.1 and appendix C.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.reference import MASKED, token_rows


def cache_shape(num_layers: int, num_pages: int, page_size: int, latent_size: int, rope_size: int) -> tuple[int, ...]:
    """The same for every implementation."""
    return num_layers, num_pages, page_size, latent_size + rope_size


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
    """Write new latents and rope keys into their pages, then attend to all of each row's pages, in float32.

    Args:
      q_latent: [T, N, C] queries times the absorbed key projection. q_rope: [T, N, Hr] their rotated part.
      latent: [T, C] new latents, normalized. rope_key: [T, Hr] new rope keys, rotated.
      pages: [R, num_pages, page_size, C + Hr] cache, bfloat16 or float32. Donated by convention: implementations update it in place.
      layer: index into R.
      page_table: i32[S, P]; entries beyond a row's pages are unspecified but valid page ids (pad with 0).
      query_start: i32[S + 1], ascending; tokens from query_start[S] on are padding: their numbers may be anything, NaN too.
      kv_len: i32[S], tokens of each row including the new ones; 0 for an empty row.
      sm_scale: multiplies the scores; of the head size before absorption, not of C.
      causal: a query sees keys up to its own position; otherwise all kv_len of them.
      one_token_rows: static promise that T == S and row s owns token s or, at the end, nothing; implementations may use it.
    Returns: [T, N, C] in q_latent's dtype, weighted sums of latents (rows of padding tokens are zero), and the cache.
    Slots that hold no token (beyond kv_len, free pages) may contain anything, NaN too: they never reach the output.
    """
    T, _, C = q_latent.shape
    S, P = page_table.shape
    page_size, width = pages.shape[2:]
    del one_token_rows  # the answer is the same
    row, position, valid = token_rows(T, query_start, kv_len)
    pages = write_pages(pages, layer, latent, rope_key, row=row, position=position, valid=valid, page_table=page_table)
    keys = pages[layer][page_table].reshape(S, P * page_size, width)[row].astype(jnp.float32)  # [T, L, C + Hr]
    q = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32)
    scores = jnp.einsum("tnc,tlc->tnl", q, keys) * sm_scale
    key_position = jnp.arange(P * page_size)[None, :]
    visible = (key_position < kv_len[row][:, None]) & valid[:, None]
    if causal:
        visible &= key_position <= position[:, None]
    scores = jnp.where(visible[:, None, :], scores, MASKED)
    weights = jnp.where(visible[:, None, :], jnp.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    values = jnp.where(visible[:, :, None], keys[..., :C], 0.0)  # 0 * NaN is NaN
    out = jnp.einsum("tnl,tlc->tnc", weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30), values)
    return jnp.where(valid[:, None, None], out, 0.0).astype(q_latent.dtype), pages


def write_pages(
    pages: jax.Array,
    layer: jax.Array | int,
    latent: jax.Array,
    rope_key: jax.Array,
    *,
    row: jax.Array,
    position: jax.Array,
    valid: jax.Array,
    page_table: jax.Array,
) -> jax.Array:
    """The cache with each valid token's vector in its slot; shapes as in mla_attention."""
    num_pages, page_size = pages.shape[1:3]
    new = jnp.concatenate([latent, rope_key], axis=-1).astype(pages.dtype)
    page = jnp.where(valid, page_table[row, position // page_size], num_pages)  # out of range: dropped
    # XLA makes something else of a scatter of one token, for which it copies the whole cache.
    more = max(2 - len(page), 0)
    page, offset = jnp.pad(page, (0, more), constant_values=num_pages), jnp.pad(position % page_size, (0, more))
    return pages.at[layer, page, offset].set(jnp.pad(new, ((0, more), (0, 0))), mode="drop")
