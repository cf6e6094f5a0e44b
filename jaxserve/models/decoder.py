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
from jaxserve.models.embed import Embed, PositionEmbed, Projection
from jaxserve.models.kv_cache import KVCache
from jaxserve.models.linear import WholeParam
from jaxserve.models.mla import LatentAttention
from jaxserve.models.mlp import Mlp
from jaxserve.models.mlp_spec import MlpSpec
from jaxserve.models.moe import Moe
from jaxserve.models.norm import Norm
from jaxserve.models.pooling import PoolLayer
from jaxserve.models.rope import Angles, rope_angles
from jaxserve.models.spec import AttentionSpec, LayerGroup, LayerSpec, ModelSpec
from jaxserve.sharding import WHOLE, Split


class Layer(nnx.Module):
    """One block of a group; its parameters are stacked over the group's repeats."""

    def __init__(self, spec: LayerSpec, width: int, *, repeats: int, dtype: jnp.dtype, platform: str | None, split: Split) -> None:
        self.spec = spec
        if spec.placement != "pre_mlp":
            self.attention_norm = Norm(spec.norm, width, repeats=repeats, dtype=dtype)
        if isinstance(spec.attention, AttentionSpec):
            self.attention = Attention(spec.attention, width, repeats=repeats, dtype=dtype, platform=platform, split=split)
        else:
            self.attention = LatentAttention(spec.attention, width, repeats=repeats, dtype=dtype, platform=platform, split=split)
        if spec.placement != "parallel_shared":
            self.mlp_norm = Norm(spec.norm, width, repeats=repeats, dtype=dtype)
        if isinstance(spec.mlp, MlpSpec):
            self.mlp = Mlp(spec.mlp, width, repeats=repeats, dtype=dtype, split=split)
        else:
            self.mlp = Moe(spec.mlp, width, repeats=repeats, dtype=dtype, platform=platform, split=split)
        if spec.placement == "sandwich":
            self.attention_post_norm = Norm(spec.norm, width, repeats=repeats, dtype=dtype)
            self.mlp_post_norm = Norm(spec.norm, width, repeats=repeats, dtype=dtype)

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: jax.Array, batch: Batch, angles: Angles, wanted: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Advance [T, D] through the block; returns it, or only its tokens `wanted`, and the layer's cache."""
        placement = self.spec.placement
        with jax.named_scope("attention"):
            inputs = x if placement in ("post", "post_sum", "pre_mlp") else self.attention_norm(x)
            attended, pages = self.attention(inputs, pages, layer, batch, angles, wanted)
            x, inputs = (x, inputs) if wanted is None else (x[wanted], inputs[wanted])
        mlp = functools.partial(self._mlp, layer=layer, batch=batch, wanted=wanted)
        match placement:
            case "parallel" | "parallel_shared":
                with jax.named_scope("mlp"):
                    return x + self._scaled(attended + mlp(inputs if placement == "parallel_shared" else self.mlp_norm(x))), pages
            case "pre" | "pre_mlp":
                x = x + self._scaled(attended)
                with jax.named_scope("mlp"):
                    return x + self._scaled(mlp(self.mlp_norm(x))), pages
            case "sandwich":
                x = x + self._scaled(self.attention_post_norm(attended))
                with jax.named_scope("mlp"):
                    return x + self._scaled(self.mlp_post_norm(mlp(self.mlp_norm(x)))), pages
            case "post":
                x = x + self._scaled(self.attention_norm(attended))
                with jax.named_scope("mlp"):
                    return x + self._scaled(self.mlp_norm(mlp(x))), pages
            case "post_sum":
                x = self.attention_norm(x + self._scaled(attended))
                with jax.named_scope("mlp"):
                    return self.mlp_norm(x + self._scaled(mlp(x))), pages
            case "pre_carried":
                x = self.mlp_norm(inputs + self._scaled(attended))
                with jax.named_scope("mlp"):
                    return x + self._scaled(mlp(x)), pages

    def _mlp(self, x: jax.Array, *, layer: jax.Array, batch: Batch, wanted: jax.Array | None) -> jax.Array:
        if isinstance(self.mlp, Mlp):
            return self.mlp(x)
        valid = jnp.arange(len(batch.tokens)) < batch.query_start[-1]
        return self.mlp(x, layer, valid if wanted is None else valid[wanted])

    def _scaled(self, branch: jax.Array) -> jax.Array:
        return branch if self.spec.residual_scale == 1 else branch * self.spec.residual_scale


