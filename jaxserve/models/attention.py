"""The attention half of a layer: projections around the paged attention kernel."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.batch import Batch, cut_rows
from jaxserve.models.linear import Linear, cut_param
from jaxserve.models.norm import Norm
from jaxserve.models.rope import Angles, apply_rope
from jaxserve.models.spec import AttentionSpec, DistanceBuckets, QkNormSpec
from jaxserve.sharding import WHOLE, Cut, Split
from pallas_kernels.ragged_paged_attention import ragged_paged_attention


class HeadNorm(nnx.Module):
    """Normalization of the queries or of the keys, [T, N, H]; `cut` deals out the heads, of which a device has num_heads."""

    def __init__(self, spec: QkNormSpec, num_heads: int, head_size: int, *, repeats: int, dtype: jnp.dtype, cut: Cut | None = None) -> None:
        self.over_width = spec.over == "width"
        shapes = {"head": head_size, "heads": (num_heads, head_size), "width": num_heads * head_size}
        self.norm = Norm(spec.norm, shapes[spec.over], repeats=repeats, dtype=dtype, cut=cut if spec.over == "heads" else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, N, H] to [T, N, H]."""
        return self.norm(x.reshape(x.shape[0], -1)).reshape(x.shape) if self.over_width else self.norm(x)


class Attention(nnx.Module):
    """Multi-head attention over the paged cache; queries, keys and values are one matrix, rows [q | k | v], of a device's heads."""

    def __init__(
        self, spec: AttentionSpec, width: int, *, repeats: int, dtype: jnp.dtype, platform: str | None, split: Split = WHOLE
    ) -> None:
        self.spec, self.platform = spec, platform
        self.heads = heads = split.heads(spec.num_heads, spec.num_kv_heads)
        N, K, H = spec.num_heads, spec.num_kv_heads, spec.head_size
        cut = heads.cut(0, ("queries", H, 0), ("keys", H, N * H), ("keys", H, (N + K) * H))
        self.qkv = Linear(width, (N + 2 * K) * H, bias=spec.qkv_bias, repeats=repeats, dtype=dtype, cut=cut)
        if spec.qk_norm is not None:
            q_cut, k_cut = heads.cut(0, ("queries", 1, 0)), heads.cut(0, ("keys", 1, 0))
            self.q_norm = HeadNorm(spec.qk_norm, heads.num_queries, H, repeats=repeats, dtype=dtype, cut=q_cut)
            self.k_norm = HeadNorm(spec.qk_norm, heads.num_keys, H, repeats=repeats, dtype=dtype, cut=k_cut)
        self.sinks = cut_param((repeats, heads.num_queries), dtype, heads.cut(0, ("queries", 1, 0))) if spec.sinks else None
        num_buckets = 0 if spec.distance_buckets is None else spec.distance_buckets.count
        bias_shape, bias_cut = (repeats, num_buckets, heads.num_queries), heads.cut(1, ("queries", 1, 0))
        self.distance_bias = cut_param(bias_shape, dtype, bias_cut) if num_buckets else None
        self.out = Linear(N * H, width, bias=spec.out_bias, repeats=repeats, dtype=dtype, cut=heads.cut(1, ("queries", H, 0)))

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: jax.Array, batch: Batch, angles: Angles, wanted: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Attend from [T, D] to [T, D], or to [Q, D] for the tokens i32[Q] `wanted`; returns the cache with all keys and values written."""
        spec = self.spec
        T, N, K, H = x.shape[0], self.heads.num_queries, self.heads.num_keys, spec.head_size
        # Apart from what follows: where layers are scanned, a product that gives heads in the kernel's order has its weights copied first.
        qkv = jax.lax.optimization_barrier(self.qkv(x)).reshape(T, N + 2 * K, H)
        if spec.clip is not None and not spec.clip_normed:
            qkv = jnp.clip(qkv, -spec.clip, spec.clip)
        q, k, v = qkv[:, :N], qkv[:, N : N + K], qkv[:, N + K :]
        if spec.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.clip is not None and spec.clip_normed:
            q, k, v = (jnp.clip(part, -spec.clip, spec.clip) for part in (q, k, v))
        if spec.rope is not None:
            q, k = apply_rope(q, angles, spec.rope), apply_rope(k, angles, spec.rope)
        if spec.temperature is not None:
            steps = jnp.floor((batch.positions.astype(jnp.float32) + 1) / spec.temperature.period)
            q = (q * (1 + spec.temperature.scale * jnp.log1p(steps))[:, None, None]).astype(q.dtype)
        if spec.chunk is not None:
            batch = cut_rows(batch, spec.chunk, pages[0, 0].size // (2 * K * H))
        out, pages = ragged_paged_attention(
            q, k, v, pages, layer,
            page_table=batch.page_table, query_start=batch.query_start, kv_len=batch.kv_len,
            sm_scale=spec.sm_scale, causal=spec.causal, window=spec.window, softcap=spec.softcap,
            alibi_slopes=None if spec.alibi_slopes is None else self.heads.of_queries(spec.alibi_slopes),
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            distance_bias=self._bias_by_distance(),
            one_token_rows=batch.one_token_rows, implementation=spec.implementation, platform=self.platform,
        )  # fmt: skip
        out = out.reshape(T, N * H)
        return self.out(out if wanted is None else out[wanted]), pages

    def _bias_by_distance(self) -> jax.Array | None:
        """f32[N, 2 * max_distance + 1], if there is one."""
        if self.distance_bias is None or self.spec.distance_buckets is None:
            return None
        return self.distance_bias[...].astype(jnp.float32)[distance_buckets(self.spec.distance_buckets)].T


def distance_buckets(spec: DistanceBuckets) -> np.ndarray:
    """The bucket of each distance, key position minus query position, from -max_distance to max_distance.

    Source: Raffel et al. 2020 (T5), section 2.1, as its code has it: MPNet's is the same but for the sign.
    """
    distance = np.arange(-spec.max_distance, spec.max_distance + 1)
    half, far = spec.count // 2, np.abs(distance)
    exact = half // 2
    # float32 and in this order: at powers of two the logarithm decides by its last bit.
    grown = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(spec.max_distance / exact))
    bucket = np.where(far < exact, far, np.minimum(exact + (grown * np.float32(half - exact)).astype(np.int32), half - 1))
    return bucket + half * (distance > 0)
