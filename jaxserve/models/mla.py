"""Attention over a compressed cache (DeepSeek's multi-head latent attention), its projections of keys and values absorbed.

A head's keys are linear in the cached latent, so its query is brought into the latent space instead, and its output out of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.batch import Batch
from jaxserve.models.linear import Linear, cut_param
from jaxserve.models.norm import Norm
from jaxserve.models.rope import Angles, apply_rope
from jaxserve.models.spec import MlaSpec
from jaxserve.sharding import WHOLE, Split
from pallas_kernels.mla_attention import mla_attention


class LatentAttention(nnx.Module):
    """Attention over cached latents; key_up [R, N, nope, C] and value_up [R, N, V, C] lead from a latent to a head's keys and values.

    Every device has all latents and its own heads.
    """

    def __init__(self, spec: MlaSpec, width: int, *, repeats: int, dtype: jnp.dtype, platform: str | None, split: Split = WHOLE) -> None:
        self.spec, self.platform = spec, platform
        self.heads = heads = split.heads(spec.num_heads, spec.num_heads)
        size, own = spec.nope_size + spec.rope.dim, heads.num_queries
        if spec.q_rank is not None:
            self.q_down = Linear(width, spec.q_rank, bias=spec.down_bias, repeats=repeats, dtype=dtype)
            self.q_norm = Norm(spec.norm, spec.q_rank, repeats=repeats, dtype=dtype)
        cut = heads.cut(0, ("queries", size, 0))
        self.q_up = Linear(spec.q_rank or width, spec.num_heads * size, bias=False, repeats=repeats, dtype=dtype, cut=cut)
        self.kv_down = Linear(width, spec.latent_size + spec.rope.dim, bias=spec.down_bias, repeats=repeats, dtype=dtype)
        self.kv_norm = Norm(spec.norm, spec.latent_size, repeats=repeats, dtype=dtype)
        cut = heads.cut(0, ("queries", 1, 0))
        self.key_up = cut_param((repeats, own, spec.nope_size, spec.latent_size), dtype, cut)
        self.value_up = cut_param((repeats, own, spec.value_size, spec.latent_size), dtype, cut)
        cut = heads.cut(1, ("queries", spec.value_size, 0))
        self.out = Linear(spec.num_heads * spec.value_size, width, bias=spec.out_bias, repeats=repeats, dtype=dtype, cut=cut)

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: jax.Array, batch: Batch, angles: Angles, wanted: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Attend from [T, D] to [T, D], or to [Q, D] for the tokens i32[Q] `wanted`; returns the cache with all latents written."""
        spec, (T, _) = self.spec, x.shape
        q = self.q_up(x if spec.q_rank is None else self.q_norm(self.q_down(x)))
        q = q.reshape(T, self.heads.num_queries, spec.nope_size + spec.rope.dim)
        q_latent = jnp.einsum("tnh,nhc->tnc", q[..., : spec.nope_size], self.key_up[...])
        compressed = self.kv_down(x)
        latent = self.kv_norm(compressed[:, : spec.latent_size])
        rope_key = apply_rope(compressed[:, None, spec.latent_size :], angles, spec.rope)[:, 0]
        attended, pages = mla_attention(
            q_latent, apply_rope(q[..., spec.nope_size :], angles, spec.rope), latent, rope_key, pages, layer,
            page_table=batch.page_table, query_start=batch.query_start, kv_len=batch.kv_len,
            sm_scale=spec.sm_scale, one_token_rows=batch.one_token_rows, platform=self.platform,
        )  # fmt: skip
        attended = attended if wanted is None else attended[wanted]
        values = jnp.einsum("tnc,nvc->tnv", attended, self.value_up[...])  # [T, N, V]
        return self.out(values.reshape(len(values), -1)), pages
