"""The attention half of a layer: projections around the paged attention kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.batch import Batch, cut_rows
from jaxserve.models.linear import Linear, cut_param
from jaxserve.models.norm import Norm
from jaxserve.models.rope import Angles, apply_rope
from jaxserve.models.spec import AttentionSpec, QkNormSpec
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
            one_token_rows=batch.one_token_rows, platform=self.platform,
        )  # fmt: skip
        out = out.reshape(T, N * H)
        return self.out(out if wanted is None else out[wanted]), pages
