"""The tokens of one step and where their rows live in the cache, as arrays of fixed shape."""

from __future__ import annotations

import dataclasses

import jax


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
      one_token_rows: static; every row has at most one token and row s owns token s (a decode step).
    """

    tokens: jax.Array
    positions: jax.Array
    page_table: jax.Array
    query_start: jax.Array
    kv_len: jax.Array
    one_token_rows: bool = dataclasses.field(default=False, metadata={"static": True})