class Decoder(nnx.Module):
    """A whole model, built abstractly: its parameters are shapes until a dict of arrays is merged in.

    Args:
      spec: the model.
      groups: its layers as folded by fold_layers.
      dtype: of weights and activations.
      platform: whose kernels to use, "cpu", "tpu" or "gpu"; default: the one at hand.
      split: how many devices share it; then the model is one device's part, and runs under a shard_map over their mesh.
    """

    def __init__(
        self, spec: ModelSpec, groups: tuple[LayerGroup, ...], *, dtype: jnp.dtype, platform: str | None = None, split: Split = WHOLE
    ) -> None:
        self.spec = spec
        embed_width = spec.embed_width or spec.width
        self.embed = Embed(spec.vocab_size, embed_width, dtype=dtype, split=split)
        self.positions = None if spec.positions is None else PositionEmbed(spec.positions, spec.width, dtype=dtype)
        self.token_types = Embed(spec.token_types, spec.width, dtype=dtype) if spec.token_types else None
        self.embed_norm = None if spec.embed_norm is None else Norm(spec.embed_norm, spec.width, repeats=None, dtype=dtype)
        self.embed_in = None if embed_width == spec.width else Projection(embed_width, spec.width, dtype=dtype)
        self.embed_out = None if embed_width == spec.width else Projection(spec.width, embed_width, dtype=dtype)
        self.groups = nnx.List(
            [
                nnx.List(
                    [
                        Layer(layer, spec.width, repeats=group.repeats, dtype=dtype, platform=platform, split=split)
                        for layer in group.pattern
                    ]
                )
                for group in groups
            ]
        )
        self.final_norm = None if spec.final_norm is None else Norm(spec.final_norm, spec.width, repeats=None, dtype=dtype)
        self.head = None if spec.tied or spec.pool else Embed(spec.vocab_size, embed_width, dtype=dtype, bias=spec.head_bias, split=split)
        layers = spec.pool.layers if spec.pool else ()
        widths = spec.width, *(layer.width for layer in layers)
        self.pool = nnx.List([PoolLayer(layer, num_in, dtype=dtype) for layer, num_in in zip(layers, widths, strict=False)])

    def __call__(self, batch: Batch, cache: KVCache, wanted: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """Hidden states before the final norm, and the cache with the batch's keys and values.

        Args:
          wanted: i32[Q], the tokens whose hidden states are returned, [Q, D]; None is all of them, [T, D].
        """
        with jax.named_scope("embed"):
            x = self._embedded(batch)
        ropes = dict.fromkeys(layer.attention.rope for layer in self.spec.layers if layer.attention.rope is not None)
        angles = rope_angles(batch.positions, tuple(ropes))
        new_cache: list[tuple[jax.Array, ...]] = []
        for layers, pages in zip(self.groups, cache, strict=True):
            last = len(new_cache) + 1 == len(cache)
            x, pages = _apply_group(layers, x, pages, batch, angles, wanted if last else None)
            new_cache.append(pages)
        return x, tuple(new_cache)

    def _embedded(self, batch: Batch) -> jax.Array:
        x = self.embed(batch.tokens)
        if self.spec.embed_scale != 1:
            x = x * jnp.asarray(self.spec.embed_scale, x.dtype)
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.positions is not None:
            x = x + self.positions(batch.positions)
        if self.token_types is not None:
            assert batch.token_types is not None, "the model has token types"
            x = x + self.token_types(batch.token_types)
        return x if self.embed_norm is None else self.embed_norm(x)

    def normed(self, x: jax.Array) -> jax.Array:
        """Hidden states [Q, D] behind the final norm, which is what pooling takes."""
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, x: jax.Array) -> jax.Array:
        """f32[Q, V] for hidden states [Q, D]."""
        return self.gather_logits(self.own_logits(x))

    @property
    def head_parts(self) -> tuple[str, ...]:
        """The modules whose parameters own_logits reads; those that the model does not have have none."""
        return "final_norm", "embed_out", "embed" if self.head is None else "head"

    def gather_logits(self, logits: jax.Array) -> jax.Array:
        """f32[Q, V], the own logits of all devices."""
        with jax.named_scope("head"):
            return (self.head or self.embed).gather(logits)

    def own_logits(self, x: jax.Array) -> jax.Array:
        """The logits of this device's part of the vocabulary; all of them if it has the whole."""
        with jax.named_scope("head"):
            x = self.normed(x)
            if self.embed_out is not None:
                x = self.embed_out(x)
            logits = (self.head or self.embed).logits(x)
            if self.spec.logit_scale != 1:
                logits = logits * self.spec.logit_scale
            softcap = self.spec.logit_softcap
            return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _apply_group(
    layers: nnx.List[Layer], x: jax.Array, pages: tuple[jax.Array, ...], batch: Batch, angles: Angles, wanted: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    graphdef, whole, stacked = nnx.split(layers, WholeParam, ...)
    apply = functools.partial(_apply_pattern, graphdef, whole)
    repeats = pages[0].shape[0]
    if repeats == 1:
        return apply(x, pages, jnp.int32(0), jax.tree.map(lambda leaf: leaf[0], stacked), batch, angles, wanted)

    def body(carry: tuple[jax.Array, tuple[jax.Array, ...]], item: tuple[jax.Array, Any]) -> tuple[Any, None]:
        x, pages = carry
        index, weights = item
        return apply(x, pages, index, weights, batch, angles, None), None

    x, pages = jax.lax.scan(body, (x, pages), (jnp.arange(repeats, dtype=jnp.int32), stacked))[0]
    return x if wanted is None else x[wanted], pages


@functools.partial(jax.jit, static_argnums=0)  # traced once for all groups that are alike, then inlined
def _apply_pattern(
    graphdef: nnx.GraphDef[nnx.List[Layer]],
    whole: Any,
    x: jax.Array,
    pages: tuple[jax.Array, ...],
    index: jax.Array,
    weights: Any,
    batch: Batch,
    angles: Angles,
    wanted: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    written: list[jax.Array] = []
    for layer, its_pages in zip(nnx.merge(graphdef, whole, weights), pages, strict=True):
        last = len(written) + 1 == len(pages)
        x, its_pages = layer(x, its_pages, index, batch, angles, wanted if last else None)
        written.append(its_pages)
    return x, tuple(written)
