"""The paged cache of keys and values: its shape, its bytes, its arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.models.spec import AttentionSpec, LayerGroup
from pallas_kernels.ragged_paged_attention import cache_shape

KVCache = tuple[tuple[jax.Array, ...], ...]
"""Per layer group, per layer of its pattern: pages of R layers, in the shape that the attention kernel wants."""


def cache_shapes(
    groups: tuple[LayerGroup, ...], *, num_pages: int, page_size: int, dtype: jnp.dtype, platform: str | None = None
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], ...]:
    """Abstract KVCache for the groups, as the kernels of a platform (default: the one at hand) want it."""

    def shape(repeats: int, attention: AttentionSpec) -> tuple[int, ...]:
        return cache_shape(repeats, num_pages, page_size, attention.num_kv_heads, attention.head_size, platform=platform)

    return tuple(tuple(jax.ShapeDtypeStruct(shape(group.repeats, layer.attention), dtype) for layer in group.pattern) for group in groups)
