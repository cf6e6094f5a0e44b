"""The paged cache of keys and values: its shape, its bytes, its arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxserve.models.spec import AttentionSpec, LayerGroup, MlaSpec
from jaxserve.sharding import WHOLE, Split
from pallas_kernels import mla_attention
from pallas_kernels.ragged_paged_attention import cache_shape

KVCache = tuple[tuple[jax.Array, ...], ...]
"""Per layer group, per layer of its pattern: pages of R layers, in the shape that the attention kernel wants."""


def cache_shapes(
    groups: tuple[LayerGroup, ...], *, num_pages: int, page_size: int, dtype: jnp.dtype, platform: str | None = None,
    split: Split = WHOLE, of_all: bool = False,
) -> tuple[tuple[jax.ShapeDtypeStruct, ...], ...]:  # fmt: skip
    """Abstract KVCache for the groups, as the kernels of a platform (default: the one at hand) want it.

    Args:
      split: how many devices share the heads; the shapes are one device's.
      of_all: the shapes are those of all of these devices together, one after the other along the axis of heads.
    """

    def shape(repeats: int, attention: AttentionSpec | MlaSpec) -> tuple[int, ...]:
        if isinstance(attention, MlaSpec):  # every device has all of it
            return mla_attention.cache_shape(repeats, num_pages, page_size, attention.latent_size, attention.rope.dim)
        num_heads = split.heads(attention.num_heads, attention.num_kv_heads).num_keys * (split.count("heads") if of_all else 1)
        return cache_shape(
            repeats, num_pages, page_size, num_heads, attention.head_size, implementation=attention.implementation, platform=platform
        )

    return tuple(tuple(jax.ShapeDtypeStruct(shape(group.repeats, layer.attention), dtype) for layer in group.pattern) for group in groups)


def cache_specs(groups: tuple[LayerGroup, ...], *, split: Split, platform: str | None = None) -> tuple[tuple[PartitionSpec, ...], ...]:
    """The axes of the mesh along each axis of a KVCache: those of the heads, where it has heads."""

    def spec(local: jax.ShapeDtypeStruct, of_all: jax.ShapeDtypeStruct) -> PartitionSpec:
        return PartitionSpec(*(split.names("heads") if a != b else None for a, b in zip(local.shape, of_all.shape, strict=True)))

    one, all_ = (
        cache_shapes(groups, num_pages=1, page_size=1, dtype=jnp.dtype(jnp.float32), platform=platform, split=split, of_all=of_all)
        for of_all in (False, True)
    )
    return jax.tree.map(spec, one, all_)
