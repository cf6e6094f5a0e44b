"""Random weights, without a checkpoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxserve.models.params import Params
from jaxserve.sharding import Placement
from jaxserve.weights.dummy import dummy_params


def make(**shapes: tuple[int, ...]) -> Params:
    place = Placement(target=SingleDeviceSharding(jax.devices()[0]), cuts=(), stacked=False)
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in shapes.items()}
    return dummy_params(leaves, dict.fromkeys(leaves, place))


def test_numbers_are_spread_evenly_within_bounds() -> None:
    x = np.asarray(make(w=(64, 200))["w"], np.float64)
    assert np.max(np.abs(x)) <= 1e-3
    counts, _ = np.histogram(x, bins=10, range=(-1e-3, 1e-3))
    assert counts.min() > 0.85 * x.size / 10
    rows = np.asarray(np.corrcoef(x))[~np.eye(64, dtype=bool)]
    assert np.max(np.abs(rows)) < 0.4  # of 200 numbers: five deviations


def test_parameters_differ_and_are_the_same_in_every_run() -> None:
    first, again = make(a=(4, 8), b=(4, 8)), make(b=(4, 8), a=(4, 8))
    np.testing.assert_array_equal(first["a"], again["a"])
    assert not np.array_equal(first["a"], first["b"])
    np.testing.assert_array_equal(np.asarray(first["a"], np.float32)[0, :2], [-0.000774383544921875, 0.000576019287109375])
