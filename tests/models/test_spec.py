"""Folding layers into groups."""

from __future__ import annotations

import dataclasses

from jaxserve.models.spec import AttentionSpec, LayerSpec, MlpSpec, NormSpec, fold_layers


def layer(window: int | None) -> LayerSpec:
    attention = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=8, sm_scale=1.0, rope=None, window=window)
    return LayerSpec(attention=attention, mlp=MlpSpec(width=16, activation="silu"), norm=NormSpec(eps=1e-5))


def shape(windows: list[int | None]) -> list[tuple[int, int, int]]:
    groups = fold_layers(tuple(layer(window) for window in windows), scan=True)
    return [(group.first, group.repeats, len(group.pattern)) for group in groups]


def test_equal_layers_fold_into_one_group() -> None:
    assert shape([None] * 7) == [(0, 7, 1)]


def test_pattern_and_rest_fold_as_in_gemma() -> None:
    assert shape(([5] * 5 + [None]) * 3 + [5, 5]) == [(0, 3, 6), (18, 2, 1)]


def test_prefix_of_other_layers_keeps_its_own_group() -> None:
    assert shape([3, *[None] * 4]) == [(0, 1, 1), (1, 4, 1)]


def test_without_scan_each_layer_is_a_group() -> None:
    layers = (layer(None),) * 3
    assert [dataclasses.astuple(group)[:2] for group in fold_layers(layers, scan=False)] == [(0, 1), (1, 1), (2, 1)]
