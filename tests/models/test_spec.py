"""Folding layers into groups, and what depends on the longest text."""

from __future__ import annotations

import dataclasses

from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.rope import rope_frequencies
from jaxserve.models.spec import (
    AttentionSpec,
    DynamicScaling,
    LayerSpec,
    LongRopeScaling,
    ModelSpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
    fold_layers,
    limit_length,
)


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


def limited(scaling: RopeScaling | None, max_len: int) -> list[float]:
    rope = RopeSpec(dim=4, theta=100.0, scaling=scaling)
    base = layer(None)
    layers = (dataclasses.replace(base, attention=dataclasses.replace(base.attention, rope=rope)), base)
    spec = ModelSpec(width=8, vocab_size=9, max_len=64, layers=layers, final_norm=None, tied=True)
    found = limit_length(spec, max_len)
    assert found.max_len == min(max_len, 64)
    assert found.layers[1] == base
    assert found.layers[0].attention.rope is not None
    return rope_frequencies(found.layers[0].attention.rope).tolist()


def test_rotation_follows_the_longest_text_that_there_can_be() -> None:
    plain = limited(None, 64)
    dynamic = DynamicScaling(factor=2.0, original_len=16, max_len=64)
    assert limited(dynamic, 16) == limited(dynamic, 5) == plain
    assert limited(dynamic, 64)[1] < limited(dynamic, 17)[1] < plain[1]
    longrope = LongRopeScaling(short=(1.0, 2.0), long=(4.0, 8.0), attention_factor=1.0, original_len=16, max_len=64)
    assert limited(longrope, 16) == [plain[0], plain[1] / 2]
    assert limited(longrope, 17) == [plain[0] / 4, plain[1] / 8]
