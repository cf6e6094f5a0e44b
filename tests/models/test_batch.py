"""Rows cut into chunks: attention over them is attention within chunks, for any mix of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.models.batch import Batch, cut_rows

PAGE, CHUNK, P = 2, 6, 13
ROWS, TOKENS = 4, 70
cut = jax.jit(cut_rows, static_argnums=(1, 2))  # compiled once: all batches are of one shape


def make_batch(rows: list[tuple[int, int]], *, one_token_rows: bool) -> Batch:
    """Rows of (new tokens, context with them), then empty ones; page p of row s is 100 * s + p."""
    rows = rows + [(0, 0)] * (ROWS - len(rows))
    start = np.concatenate([[0], np.cumsum([count for count, _ in rows])])
    T = ROWS if one_token_rows else TOKENS
    return Batch(
        tokens=jnp.zeros(T, jnp.int32), positions=jnp.zeros(T, jnp.int32),
        page_table=jnp.arange(len(rows))[:, None] * 100 + jnp.arange(P), query_start=jnp.array(start, jnp.int32),
        kv_len=jnp.array([length for _, length in rows], jnp.int32), one_token_rows=one_token_rows,
    )  # fmt: skip


def visible(batch: Batch) -> dict[int, list[tuple[int, int]]]:
    """The slots (page, offset) that each token attends to, oldest first, as the attention kernels read a batch."""
    start, lens, table = (np.asarray(field) for field in (batch.query_start, batch.kv_len, batch.page_table))
    assert (np.diff(start) >= 0).all()
    seen = {}
    for s, length in enumerate(lens):
        for token in range(start[s], start[s + 1]):
            last = length - start[s + 1] + token
            seen[token] = [(int(table[s, p // PAGE]), p % PAGE) for p in range(last + 1)]
    return seen


def check(rows: list[tuple[int, int]], *, one_token_rows: bool) -> None:
    batch = make_batch(rows, one_token_rows=one_token_rows)
    expected = {}
    for token, slots in visible(batch).items():
        first = (len(slots) - 1) // CHUNK * CHUNK
        expected[token] = slots[first:]
    assert visible(cut(batch, CHUNK, PAGE)) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 17), st.integers(0, 9)), max_size=ROWS))
def test_tokens_see_their_chunk(rows: list[tuple[int, int]]) -> None:
    check([(count, count and count + before) for count, before in rows], one_token_rows=False)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 25), max_size=ROWS))
def test_decode_rows_see_their_chunk(lens: list[int]) -> None:
    check([(1, length) for length in lens], one_token_rows=True)


def test_chunks_of_broken_pages_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="a page size that divides them, not 4"):
        cut_rows(make_batch([(1, 1)], one_token_rows=True), CHUNK, 4)
