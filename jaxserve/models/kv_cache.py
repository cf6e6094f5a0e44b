"""The paged cache of keys and values: its shape, its bytes, its arrays."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxserve.models.spec import LayerGroup

KVCache = tuple[tuple[jax.Array, ...], ...]
"""Per layer group, per layer of its pattern: [R, num_pages, page_size, 2K, H]."""


def cache_shapes(
    groups: tuple[LayerGroup, ...], *, num_pages: int, page_size: int, dtype: jnp.dtype
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], ...]:
    """Abstract KVCache for the groups."""
    return tuple(
        tuple(
            jax.ShapeDtypeStruct((group.repeats, num_pages, page_size, 2 * layer.attention.num_kv_heads, layer.attention.head_size), dtype)
            for layer in group.pattern
        )
        for group in groups
    )


def page_bytes(groups: tuple[LayerGroup, ...], *, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes that one page takes over all layers."""
    shapes = cache_shapes(groups, num_pages=1, page_size=page_size, dtype=dtype)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
