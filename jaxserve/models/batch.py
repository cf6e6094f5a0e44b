"""The tokens of one step and where their rows live in the cache, as arrays of fixed shape."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step's tokens, row after row.

    Args:
      tokens: i32[T] token ids; anything in the padding.
      positions: i32[T], 0-based in their row; 0 in the padding.
      page_table: i32[S, P] page ids, padded with 0.
      query_start: i32[S + 1]; tokens from the last entry on are padding.
      kv_len: i32[S], tokens of each row with this step's included; 0 for an empty row.
      token_types: i32[T], for models that have them; else empty.
      one_token_rows: static; every row has at most one token and row s owns token s (a decode step).
    """

    tokens: jax.Array
    positions: jax.Array
    page_table: jax.Array
    query_start: jax.Array
    kv_len: jax.Array
    token_types: jax.Array | None = None
    one_token_rows: bool = dataclasses.field(default=False, metadata={"static": True})


def cut_rows(batch: Batch, chunk: int, page_size: int) -> Batch:
    """The batch as attention within chunks of so many tokens of a text sees it: a row for each chunk that has new tokens, its own pages.

    Positions are left as they are, in the whole text.
    Raises: NotImplementedError for chunks that do not consist of whole pages.
    """
    if chunk % page_size:
        raise NotImplementedError(f"attention within chunks of {chunk} tokens: needs a page size that divides them, not {page_size}")
    T, (S, P) = len(batch.tokens), batch.page_table.shape
    count = batch.query_start[1:] - batch.query_start[:-1]
    begin = jnp.maximum(batch.kv_len - count, 0)  # position of the first new token
    if batch.one_token_rows:
        row, number = jnp.arange(S), begin // chunk
        start, kv_len = batch.query_start, jnp.maximum(batch.kv_len - number * chunk, 0)
    else:
        most = S + min(S, T // 2) + T // chunk  # a row of one token has one chunk, one that crosses a boundary at least two tokens
        chunks = jnp.where(count > 0, (batch.kv_len - 1) // chunk - begin // chunk + 1, 0)
        end = jnp.cumsum(chunks)
        item = jnp.arange(most)
        row = jnp.searchsorted(end, item, side="right", method="compare_all")
        is_real, row = row < S, jnp.minimum(row, S - 1)
        number = jnp.where(is_real, begin[row] // chunk + item - (end - chunks)[row], 0)
        start = batch.query_start[row] + jnp.maximum(number * chunk - begin[row], 0)
        start = jnp.append(jnp.where(is_real, start, batch.query_start[-1]), batch.query_start[-1])
        kv_len = jnp.where(is_real, jnp.minimum(batch.kv_len[row] - number * chunk, chunk), 0)
    pages = (number * (chunk // page_size))[:, None] + jnp.arange(min(chunk // page_size, P))
    table = batch.page_table[row[:, None], jnp.minimum(pages, P - 1)]
    return dataclasses.replace(
        batch, page_table=table, query_start=start.astype(jnp.int32), kv_len=kv_len.astype(jnp.int32),
    )  # fmt: skip
