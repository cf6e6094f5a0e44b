"""Vectors of texts that come in pieces, in any company: what pooling by hand gives, whatever a neighbour holds."""

from __future__ import annotations

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.models.batch import Batch
from jaxserve.models.pooling import finish_pool, pool_step, pooled_tokens
from jaxserve.models.spec import PoolMethod

METHODS: tuple[PoolMethod, ...] = get_args(PoolMethod)
D, T, S = 3, 16, 4


def pooled_by_hand(method: PoolMethod, rows: np.ndarray) -> np.ndarray:
    counts = np.arange(1, len(rows) + 1)[:, None]
    return {
        "cls": rows[0], "last": rows[-1], "mean": rows.mean(0), "max": rows.max(0), "weighted_mean": (rows * counts).sum(0) / counts.sum(),
        "mean_sqrt_len": rows.sum(0) / len(rows) ** 0.5,
    }[method]  # fmt: skip


def step(method: PoolMethod, pieces: list[tuple[np.ndarray, int]], before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and vectors after a step over pieces of texts: hidden states, and the position at which each begins."""
    counts = [len(rows) for rows, _ in pieces]
    starts = np.full(S + 1, sum(counts), np.int32)
    starts[: len(counts) + 1] = np.cumsum([0, *counts])
    hidden, positions = np.full((T, D), np.nan, np.float32), np.zeros(T, np.int32)
    for i, (rows, begin) in enumerate(pieces):
        hidden[starts[i] : starts[i + 1]], positions[starts[i] : starts[i + 1]] = rows, np.arange(begin, begin + len(rows))
    kv_len = np.zeros(S, np.int32)
    kv_len[: len(pieces)] = [begin + len(rows) for rows, begin in pieces]
    batch = Batch(
        tokens=jnp.zeros(T, jnp.int32), positions=jnp.asarray(positions), page_table=jnp.zeros((S, 1), jnp.int32),
        query_start=jnp.asarray(starts), kv_len=jnp.asarray(kv_len),
    )  # fmt: skip
    sums, vectors = _jitted(method, jnp.asarray(hidden), jnp.asarray(before), batch)
    return np.asarray(sums), np.asarray(vectors)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(method: PoolMethod, hidden: jax.Array, before: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    wanted = pooled_tokens(method, batch)
    sums = pool_step(method, hidden if wanted is None else hidden[wanted], before, batch)
    return sums, finish_pool(method, sums, batch.kv_len, [])


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_texts_in_pieces_give_what_pooling_by_hand_gives(method: PoolMethod, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    texts = [rng.standard_normal((data.draw(st.integers(1, 12)), D)).astype(np.float32) for _ in range(data.draw(st.integers(1, S)))]
    before = np.full((S, D), np.nan, np.float32)  # what a slot's last text left behind
    done = [0] * len(texts)
    slots = list(rng.permutation(S)[: len(texts)])
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        going = [i for i, text in enumerate(texts) if done[i] < len(text)]
        counts = {i: data.draw(st.integers(1, min(4, len(texts[i]) - done[i]))) for i in going}
        kept = np.full((S, D), np.nan, np.float32)
        kept[: len(going)] = before[[slots[i] for i in going]]
        sums, vectors = step(method, [(texts[i][done[i] : done[i] + counts[i]], done[i]) for i in going], kept)
        for row, i in enumerate(going):
            before[slots[i]] = sums[row]
            done[i] += counts[i]
            if done[i] == len(texts[i]):
                np.testing.assert_allclose(vectors[row], pooled_by_hand(method, texts[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_text_that_is_not_finite_spoils_no_other(method: PoolMethod) -> None:
    rows = np.random.default_rng(0).standard_normal((3, D)).astype(np.float32)
    bad = np.full((4, D), np.nan, np.float32)
    _, vectors = step(method, [(bad, 0), (rows, 0), (bad, 2)], np.full((S, D), np.nan, np.float32))
    np.testing.assert_allclose(vectors[1], pooled_by_hand(method, rows), rtol=1e-5)
    assert np.isnan(vectors[[0, 2]]).all()
