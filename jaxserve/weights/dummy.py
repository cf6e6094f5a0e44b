"""Parameters of random numbers, for measuring a model's speed without its weights."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.params import Params
from jaxserve.sharding import Placement

_BOUND = 1e-3  # as in vLLM: sums stay finite whatever the model does with them


def dummy_params(shapes: Mapping[str, jax.ShapeDtypeStruct], placements: Mapping[str, Placement]) -> Params:
    """Every parameter, uniform in [-1e-3, 1e-3], made where it lies; the same in every run.

    Args:
      shapes: of the share of one device.
    """
    return {path: _make(path, placements[path], leaf) for path, leaf in shapes.items()}


def _make(path: str, placement: Placement, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    make = _jitted(placement.shape(leaf.shape), jnp.dtype(leaf.dtype), placement.format)
    return make(jnp.uint32(zlib.crc32(path.encode())))


@functools.cache
def _jitted(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
    return jax.jit(functools.partial(_uniform, shape=shape, dtype=dtype), out_shardings=place)


def _uniform(seed: jax.Array, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers from the bits of their index, mixed: nothing else needs memory, as it does for jax's own random numbers.

    Source: the last steps of MurmurHash3, for each axis.
    """
    bits = jnp.full(shape, seed)
    for axis in range(len(shape)):
        bits = bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 16)
    return (((bits >> 8).astype(jnp.float32) * 2.0**-23 - 1) * _BOUND).astype(dtype)
