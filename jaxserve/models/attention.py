"""The attention half of a layer: projections around the paged attention kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.batch import Batch
from jaxserve.models.linear import Linear
from jaxserve.models.rope import Angles, apply_rope
from jaxserve.models.spec import AttentionSpec
from pallas_kernels.ragged_paged_attention import ragged_paged_attention


class Attention(nnx.Module):
    """Multi-head attention over the paged cache; queries, keys and values are one matrix, rows [q | k | v]."""

    def __init__(self, spec: AttentionSpec, width: int, *, repeats: int, dtype: jnp.dtype) -> None:
        self.spec = spec
        heads = spec.num_heads + 2 * spec.num_kv_heads
        self.qkv = Linear(width, heads * spec.head_size, bias=spec.qkv_bias, repeats=repeats, dtype=dtype)
        self.out = Linear(spec.num_heads * spec.head_size, width, bias=spec.out_bias, repeats=repeats, dtype=dtype)

    def __call__(self, x: jax.Array, pages: jax.Array, layer: jax.Array, batch: Batch, angles: Angles) -> tuple[jax.Array, jax.Array]:
        """Attend from [T, D] to [T, D]; returns the cache with the new keys and values written."""
        spec = self.spec
        T, N, K, H = x.shape[0], spec.num_heads, spec.num_kv_heads, spec.head_size
        qkv = self.qkv(x).reshape(T, N + 2 * K, H)
        q, k, v = qkv[:, :N], qkv[:, N : N + K], qkv[:, N + K :]
        if spec.rope is not None:
            q, k = apply_rope(q, angles, spec.rope), apply_rope(k, angles, spec.rope)
        out, pages = ragged_paged_attention(
            q, k, v, pages, layer,
            page_table=batch.page_table, query_start=batch.query_start, kv_len=batch.kv_len,
            sm_scale=spec.sm_scale, window=spec.window, one_token_rows=batch.one_token_rows,
        )  # fmt: skip
        return self.out(out.reshape(T, N * H)), pages
