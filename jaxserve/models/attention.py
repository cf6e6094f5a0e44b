"""The attention half of a layer: projections around the paged attention kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.batch import Batch
from jaxserve.models.linear import Linear
from jaxserve.models.norm import Norm
from jaxserve.models.rope import Angles, apply_rope
from jaxserve.models.spec import AttentionSpec, QkNormSpec
from pallas_kernels.ragged_paged_attention import ragged_paged_attention


class HeadNorm(nnx.Module):
    """Normalization of the queries or of the keys, [T, N, H]."""

    def __init__(self, spec: QkNormSpec, num_heads: int, head_size: int, *, repeats: int, dtype: jnp.dtype) -> None:
        self.over_width = spec.over == "width"
        shapes = {"head": head_size, "heads": (num_heads, head_size), "width": num_heads * head_size}
        self.norm = Norm(spec.norm, shapes[spec.over], repeats=repeats, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [T, N, H] to [T, N, H]."""
        return self.norm(x.reshape(x.shape[0], -1)).reshape(x.shape) if self.over_width else self.norm(x)


class Attention(nnx.Module):
    """Multi-head attention over the paged cache; queries, keys and values are one matrix, rows [q | k | v]."""

    def __init__(self, spec: AttentionSpec, width: int, *, repeats: int, dtype: jnp.dtype, platform: str | None) -> None:
        self.spec, self.platform = spec, platform
        heads = spec.num_heads + 2 * spec.num_kv_heads
        self.qkv = Linear(width, heads * spec.head_size, bias=spec.qkv_bias, repeats=repeats, dtype=dtype)
        if spec.qk_norm is not None:
            self.q_norm = HeadNorm(spec.qk_norm, spec.num_heads, spec.head_size, repeats=repeats, dtype=dtype)
            self.k_norm = HeadNorm(spec.qk_norm, spec.num_kv_heads, spec.head_size, repeats=repeats, dtype=dtype)
        self.out = Linear(spec.num_heads * spec.head_size, width, bias=spec.out_bias, repeats=repeats, dtype=dtype)

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: jax.Array, batch: Batch, angles: Angles, wanted: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Attend from [T, D] to [T, D], or to [Q, D] for the tokens i32[Q] `wanted`; returns the cache with all keys and values written."""
        spec = self.spec
        T, N, K, H = x.shape[0], spec.num_heads, spec.num_kv_heads, spec.head_size
        qkv = self.qkv(x).reshape(T, N + 2 * K, H)
        if spec.clip is not None:
            qkv = jnp.clip(qkv, -spec.clip, spec.clip)
        q, k, v = qkv[:, :N], qkv[:, N : N + K], qkv[:, N + K :]
        if spec.qk_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.rope is not None:
            q, k = apply_rope(q, angles, spec.rope), apply_rope(k, angles, spec.rope)
        out, pages = ragged_paged_attention(
            q, k, v, pages, layer,
            page_table=batch.page_table, query_start=batch.query_start, kv_len=batch.kv_len,
            sm_scale=spec.sm_scale, window=spec.window, softcap=spec.softcap,
            alibi_slopes=None if spec.alibi_slopes is None else jnp.array(spec.alibi_slopes, jnp.float32),
            one_token_rows=batch.one_token_rows, platform=self.platform,
        )  # fmt: skip
        out = out.reshape(T, N * H)
        return self.out(out if wanted is None else out[wanted]), pages
