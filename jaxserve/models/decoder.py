"""The decoder that every family shares: embed, layers in groups, final norm, logits.

A group with one repeat is applied directly, one with more under lax.scan, with the same code; its cache stays whole and
the kernel gets the layer index, so that nothing is copied (see the measurements in docs/design.md).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.attention import Attention
from jaxserve.models.batch import Batch
from jaxserve.models.embed import Embed
from jaxserve.models.kv_cache import KVCache
from jaxserve.models.mlp import Mlp
from jaxserve.models.norm import Norm
from jaxserve.models.rope import Angles, rope_angles
from jaxserve.models.spec import LayerGroup, LayerSpec, ModelSpec


class Layer(nnx.Module):
    """One pre-norm block of a group; its parameters are stacked over the group's repeats."""

    def __init__(self, spec: LayerSpec, width: int, *, repeats: int, dtype: jnp.dtype) -> None:
        self.attention_norm = Norm(spec.norm, width, repeats=repeats, dtype=dtype)
        self.attention = Attention(spec.attention, width, repeats=repeats, dtype=dtype)
        self.mlp_norm = Norm(spec.norm, width, repeats=repeats, dtype=dtype)
        self.mlp = Mlp(spec.mlp, width, repeats=repeats, dtype=dtype)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: jax.Array, batch: Batch, angles: Angles) -> tuple[jax.Array, jax.Array]:
        """Advance [T, D] through the block; returns it and the layer's cache."""
        with jax.named_scope("attention"):
            attended, pages = self.attention(self.attention_norm(x), pages, layer, batch, angles)
            x = x + attended
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x)), pages


class Decoder(nnx.Module):
    """A whole model, built abstractly: its parameters are shapes until a dict of arrays is merged in.

    Args:
      spec: the model.
      groups: its layers as folded by fold_layers.
      dtype: of weights and activations.
    """

    def __init__(self, spec: ModelSpec, groups: tuple[LayerGroup, ...], *, dtype: jnp.dtype) -> None:
        self.spec = spec
        self.embed = Embed(spec.vocab_size, spec.width, dtype=dtype)
        self.groups = nnx.List(
            [nnx.List([Layer(layer, spec.width, repeats=group.repeats, dtype=dtype) for layer in group.pattern]) for group in groups]
        )
        self.final_norm = Norm(spec.final_norm, spec.width, repeats=None, dtype=dtype)
        self.head = None if spec.tied else Embed(spec.vocab_size, spec.width, dtype=dtype)

    def __call__(self, batch: Batch, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Hidden states [T, D] of the batch's tokens, before the final norm, and the cache with their keys and values."""
        with jax.named_scope("embed"):
            x = self.embed(batch.tokens)
        ropes = dict.fromkeys(layer.attention.rope for layer in self.spec.layers if layer.attention.rope is not None)
        angles = rope_angles(batch.positions, tuple(ropes))
        new_cache = []
        for layers, pages in zip(self.groups, cache, strict=True):
            x, pages = _apply_group(layers, x, pages, batch, angles)
            new_cache.append(pages)
        return x, tuple(new_cache)

    def logits(self, x: jax.Array) -> jax.Array:
        """f32[Q, V] for hidden states [Q, D]."""
        with jax.named_scope("head"):
            return (self.head or self.embed).logits(self.final_norm(x))


def _apply_group(
    layers: nnx.List[Layer], x: jax.Array, pages: tuple[jax.Array, ...], batch: Batch, angles: Angles
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    graphdef, state = nnx.split(layers)
    stacked: dict[Any, Any] = nnx.to_pure_dict(state)
    repeats = pages[0].shape[0]
    if repeats == 1:
        return _apply_pattern(graphdef, x, pages, jnp.int32(0), jax.tree.map(lambda leaf: leaf[0], stacked), batch, angles)

    def body(carry: tuple[jax.Array, tuple[jax.Array, ...]], item: tuple[jax.Array, Any]) -> tuple[Any, None]:
        x, pages = carry
        index, weights = item
        return _apply_pattern(graphdef, x, pages, index, weights, batch, angles), None

    return jax.lax.scan(body, (x, pages), (jnp.arange(repeats, dtype=jnp.int32), stacked))[0]


@functools.partial(jax.jit, static_argnums=0)  # traced once for all groups that are alike, then inlined
def _apply_pattern(
    graphdef: nnx.GraphDef[nnx.List[Layer]],
    x: jax.Array,
    pages: tuple[jax.Array, ...],
    index: jax.Array,
    weights: Any,
    batch: Batch,
    angles: Angles,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    written = []
    for layer, its_pages in zip(nnx.merge(graphdef, weights), pages, strict=True):
        x, its_pages = layer(x, its_pages, index, batch, angles)
        written.append(its_pages)
    return x, tuple(written)
