"""Dealing out a model: every head, row and column reaches exactly the devices that need it, and padding adds nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.sharding import Split
from jaxserve.weights.place import take

sizes = st.integers(1, 12)
splits = st.builds(Split, expert=st.sampled_from([1, 2, 3]), tensor=st.sampled_from([1, 2, 3, 4, 8, 16]))


@given(kv_heads=sizes, group=sizes, split=splits)
def test_every_query_is_on_one_device_with_the_key_it_reads(kv_heads: int, group: int, split: Split) -> None:
    heads = split.heads(kv_heads * group, kv_heads)
    found = [head for queries in heads.queries for head in queries if head is not None]
    assert sorted(found) == list(range(kv_heads * group))
    assert {len(queries) for queries in heads.queries} == {heads.num_queries}
    assert {len(keys) for keys in heads.keys} == {heads.num_keys}
    assert heads.num_queries % heads.num_keys == 0
    for queries, keys in zip(heads.queries, heads.keys, strict=True):
        for i, head in enumerate(queries):
            if head is not None:
                assert keys[i // (heads.num_queries // heads.num_keys)] == head // group


@given(kv_heads=sizes, group=sizes, split=splits)
def test_projections_over_the_devices_add_up_to_the_whole(kv_heads: int, group: int, split: Split) -> None:
    """Rows of a fused matrix and columns of the one behind it are cut alike: their product, summed over devices, is that of the whole."""
    N, K, H, D = kv_heads * group, kv_heads, 3, 5
    heads = split.heads(N, K)
    fused, out = np.random.default_rng(0).standard_normal((2, (N + 2 * K) * H, D))
    out = out[: N * H].T
    rows, columns = heads.cut(0, ("queries", H, 0), ("keys", H, N * H), ("keys", H, (N + K) * H)), heads.cut(1, ("queries", H, 0))
    if rows is None or columns is None:
        assert split.num_devices == 1
        return
    total = np.zeros((D, D))
    for row_share, column_share, keys in zip(rows.shares, columns.shares, heads.keys, strict=True):
        local = take(fused, row_share, 0)
        assert len(local) == rows.size == (heads.num_queries + 2 * heads.num_keys) * H
        total += take(out, column_share, 1) @ local[: heads.num_queries * H]
        for i, head in enumerate(keys):
            for section, offset in enumerate((N, N + K)):
                at = (heads.num_queries + section * heads.num_keys + i) * H
                expected = np.zeros((H, D)) if head is None else fused[(offset + head) * H :][:H]
                np.testing.assert_array_equal(local[at : at + H], expected)
    np.testing.assert_allclose(total, out @ fused[: N * H], atol=1e-9)


@given(width=st.integers(1, 40), split=splits)
def test_gate_and_up_are_cut_alike(width: int, split: Split) -> None:
    both, down = split.even("mlp", 0, width, width), split.even("mlp", 1, width)
    if both is None or down is None:
        assert split.num_devices == 1
        return
    gate, up, out = np.random.default_rng(0).standard_normal((3, width, 5))
    total = 0
    for share, columns in zip(both.shares, down.shares, strict=True):
        local = take(np.concatenate([gate, up]), share, 0)
        total = total + take(out.T, columns, 1) @ np.multiply(*np.split(local, 2))
    np.testing.assert_allclose(total, out.T @ (gate * up), atol=1e-9)


@pytest.mark.parametrize(("kv_heads", "devices", "held"), [(2, 8, 1), (8, 8, 1), (3, 2, 2), (1, 4, 1), (16, 8, 2)])
def test_devices_hold_no_more_keys_than_they_must(kv_heads: int, devices: int, held: int) -> None:
    assert Split(tensor=devices).heads(kv_heads * 2, kv_heads).num_keys == held


def test_experts_are_cut_along_an_axis_of_their_own() -> None:
    split = Split(expert=4, tensor=2)
    assert split.count("experts") == 4
    assert split.count("expert_mlp") == 2
    assert split.count("mlp") == 8
