"""Attention over the compressed cache on GPUs from Ampere on (Pallas Triton): the cache is updated in place, decodes split their context.

It is ragged paged attention with one KV head, whose values are the first C numbers of its keys: the kernels are those of
ragged_paged_attention/gpu.py, and a program fetches a token's vector once, for scores and sums. What differs is the plan (gpu_plan.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.mla_attention.gpu_plan import make_plan
from pallas_kernels.mla_attention.reference import cache_shape
from pallas_kernels.ragged_paged_attention.gpu import attend, write

__all__ = ["cache_shape", "mla_attention"]


def mla_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    rope_key: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    *,
    page_table: jax.Array,
    query_start: jax.Array,
    kv_len: jax.Array,
    sm_scale: float,
    causal: bool = True,
    one_token_rows: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See reference.py; the pages are updated in place. On a CPU the kernels are interpreted, which is for tests.

    Raises: NotImplementedError for other dtypes and sizes, see gpu_plan.make_plan.
    """
    plan = make_plan(
        q_latent, pages, page_table, sm_scale=sm_scale, causal=causal, one_token_rows=one_token_rows, limits=tuning.gpu_limits()
    )
    scalars = jnp.stack([jnp.asarray(layer, jnp.int32), jnp.int32(0)])  # no window
    new = jnp.concatenate([latent, rope_key], axis=-1).astype(pages.dtype)  # [T, C + Hr]
    rows = write(plan, scalars, [new], pages.reshape(-1, plan.head_size), page_table, query_start, kv_len)
    q = jnp.concatenate([q_latent, q_rope], axis=-1).reshape(-1, plan.head_size)  # [T * N, C + Hr]
    out, rows = attend(plan, [scalars, query_start, kv_len, page_table.reshape(-1), q], rows)
    return out.reshape(q_latent.shape), rows.reshape(pages.shape)
